"""What only a GPU can show; skipped without one."""

import warnings

import pytest
import torch
from test_train import losses_and_gradients, make_batch, make_batch_losses

import execution
import optimization
import train
import utils
from divergence import NOT_FINITE, Divergence
from training_state import TrainingState

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda", 0)


def batch_losses_on_gpu(amp: bool = False) -> train.BatchLosses:
    batch_losses = make_batch_losses().to(GPU)
    batch_losses.autocast = torch.autocast("cuda", torch.bfloat16, enabled=amp)
    return batch_losses


def make_state(batch_losses: train.BatchLosses, accumulate: int = 1) -> TrainingState:
    args = train.parse_args(["--lr", "1e-5"])  # so low that differences of rounding stay small
    optimizer = optimization.make_optimizer(args, batch_losses.model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    return TrainingState(batch_losses.model, optimizer, schedule, scaler, 9, accumulate)


def batches_on_gpu(batch_losses: train.BatchLosses) -> list[dict]:
    batches = [make_batch(batch_losses.preset, number) for number in ((1, 4), (3, 2), (5, 0), (2, 6))]
    return list(utils.moved_batches(batches, GPU))


def test_losses_and_gradients_equal_those_of_the_cpu():
    on_cpu, on_gpu = make_batch_losses(), batch_losses_on_gpu()
    batch = make_batch(on_cpu.preset)
    torch.backends.cudnn.allow_tf32 = False
    losses, gradients = losses_and_gradients(on_cpu, batch)
    gpu_losses, gpu_gradients = losses_and_gradients(on_gpu, utils.to_device(batch, GPU))
    torch.backends.cudnn.allow_tf32 = True
    for name, loss in losses.items():
        torch.testing.assert_close(gpu_losses[name].cpu(), loss, rtol=1e-3, atol=0)
    for name, gradient in gradients.items():
        difference = (gpu_gradients[name].cpu() - gradient).norm()
        assert difference < 0.05 * gradient.norm() + 1e-5, name


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_equal_eager_ones(mode, accumulate):
    torch._dynamo.reset()
    weights = []
    for compiled in (False, True):
        batch_losses = batch_losses_on_gpu()
        if compiled:
            execution.compile_whole(batch_losses, mode)
        state = make_state(batch_losses, accumulate)
        for batch in batches_on_gpu(batch_losses) * 3:
            completes_step = state.completes_step
            state.add_gradients(batch_losses(batch)["loss"])
            if completes_step:
                state.update()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in batch_losses.model.parameters()]))
    initial = torch.cat([parameter.detach().flatten() for parameter in batch_losses_on_gpu().model.parameters()])
    eager, compiled = weights
    assert (compiled - eager).norm() < 0.1 * (eager - initial).norm()


@pytest.mark.parametrize("amp", [False, True])
def test_a_step_never_makes_the_host_wait(amp):
    batch_losses = batch_losses_on_gpu(amp)
    state = make_state(batch_losses)
    batches = batches_on_gpu(batch_losses)
    for batch in batches:
        state.add_gradients(batch_losses(batch)["loss"])
        state.update()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the detector is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches:
                state.add_gradients(batch_losses(batch)["loss"])
                state.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_batches_arrive_whole():
    """Also where the computation lags behind the copies, and memory of earlier batches is free again."""
    batches = [{"image": torch.full((4, 3, 300, 300), i, dtype=torch.uint8).pin_memory()} for i in range(50)]
    slow = torch.randn(4000, 4000, device=GPU)
    sums = []
    for batch in utils.moved_batches(batches, GPU):
        slow = slow @ slow * 1e-3
        sums.append(batch["image"].sum())
    assert [int(total) for total in sums] == [i * 4 * 3 * 300 * 300 for i in range(50)]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--amp"],
        ["--amp", "fp16"],
        ["--amp", "--compile"],
        ["--sync-bn"],
        ["--sync-bn", "--compile"],
        ["--model", "ssd512_vgg16"],
        ["--model", "ssdlite320_mobilenet_v3_large", "--recipe", "ssdlite"],
    ],
)
def test_training_on_a_gpu(run, data_path, tmp_path, flags):
    command = ["train.py", "--model", "ssd300_resnet18", "--weights-backbone", "none", "--batch-size", 3]
    run(*command, "--data-path", data_path, "--output-dir", tmp_path, "--max-steps", 5, "--workers", 1, *flags)
    run(*command, "--data-path", data_path, "--output-dir", tmp_path, "--max-steps", 7, "--resume", "auto", *flags)


def test_the_same_results_again(run, data_path, tmp_path):
    command = ["train.py", "--model", "ssd300_resnet18", "--weights-backbone", "none", "--batch-size", 3]
    command += ["--data-path", data_path, "--max-steps", 3, "--eval-freq", 0, "--use-deterministic-algorithms"]
    models = []
    for name in ("first", "second"):
        run(*command, "--output-dir", tmp_path / name)
        models.append(torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["model"])
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_resumed_run_equals_an_undisturbed_one(run, data_path, tmp_path):
    command = ["train.py", "--model", "ssd300_resnet18", "--weights-backbone", "none", "--batch-size", 3]
    command += ["--data-path", data_path, "--eval-freq", 0, "--use-deterministic-algorithms", "--resume", "auto"]
    run(*command, "--max-steps", 3, "--output-dir", tmp_path / "whole")
    for steps in (2, 3):
        run(*command, "--max-steps", steps, "--output-dir", tmp_path / "parts")
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("whole", "parts"))
    for key in ("model", "optimizer"):
        torch.testing.assert_close(whole[key], parts[key], rtol=0, atol=0)


def test_numbers_are_watched_without_a_wait(tmp_path):
    """While the device is busy with a step, its numbers are unknown; the fault is found when they have come."""
    watch = Divergence(tmp_path)
    busy = torch.randn(8000, 8000, device=GPU)
    batch = {"image_id": [3]}
    loss = torch.tensor([torch.nan], device=GPU)
    watch.add(0, [batch], ["loss"], [torch.ones(1, device=GPU)], torch.ones((), device=GPU))  # allocates what it needs
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):
            busy = busy @ busy * 1e-4
        watch.add(1, [batch], ["loss"], [loss + busy[:1, 0] * 0], torch.ones((), device=GPU))
        assert watch.vote() == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.vote(wait=True) == NOT_FINITE
