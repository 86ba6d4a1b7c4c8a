"""Training step: images per second of train.py's loop and of torchvision's reference, on batches that are in memory.

    python benchmarks/train_step.py --batch-size 4 8 32 64 128 --amp --compile default reduce-overhead --peer
    python benchmarks/train_step.py --batch-size 8 --peer                   # on a CPU: a ratio, no figure to quote

Ours is train.py's train_one_epoch, photometric distortion on the device included, with as many slots for boxes as COCO
needs. The peer is torchvision's ssd300_vgg16 in the loop of its references, on images that already have the network's
size. All layers train. Each variant has a process of its own; they take turns, and the median round counts. MFU is the
share of the GPU's peak that the convolutions use, by their counted operations. The last line is one JSON object.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import ssd300_vgg16

sys.path.insert(0, str(Path(__file__).parent.parent))

from turns import take_turns

import coco_utils
import execution
import flags
import optimization
import presets
import run_log
import ssd
import train
import utils
from divergence import Divergence
from run_log import RunLog, StepLog
from training_state import TrainingState

NUM_CLASSES = 91
BOXES_PER_IMAGE = 7  # COCO's mean
MAX_BOXES = 93  # COCO's largest number in an image of train2017
LR = 1e-4
STEPS_TO_ALLOCATE = 3
# dense operations per second by the vendor's data sheet: bf16 and fp16, and TF32, which PyTorch's convolutions use
PEAKS = {
    "H200 NVL": (835e12, 418e12),
    "H200": (989.4e12, 494.7e12),
    "H100 NVL": (835e12, 418e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989.4e12, 494.7e12),
    "A100": (312e12, 156e12),
}

run_steps: Callable[[int], None]  # of this process: its variant
device: torch.device


def make_batch(preset: presets.DetectionPresetTrain, batch_size: int) -> dict:
    """A batch as the loader makes it, of noise. Nothing is cropped, so that all images keep their boxes."""
    preset = copy.copy(preset)
    preset.geometric = []
    rng, size, samples = np.random.default_rng(0), preset.size, []
    for image_id in range(batch_size):
        image = rng.integers(0, 256, (size, size, 4), dtype=np.uint8)
        corners = rng.uniform(0, 0.7 * size, (BOXES_PER_IMAGE, 2))
        boxes = np.concatenate((corners, corners + rng.uniform(0.05 * size, 0.3 * size, corners.shape)), axis=1)
        sample = preset(image, boxes.astype(np.float32), rng.integers(1, NUM_CLASSES, BOXES_PER_IMAGE), rng)
        samples.append(sample | {"image_id": image_id})
    return coco_utils.collate(samples, MAX_BOXES)


def make_ours(
    log_dir: str, model_name: str, batch_size: int, amp: str | None, compile_mode: str | None
) -> Callable[[int], None]:
    """Runs ``train.train_one_epoch`` for a number of steps."""
    args = train.parse_args(["--model", model_name, "--weights-backbone", "none", "--lr", str(LR)])
    torch.backends.cudnn.benchmark = True
    model = train.make_model(args, NUM_CLASSES).to(device, memory_format=execution.memory_format(device))
    preset = presets.DetectionPresetTrain(data_augmentation="ssd", size=model.size)
    optimizer = optimization.make_optimizer(args, model)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    state = TrainingState(model, optimizer, LambdaLR(optimizer, lambda step: 1.0), scaler, steps_per_epoch=10**9)
    batch_losses = train.BatchLosses(model, preset, execution.make_autocast(device, amp))
    if compile_mode is not None:
        execution.compile_whole(batch_losses, compile_mode)
    batch = utils.to_device(make_batch(preset, batch_size), device)
    log = RunLog(Path(log_dir) / str(os.getpid()))
    divergence = Divergence(Path(log_dir))

    def run(num_steps: int) -> None:
        batches = (batch | {"fault": []} for _ in range(num_steps))
        step_log = StepLog(
            log=log, epoch=0, first_step=0, last_step=num_steps, global_step=0, images_per_step=1, print_freq=20
        )
        with contextlib.redirect_stdout(io.StringIO()):
            train.train_one_epoch(
                state,
                batch_losses,
                batches,
                step_log,
                check=lambda *step: (divergence.add(0, step[0], step_log.names, *step[1:]), divergence.vote()),
                after_step=lambda: None,
            )

    return run


def make_peer(batch_size: int, amp: bool) -> Callable[[int], None]:
    """The step of torchvision's references/detection/engine.py, in our words."""
    model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=NUM_CLASSES).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=amp and device.type == "cuda")
    autocast = torch.autocast(device.type, enabled=amp)  # the reference names no type: fp16 on a GPU, bf16 on a CPU
    preset = presets.DetectionPresetTrain(data_augmentation="ssd", size=300)
    batch = utils.to_device(make_batch(preset, batch_size), device)
    images = list(batch["image"].float() / 255)
    targets = [
        {"boxes": boxes[:BOXES_PER_IMAGE], "labels": labels[:BOXES_PER_IMAGE]}
        for boxes, labels in zip(*coco_utils.split_objects(batch["objects"]), strict=True)
    ]

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            with autocast:
                losses = model(images, targets)
                loss = sum(losses.values())
            if not math.isfinite(loss.item()):
                raise FloatingPointError("the peer's loss is not finite")
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            for value in (loss, *losses.values()):  # its log reads each in every step
                value.item()

    return run


def start(kind: str, device_name: str, warm_up: int, *settings) -> None:
    global run_steps, device
    device = utils.init_distributed(device_name, timeout=1800)
    torch.manual_seed(0)
    run_steps = {"ours": make_ours, "peer": make_peer}[kind](*settings)
    run_steps(warm_up)
    free_memory()


