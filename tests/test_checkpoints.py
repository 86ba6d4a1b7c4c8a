import argparse

import pytest
import torch

import checkpoints
from checkpoints import TrainingState


class OneBuffer(torch.autograd.Function):
    """``2 * x``, whose gradient lies in the same memory each time, as that of a CUDA graph does."""

    buffer = torch.zeros(1, 3)

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return OneBuffer.buffer.copy_(2 * gradient).detach()  # a new tensor, which PyTorch may take over


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


def test_gradients_are_added_also_where_they_come_in_the_same_memory():
    model = torch.nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainingState(model, optimizer, schedule, scaler, steps_per_epoch=9, accumulate=2)
    for _ in range(2):
        before = model.weight.detach().clone()
        for value in (1.0, 10.0):
            state.add_gradients((OneBuffer.apply(model.weight) * value).sum())
        state.update()
        torch.testing.assert_close(before - model.weight.detach(), torch.full((1, 3), 11.0))


def make_state(fused: bool) -> TrainingState:
    model = torch.nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return TrainingState(model, optimizer, schedule, torch.amp.GradScaler("cpu"), steps_per_epoch=9)


@pytest.mark.parametrize("fused", [False, True])
def test_a_resumed_run_computes_its_steps_in_its_own_way(fused):
    """The checkpoint may be of another precision, where steps are fused or not."""
    old, new = make_state(not fused), make_state(fused)
    for state in (old, new):
        state.add_gradients(state.model(torch.ones(3)).sum())
        state.update()
        new.load_state_dict(old.state_dict())
    assert [group["fused"] for group in new.optimizer.param_groups] == [fused]
    new.add_gradients(new.model(torch.ones(3)).sum())
    new.update()


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
