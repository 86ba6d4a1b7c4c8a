import pytest
import torch

from training_state import TrainingState


class OneBuffer(torch.autograd.Function):
    """``2 * x``, whose gradient lies in the same memory each time, as that of a CUDA graph does."""

    buffer = torch.zeros(1, 3)

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return OneBuffer.buffer.copy_(2 * gradient).detach()  # a new tensor, which PyTorch may take over


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
    return TrainingState(model, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=False), steps_per_epoch=9)


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


def test_a_step_tells_the_norm_of_its_gradients():
    state = make_state(fused=False)
    state.add_gradients((state.model.weight * torch.tensor([[3.0, 0.0, 4.0]])).sum())
    assert state.update().item() == 5


class Overflowing(torch.nn.Module):
    """A loss whose gradients are infinite on demand."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, overflows: bool) -> torch.Tensor:
        return self.weight.sum() * (torch.inf if overflows else 1.0)


def make_fp16_state() -> TrainingState:
    model = Overflowing()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return TrainingState(model, optimizer, schedule, torch.amp.GradScaler("cpu"), steps_per_epoch=9)


@pytest.mark.filterwarnings("error")
def test_steps_that_fp16_skips_are_counted(recwarn):
    """The first one, too, without PyTorch's warning that the schedule runs ahead of the optimizer."""
    state = make_fp16_state()
    for overflows in (True, False, True, True, False):
        before = state.model.weight.detach().clone()
        state.add_gradients(state.model(overflows))
        assert state.update().isfinite()
        assert torch.equal(state.model.weight, before) == overflows
    assert (state.global_step, state.overflows, state.overflows_in_a_row) == (5, 3, 0)
    other = make_fp16_state()
    other.load_state_dict(state.state_dict())
    assert other.overflows == 3


def test_fp16_gives_up_when_no_step_succeeds():
    state = make_fp16_state()
    for _ in range(49):
        state.add_gradients(state.model(True))
        state.update()
    state.add_gradients(state.model(True))
    with pytest.raises(FloatingPointError, match=r"gradients of 50 steps in a row, up to step 50.*--amp bf16"):
        state.update()