def free_memory() -> None:
    """Leaves the GPU's memory to the other variants' processes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(num_steps: int) -> dict[str, float]:
    """Seconds of a step, the most memory so far, and on a GPU how often the host waited for it in a step."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run_steps(num_steps)
        return {"seconds": (time.perf_counter() - begin) / num_steps, "MiB": run_log.max_memory()}
    run_steps(STEPS_TO_ALLOCATE)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run_steps(num_steps)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / num_steps
    result = {"seconds": seconds, "MiB": run_log.max_memory(), "waits": count_waits(num_steps)}
    free_memory()
    return result


def count_waits(num_steps: int) -> float:
    """Synchronisations of host and GPU per step, by PyTorch's own detector."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run_steps(num_steps)
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught) / num_steps


def profile_steps(num_steps: int = 5) -> str:
    """The ten operations that take the most time of the device."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run_steps(num_steps)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=80)


def count_flops(model_name: str) -> int:
    """Floating-point operations of a training step per image, without computing anything."""
    model = ssd.MODELS[model_name](weights_backbone=None, num_classes=NUM_CLASSES).to("meta").train()
    boxes, labels = torch.zeros(1, 1, 4, device="meta"), torch.zeros(1, 1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        outputs = model(torch.zeros(1, 3, model.size, model.size, device="meta"))
        loss: Tensor = sum(model.compute_loss(outputs, boxes, labels).values())
        loss.backward()
    return counter.get_total_flops()


def peak_of(gpu: str, is_half: bool) -> float | None:
    """Operations per second that the GPU could do at most, if its name is one we know."""
    return next((peaks[0 if is_half else 1] for name, peaks in PEAKS.items() if name in gpu), None)


def list_variants(args: argparse.Namespace, batch_size: int, log_dir: str) -> dict[str, tuple]:
    """name -> the arguments of ``start``."""
    common = (args.device, args.warm_up)
    precisions = [None, *([args.amp] if args.amp else [])]
    variants = {}
    for amp, mode in itertools.product(precisions, [None, *args.compile]):
        name = " ".join(filter(None, ("ours", amp or "fp32", mode and f"compiled ({mode})")))
        variants[name] = ("ours", *common, log_dir, args.model, batch_size, amp, mode)
    if args.peer:
        variants["peer fp32"] = ("peer", *common, batch_size, False)
    if args.peer and args.amp:
        variants["peer amp"] = ("peer", *common, batch_size, True)
    return variants


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(ssd.MODELS), default="ssd300_vgg16")
    parser.add_argument("--batch-size", type=flags.positive, nargs="+", default=[32])
    parser.add_argument("--amp", nargs="?", const="bf16", choices=list(execution.AMP_DTYPES), help="measure this too")
    parser.add_argument("--compile", nargs="*", choices=flags.COMPILE_MODES, help="measure these too")
    parser.add_argument("--peer", action="store_true", help="measure torchvision too; its model is ssd300_vgg16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=flags.positive, help="timed steps of a round (default: 50, on a CPU 1)")
    parser.add_argument("--rounds", type=flags.positive, default=3)
    parser.add_argument("--profile", action="store_true", help="list the operations that take the most time")
    args = parser.parse_args()
    if args.peer and args.model != "ssd300_vgg16":
        parser.error("--peer is ssd300_vgg16; leave out --model")
    args.compile = [] if args.compile is None else args.compile or ["default"]
    on_gpu = args.device == "cuda"
    args.steps = args.steps or (50 if on_gpu else 1)
    args.warm_up = 30 if on_gpu else 1
    return args


def measure_variants(
    args: argparse.Namespace, batch_size: int, variants: dict[str, tuple], flops: int, gpu: str
) -> dict[str, dict]:
    """variant -> the medians of what ``measure`` found, and what follows from them."""
    rows = {}
    for name, rounds in take_turns(start, partial(measure, args.steps), variants, args.rounds).items():
        row = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        row["images/s"] = batch_size / row["seconds"]
        peak = peak_of(gpu, is_half=name.split()[1] != "fp32")
        if peak:
            row["MFU"] = row["images/s"] * flops / peak
        rows[name] = row
    return rows


def main() -> None:
    args = get_args()
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else ""
    flops = count_flops(args.model)
    print(f"{args.model} on {gpu or 'CPU'}, torch {torch.__version__}: {flops / 1e9:.1f} GFLOP per image and step")
    report = {"model": args.model, "device": gpu or "cpu", "torch": torch.__version__, "flops": flops, "batches": {}}
    for batch_size in args.batch_size:
        with tempfile.TemporaryDirectory() as log_dir:
            variants = list_variants(args, batch_size, log_dir)
            rows = measure_variants(args, batch_size, variants, flops, gpu)
            tables = take_turns(start, profile_steps, variants, rounds=1) if args.profile else {}
        for name, row in rows.items():
            figures = "  ".join(f"{key} {value:.4g}" for key, value in row.items())
            print(f"batch {batch_size:4}  {name:40} {figures}", flush=True)
        ratios = {
            f"{one} / {other}": rows[one]["images/s"] / rows[other]["images/s"]
            for one, other in itertools.product(rows, rows)
            if one.startswith("ours") and other.startswith("peer")
        }
        for name, ratio in ratios.items():
            print(f"batch {batch_size:4}  {name:60} {ratio:.2f}")
        for name, (table,) in tables.items():
            print(f"{name}, batch {batch_size}\n{table}")
        report["batches"][batch_size] = {"variants": rows, "ratios": ratios}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
