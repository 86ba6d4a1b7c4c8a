"""Whose folder it is, and what of it a run does not continue."""

import os
import subprocess
import sys

import pytest

from engine import checkpoints, resuming
from tests.conftest import ROOT
from tests.engine.test_checkpoints import StateAt, checkpoint_at, flip_a_byte


def test_earlier_runs_are_set_aside_under_free_names(tmp_path, capsys):
    for name in ("previous-1", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint.pth").touch()
    (tmp_path / "notes.txt").touch()
    files = [tmp_path / "pictures", tmp_path / "checkpoint.pth"]
    resuming.set_aside(tmp_path, files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "previous-1", "previous-2"]
    assert sorted(path.name for path in (tmp_path / "previous-2").iterdir()) == ["checkpoint.pth", "pictures"]
    assert "previous-2" in capsys.readouterr().out
    resuming.set_aside(tmp_path, [])
    assert not (tmp_path / "previous-3").exists()


def test_what_is_unusable_or_later_is_not_continued(tmp_path):
    saver = checkpoints.Checkpoints(tmp_path, keep=9, origin={}, latest_step=None)
    for step in (10, 20, 30, 40):
        saver.save(StateAt(step))
    found = checkpoints.Found(tmp_path / "checkpoint_20.pth", checkpoint_at(20))
    later = [tmp_path / name for name in ("checkpoint.pth", "checkpoint_30.pth")]
    for step, expected in ((15, later), (25, [tmp_path / "best.pth", *later])):
        saver.save_best(checkpoint_at(step))
        assert resuming.not_continued(tmp_path, found) == sorted(expected)
    saver.save_best(checkpoint_at(15))
    flip_a_byte(tmp_path / "best.pth")
    assert resuming.not_continued(tmp_path, found) == sorted([tmp_path / "best.pth", *later])


def test_a_folder_belongs_to_one_run_as_long_as_that_lives(tmp_path):
    claim = "import pathlib, sys; from engine import resuming; resuming.claim(pathlib.Path(sys.argv[1])); print(1); "
    command = [sys.executable, "-c", claim + "sys.stdin.read()", tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(ValueError, match=rf"another run \(process {other.pid} on .*\) writes there; wait"):
            resuming.claim(tmp_path)
        other.kill()
    resuming.claim(tmp_path)
    resuming.claim(tmp_path)  # again by the same process
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
