"""What only a GPU can show; skipped without one."""

import contextlib
import warnings
from collections.abc import Iterator

import pytest
import torch

import train
import utils
from engine import averaging, execution
from engine.divergence import NOT_FINITE, Divergence
from engine.run_log import RunLog, StepLog
from engine.training_state import TrainingState, copy_to_host
from tests.test_train import losses_and_gradients, make_batch, make_batch_losses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda", 0)


def batch_losses_on_gpu(amp: bool = False) -> train.BatchLosses:
    batch_losses = make_batch_losses().to(GPU)
    batch_losses.autocast = torch.autocast("cuda", torch.bfloat16, enabled=amp)
    return batch_losses


def make_state(batch_losses: train.BatchLosses, accumulate: int = 1, *flags: str) -> TrainingState:
    args = train.parse_args(["--lr", "1e-5", *flags])  # so low that differences of rounding stay small
    args.world_size = 1
    optimizer = train.make_optimizer(args, batch_losses.model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler("cuda", enabled=args.amp == "fp16")
    ema = averaging.make_average(batch_losses.model, args.ema)
    return TrainingState(batch_losses.model, optimizer, schedule, scaler, 9, accumulate, ema)


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
            state.backward(batch_losses(batch)["loss"])
            if completes_step:
                state.optimizer_step()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in batch_losses.model.parameters()]))
    initial = torch.cat([parameter.detach().flatten() for parameter in batch_losses_on_gpu().model.parameters()])
    eager, compiled = weights
    assert (compiled - eager).norm() < 0.1 * (eager - initial).norm()


@contextlib.contextmanager
def no_wait() -> Iterator[None]:
    """Where the host waits for the device, an error is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the detector is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("amp", "mode"),
    [(False, None), (True, None), (True, "default"), (True, "reduce-overhead")],
    ids=["float32", "bf16", "bf16 compiled", "bf16 compiled, graphs"],
)
def test_a_step_never_makes_the_host_wait(amp, mode):
    """In float32 and bf16; fp16 waits three times, to hear of overflows."""
    torch._dynamo.reset()
    batch_losses = batch_losses_on_gpu(amp)
    if mode is not None:
        execution.compile_whole(batch_losses, mode)
    state = make_state(batch_losses, 1, "--ema", "0.9")

    def take_steps() -> None:
        for batch in batches:
            torch.compiler.cudagraph_mark_step_begin()
            state.backward(batch_losses(batch)["loss"])
            state.optimizer_step()

    batches = batches_on_gpu(batch_losses)
    take_steps()  # compiles, allocates and records
    torch.cuda.synchronize()
    with no_wait():
        take_steps()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_epoch_learns_and_is_watched(tmp_path, mode):
    """The loop of train.py with all that lives beside it: moved batches, kept for as long as their numbers are late."""
    torch._dynamo.reset()
    batch_losses = batch_losses_on_gpu(amp=True)
    execution.compile_whole(batch_losses, mode)
    state = make_state(batch_losses, 1, "--lr", "1e-3")
    watch = Divergence(tmp_path)
    batch = make_batch(batch_losses.preset, (3, 4))
    log = StepLog(
        log=RunLog(tmp_path),
        epoch=0,
        first_step=0,
        last_step=30,
        global_step=0,
        images_per_step=2,
        print_freq=10,
        seconds_left=lambda: 0.0,
    )
    losses = []

    def check(batches: list[dict], step_losses: list[torch.Tensor], norm: torch.Tensor) -> None:
        watch.add(state.global_step, batches, log.names, step_losses, norm)
        losses.append(step_losses[0][0])
        assert watch.vote() == 0

    loader = [dict(batch, fault=[]) for _ in range(30)]
    train.train_one_epoch(state, batch_losses, loader, log, check, after_step=lambda: None)
    assert watch.vote(wait=True) == 0
    values = torch.stack(losses).tolist()
    assert len(set(values)) > 25  # each step has its own: none lies in memory that a later one has written over
    assert values[-1] < values[0]


PRECISIONS = {"none": [], "bf16": ["--amp", "bf16"], "fp16": ["--amp", "fp16"]}


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize("new", PRECISIONS)
@pytest.mark.parametrize("old", PRECISIONS)
def test_a_run_goes_on_in_any_precision(opt, old, new):
    """Where steps are fused, AdamW counts them on the device; else the kernel would read what is not there."""
    states = [make_state(batch_losses_on_gpu(), 1, "--opt", opt, *PRECISIONS[name]) for name in (old, new)]
    for i, state in enumerate(states):
        if i == 1:
            state.load_state_dict(copy_to_host(states[0].state_dict()))
        state.backward(sum(parameter.square().sum() for parameter in state.model.parameters()))
        state.optimizer_step()
        torch.cuda.synchronize()
    steps = [one["step"] for one in states[1].optimizer.state.values() if "step" in one]
    assert {(step.device.type, step.item()) for step in steps} == (
        set() if opt == "sgd" else {("cpu" if new == "fp16" else "cuda", 2.0)}
    )
    assert all(parameter.isfinite().all() for parameter in states[1].model.parameters())


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
    ids=lambda flags: " ".join(flags).replace("--", "") or "float32",
)
def test_training_on_a_gpu(run, data_path, tmp_path, flags):
    command = ["train.py", "--model", "ssd300_resnet18", "--weights-backbone", "none", "--batch-size", 3]
    run(*command, "--data-path", data_path, "--output-dir", tmp_path, "--max-steps", 5, "--workers", 1, *flags)
    run(*command, "--data-path", data_path, "--output-dir", tmp_path, "--max-steps", 7, "--resume", "auto", *flags)


@pytest.mark.parametrize(
    "flags", [["--sync-bn"], ["--amp", "--compile"], ["--sync-bn", "--amp", "--compile"]], ids=" ".join
)
def test_training_under_torchrun(run, data_path, tmp_path, flags):
    """NCCL, DDP and batch norm over processes, also where there is one."""
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={torch.cuda.device_count()}",
        "train.py",
    ]
    command += ["--model", "ssd300_resnet18", "--weights-backbone", "none", "--batch-size", 1, "--workers", 1, *flags]
    run(*command, "--data-path", data_path, "--output-dir", tmp_path, "--max-steps", 3)


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

    def add_late(step: int, products: int, value: torch.Tensor) -> None:
        late = busy
        for _ in range(products):
            late = late @ late * 1e-4
        watch.add(step, [batch], ["loss"], [value + late[:1, 0] * 0], torch.ones((), device=GPU))

    add_late(0, 1, torch.zeros_like(loss))  # loads and allocates what is needed
    assert watch.vote(wait=True) == 0
    torch.cuda.synchronize()
    with no_wait():
        add_late(1, 50, loss)
        assert watch.vote() == 0
    assert watch.vote(wait=True) == NOT_FINITE
