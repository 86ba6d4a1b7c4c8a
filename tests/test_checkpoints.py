import argparse

import pytest
import torch

import checkpoints


class Unsavable:
    def __reduce__(self):
        raise OSError("disk full")


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pth"
    checkpoints.save_checkpoint({"step": 1}, path)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save_checkpoint({"weight": torch.ones(9), "step": Unsavable()}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    checkpoints.save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_earlier_runs_are_set_aside_under_free_names(tmp_path, capsys):
    for name in ("previous-1", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint.pth").touch()
    (tmp_path / "notes.txt").touch()
    checkpoints.set_aside_earlier_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "previous-1", "previous-2"]
    assert sorted(path.name for path in (tmp_path / "previous-2").iterdir()) == ["checkpoint.pth", "pictures"]
    assert "previous-2" in capsys.readouterr().out
    checkpoints.set_aside_earlier_run(tmp_path)
    assert not (tmp_path / "previous-3").exists()


@pytest.mark.parametrize(
    ("resume", "expected"),
    [("auto", True), ("out/best.pth", True), ("out/previous-1/best.pth", False), ("b.pth", False)],
)
def test_only_a_checkpoint_of_the_output_folder_continues_its_log(resume, expected):
    assert checkpoints.continues_in_place(argparse.Namespace(resume=resume, output_dir="out")) == expected
