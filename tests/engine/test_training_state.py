import pytest
import torch

import train
from engine.averaging import make_average
from engine.training_state import TrainingState, copy_to_host


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
            state.backward((OneBuffer.apply(model.weight) * value).sum())
        state.optimizer_step()
        torch.testing.assert_close(before - model.weight.detach(), torch.full((1, 3), 11.0))


PRECISIONS = {"none": [], "bf16": ["--amp", "bf16"], "fp16": ["--amp", "fp16"]}


def make_state(
    opt: str = "sgd", precision: str = "none", accumulate: int = 1, ema: float | None = None
) -> TrainingState:
    """As train.py makes it, of a model with three weights."""
    args = train.parse_args(["--opt", opt, "--lr", "1.0", "--weight-decay", "0", *PRECISIONS[precision]])
    args.world_size = 1
    model = torch.nn.Linear(3, 1, bias=False)
    optimizer = train.make_optimizer(args, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    return TrainingState(model, optimizer, schedule, scaler, 9, accumulate, make_average(model, ema))


def take_steps(state: TrainingState, number: int) -> None:
    for factor in range(1, number + 1):
        state.backward((state.model.weight * factor).sum())
        state.optimizer_step()


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("new_precision", PRECISIONS)
@pytest.mark.parametrize("old_precision", PRECISIONS)
def test_a_resumed_run_computes_its_steps_in_its_own_way(opt, old_precision, new_precision):
    """The checkpoint may be of another precision, where steps are fused or not; PyTorch is told before it loads."""
    old, new, other = (make_state(opt, precision) for precision in (old_precision, new_precision, old_precision))
    own_way = new.optimizer.param_groups[0]["fused"]
    assert own_way == (new_precision != "fp16")
    seen = []
    new.optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["param_groups"][0]["fused"]))
    take_steps(old, 3)
    checkpoint = copy_to_host(old.state_dict())
    new.load_state_dict(checkpoint)
    assert seen == [own_way] == [new.optimizer.param_groups[0]["fused"]]
    assert checkpoint["optimizer"]["param_groups"][0]["fused"] == (old_precision != "fp16")
    other.load_state_dict(copy_to_host(old.state_dict()))
    take_steps(new, 2)
    take_steps(other, 2)
    torch.testing.assert_close(new.model.weight, other.model.weight, rtol=1e-6, atol=0)


def test_a_step_tells_the_norm_of_its_gradients():
    state = make_state()
    state.backward((state.model.weight * torch.tensor([[3.0, 0.0, 4.0]])).sum())
    assert state.optimizer_step().item() == 5


def test_the_average_is_taken_once_per_step():
    """With steps of two batches: the weight goes from 0 to 3, 7 and 15, of which each step takes a quarter."""
    state = make_state(accumulate=2, ema=0.75)
    state.model.weight.data.zero_()
    state.optimizer.param_groups[0]["momentum"] = 0
    averages = []
    for gradients in ((-2.0, -4.0), (-8.0, 0.0), (-6.0, -10.0)):
        for gradient in gradients:
            state.backward((state.model.weight * gradient).sum())
        state.optimizer_step()
        averages.append(state.evaluated_model.weight[0, 0].item())
    assert averages == [3.0, 0.75 * 3 + 0.25 * 7, 0.75 * 4 + 0.25 * 15]
    assert (state.model.weight[0, 0].item(), state.ema.n_averaged.item()) == (15, 3)


def test_the_average_goes_on_after_a_resume():
    whole, resumed = (make_state(precision="fp16", ema=0.75) for _ in range(2))
    take_steps(whole, 3)
    checkpoint = copy_to_host(whole.state_dict())
    resumed.load_state_dict(checkpoint)
    for state in (whole, resumed):
        take_steps(state, 2)
    saved = checkpoint["model_ema"]["module.weight"]
    assert not torch.equal(saved, checkpoint["model"]["weight"])
    assert not torch.equal(saved, whole.ema.module.weight)
    assert torch.equal(resumed.ema.module.weight, whole.ema.module.weight)
    assert resumed.ema.n_averaged == whole.ema.n_averaged == 5


def test_without_an_average_the_model_is_evaluated():
    state = make_state()
    assert state.evaluated_model is state.model
    assert "model_ema" not in state.state_dict()


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


@pytest.mark.filterwarnings("error", "default::ResourceWarning")
def test_steps_that_fp16_skips_are_counted():
    """The first one, too, without PyTorch's warning that the schedule runs ahead of the optimizer."""
    state = make_fp16_state()
    for overflows in (True, False, True, True, False):
        before = state.model.weight.detach().clone()
        state.backward(state.model(overflows))
        assert state.optimizer_step().isfinite()
        assert torch.equal(state.model.weight, before) == overflows
    assert (state.global_step, state.overflows, state.overflows_in_a_row) == (5, 3, 0)
    other = make_fp16_state()
    other.load_state_dict(state.state_dict())
    assert other.overflows == 3


def test_steps_that_fp16_skips_do_not_count_for_the_average():
    """Of these, it begins with the second."""
    state = make_fp16_state()
    state.ema = make_average(state.model, 0.75)
    for overflows in (True, False, True, False):
        state.backward(state.model(overflows))
        state.optimizer_step()
    assert state.ema.n_averaged == 2
    assert state.ema.module.weight.tolist() == [0.75 * 0 + 0.25 * -1] * 3  # the weights were 1, then 0, then -1


def test_fp16_gives_up_when_no_step_succeeds():
    state = make_fp16_state()
    for _ in range(49):
        state.backward(state.model(True))
        state.optimizer_step()
    state.backward(state.model(True))
    with pytest.raises(FloatingPointError, match=r"gradients of 50 steps in a row, up to step 50.*--amp bf16"):
        state.optimizer_step()
