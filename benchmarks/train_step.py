"""Training step: images per second of train.py's loop and of torchvision's reference, on batches that are in memory.

    python -m benchmarks.train_step --batch-size 4 8 32 64 128 --precision fp32 bf16 --modes eager default --peer
    python -m benchmarks.train_step --batch-size 8 --peer                   # on a CPU: a ratio, no figure to quote

Ours is train.py's train_one_epoch, photometric distortion on the device included, with as many slots for boxes as COCO
needs. The peer is torchvision's ssd300_vgg16 in the loop of its references, on images that already have the network's
size. All layers train. Each variant has a process of its own; they take turns, and the median round counts. MFU is the
share of the GPU's peak that the convolutions use, by their counted operations. --levers adds variants with something
that may pay on a GPU and is not decided. After each batch size, and as the last line, comes one JSON object with all
that is known.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
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
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import ssd300_vgg16

import coco_utils
import presets
import ssd
import train
import utils
from benchmarks import device_profile, torchvision_training
from benchmarks.coco_like import BOXES_PER_IMAGE, MAX_BOXES
from benchmarks.turns import Variants
from engine import execution, flags, run_log
from engine.divergence import Divergence
from engine.run_log import RunLog, StepLog
from engine.training_state import TrainingState
from ssd import head

NUM_CLASSES = 91
LR = 1e-4
STEPS_TO_ALLOCATE = 3
STEPS_TO_COUNT_WAITS = 5
MODES = ("eager", *(mode for mode in flags.COMPILE_MODES if mode != "auto"))
GRAPH_MODES = ("reduce-overhead", "max-autotune")
# dense operations per second by the vendor's data sheet: bf16 and fp16, and TF32, which PyTorch's convolutions use
PEAKS = {
    "H200 NVL": (835e12, 418e12),
    "H200": (989.4e12, 494.7e12),
    "H100 NVL": (835e12, 418e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989.4e12, 494.7e12),
    "A100": (312e12, 156e12),
}

run_steps: Callable  # of this process, its variant's: takes the number of steps, and whether they end with a line
device: torch.device
lets_cudnn_choose: bool


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


def separate_heads(model: ssd.SSD) -> None:
    """Lets a GPU predict classes and offsets by a convolution each."""
    head.are_alike = lambda layers: False


class PooledConv(nn.Conv2d):
    """A convolution, ReLU and a max pool, that adds the bias and rectifies what the pool has left.

    The values are the same in any order, since both are monotone (with equal ones in a window the gradient may take
    another); in this one a quarter is read and written. Keeps the parameters of ``conv``.
    """

    def __init__(self, conv: nn.Conv2d, pool: nn.MaxPool2d):
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, device="meta")
        self.weight, self.bias, self.pool = conv.weight, conv.bias, pool

    def forward(self, x: Tensor) -> Tensor:
        largest = self.pool(F.conv2d(x, self.weight, None, self.stride, self.padding))
        return F.relu(largest + self.bias.to(largest.dtype).view(-1, 1, 1), inplace=True)


def pool_early(model: ssd.SSD) -> None:
    """Lets bias and ReLU of a VGG come after its first pools."""
    layers = model.backbone.features
    for i in [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]:
        layers[i - 2] = PooledConv(layers[i - 2], layers[i])
        layers[i - 1] = layers[i] = nn.Identity()


def combine_kernels(model: ssd.SSD) -> None:
    """Lets Inductor put small kernels of one kind into one launch."""
    inductor_config.combo_kernels = True


def try_all_plans(model: ssd.SSD) -> None:
    """Lets cuDNN time all its plans for a convolution instead of the ten that it holds for the best."""
    torch.backends.cudnn.benchmark_limit = 0


def leave(model: ssd.SSD) -> None:
    """Leaves all as it is."""


LEVERS = {
    "none": leave,
    "separate-heads": separate_heads,
    "pooled-convs": pool_early,
    "combo-kernels": combine_kernels,
    "benchmark-limit-0": try_all_plans,
}


def make_ours(
    log_dir: str, model_name: str, batch_size: int, amp: str | None, compile_mode: str | None, lever: str
) -> Callable[[int], None]:
    """Runs ``train.train_one_epoch`` for a number of steps."""
    args = train.parse_args(["--model", model_name, "--weights-backbone", "none", "--lr", str(LR)])
    model = train.make_model(args, device, NUM_CLASSES)
    LEVERS[lever](model)
    preset = presets.DetectionPresetTrain(data_augmentation="ssd", size=model.size)
    optimizer = train.make_optimizer(args, model)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    state = TrainingState(model, optimizer, LambdaLR(optimizer, lambda step: 1.0), scaler, steps_per_epoch=10**9)
    batch_losses = train.BatchLosses(model, preset, execution.make_autocast(device, amp))
    if compile_mode is not None:
        execution.compile_whole(batch_losses, compile_mode)
    batch = utils.to_device(make_batch(preset, batch_size), device)
    log = RunLog(Path(log_dir) / str(os.getpid()))
    divergence = Divergence(Path(log_dir))

    def run(num_steps: int, with_line: bool = True) -> None:
        batches = (batch | {"fault": []} for _ in range(num_steps))
        last_step = num_steps if with_line else num_steps + 1
        step_log = StepLog(
            log=log,
            epoch=0,
            first_step=0,
            last_step=last_step,
            global_step=0,
            images_per_step=1,
            print_freq=20,
            seconds_left=lambda: 0.0,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            train.train_one_epoch(
                state,
                batch_losses,
                batches,
                step_log,
                check_finite=lambda *step: (divergence.add(0, step[0], step_log.names, *step[1:]), divergence.vote()),
                after_step=lambda: None,
            )

    return run


def make_peer(batch_size: int, amp: bool) -> Callable[[int], None]:
    """Runs the references' step, on images that already have the network's size."""
    model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=NUM_CLASSES).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=5e-4)
    scaler = torchvision_training.make_scaler(device, amp)
    preset = presets.DetectionPresetTrain(data_augmentation="ssd", size=300)
    batch = utils.to_device(make_batch(preset, batch_size), device)
    images = list(batch["image"].float() / 255)
    targets = [
        {"boxes": boxes[:BOXES_PER_IMAGE], "labels": labels[:BOXES_PER_IMAGE]}
        for boxes, labels in zip(*coco_utils.split_objects(batch["objects"]), strict=True)
    ]

    def run(num_steps: int, with_line: bool = True) -> None:
        for _ in range(num_steps):
            torchvision_training.take_step(model, optimizer, scaler, amp, images, targets)

    return run


def start(kind: str, device_name: str, records_graphs: bool, *settings) -> None:
    """Makes the variant, and compiles it, beside others that do.

    Meanwhile cuDNN must not choose its plans, as the others would distort its timings; and a CUDA graph, whose plans
    are chosen before it is recorded, must wait for ``warm_up`` altogether. The references never let cuDNN choose.
    """
    global run_steps, device, lets_cudnn_choose
    lets_cudnn_choose = kind == "ours"
    device = utils.init_distributed(device_name, timeout=1800)
    torch.manual_seed(0)
    run_steps = {"ours": make_ours, "peer": make_peer}[kind](*settings)
    if not records_graphs:
        # it remembers plans by this flag too, which half precision does not heed: warm_up begins without any
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
            run_steps(1)
        free_memory()


def warm_up(num_steps: int) -> None:
    """Alone."""
    torch.backends.cudnn.benchmark = lets_cudnn_choose
    run_steps(num_steps)
    free_memory()


def free_memory() -> None:
    """Leaves the GPU's memory to the other variants' processes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def settle() -> None:
    """Gets back the memory that was left to others, and waits until all is done."""
    if device.type == "cuda":
        run_steps(STEPS_TO_ALLOCATE)
        torch.cuda.synchronize()


def measure(num_steps: int) -> dict[str, float]:
    """Seconds of a step, and the most memory so far."""
    settle()
    begin = time.perf_counter()
    run_steps(num_steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    result = {"seconds": (time.perf_counter() - begin) / num_steps, "MiB": run_log.max_memory()}
    free_memory()
    return result


def count_waits(num_steps: int) -> float:
    """Synchronisations of host and GPU per step, by PyTorch's own detector; of ours between two lines of the log."""
    settle()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run_steps(num_steps, with_line=False)
        torch.cuda.set_sync_debug_mode("default")
    free_memory()
    return sum("called a synchronizing" in str(warning.message) for warning in caught) / num_steps


def profile_steps(num_steps: int) -> dict:
    """See ``device_profile.summary``."""
    settle()
    return device_profile.profiled(run_steps, num_steps, on_gpu=device.type == "cuda")


def count_flops(model_name: str) -> int:
    """Floating-point operations of a training step per image, without computing anything."""
    model = ssd.get_model(model_name, weights_backbone=None, num_classes=NUM_CLASSES).to("meta").train()
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
    """name -> the arguments of ``start``. What is compiled is in half precision, unless no such is asked for."""
    variants = {}
    for precision, mode, lever in itertools.product(args.precision, args.modes, args.levers):
        if mode != "eager" and precision == "fp32" and args.precision != ["fp32"]:
            continue
        name = f"ours {precision} {mode}" + (f" + {lever}" if lever != "none" else "")
        amp, compile_mode = (None if text in ("fp32", "eager") else text for text in (precision, mode))
        settings = (log_dir, args.model, batch_size, amp, compile_mode, lever)
        variants[name] = ("ours", args.device, mode in GRAPH_MODES, *settings)
    for precision in args.peer:
        variants[f"peer {precision}"] = ("peer", args.device, False, batch_size, precision == "amp")
    return variants


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=ssd.list_models(), default="ssd300_vgg16")
    parser.add_argument("--batch-size", type=flags.positive, nargs="+", default=[32])
    parser.add_argument("--precision", nargs="+", choices=["fp32", *execution.AMP_DTYPES], default=["fp32"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager"])
    parser.add_argument(
        "--levers", nargs="+", choices=list(LEVERS), default=["none"], help="measure with each of these"
    )
    parser.add_argument(
        "--peer", nargs="*", choices=["fp32", "amp"], help="measure torchvision's ssd300_vgg16 too (default: fp32)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=flags.positive, help="timed steps of a round (default: 50, on a CPU 1)")
    parser.add_argument("--warm-up", type=flags.positive, help="steps before (default: 15, on a CPU 1)")
    parser.add_argument("--rounds", type=flags.positive, default=3)
    parser.add_argument("--at-once", type=flags.positive, default=1, help="variants that start beside each other")
    parser.add_argument(
        "--profile",
        type=flags.positive,
        nargs="?",
        const=10,
        metavar="STEPS",
        help="what the device does in so many steps of the last precision and mode",
    )
    args = parser.parse_args()
    args.peer = [] if args.peer is None else args.peer or ["fp32"]
    if args.peer and args.model != "ssd300_vgg16":
        parser.error("--peer is ssd300_vgg16; leave out --model")
    on_gpu = args.device == "cuda"
    args.steps = args.steps or (50 if on_gpu else 1)
    args.warm_up = args.warm_up or (15 if on_gpu else 1)
    return args


def rows_of(variants: Variants, args: argparse.Namespace, batch_size: int, flops: int, gpu: str) -> dict[str, dict]:
    """Of each variant the medians of what ``measure`` found, and what follows from them."""
    names = [name for size, name in variants.pools if size == batch_size]
    keys = [(batch_size, name) for name in names]
    measured = variants.take_turns(partial(measure, args.steps), args.rounds, keys)
    waits = variants.take_turns(partial(count_waits, STEPS_TO_COUNT_WAITS), 1 if gpu else 0, keys)
    rows = {}
    for key, name in zip(keys, names, strict=True):
        row = {column: statistics.median(one[column] for one in measured[key]) for column in measured[key][0]}
        row["images/s"] = batch_size / row["seconds"]
        peak = peak_of(gpu, is_half=name.split()[1] != "fp32")
        if peak:
            row["MFU"] = row["images/s"] * flops / peak
        for number in waits[key]:
            row["waits"] = number
        rows[name] = row
    return rows


def ratios_of(rows: dict[str, dict]) -> dict[str, float]:
    """How many times as fast each variant of ours is as each of the peer's."""
    return {
        f"{one} / {other}": rows[one]["images/s"] / rows[other]["images/s"]
        for one, other in itertools.product(rows, rows)
        if one.startswith("ours") and other.startswith("peer")
    }


def print_rows(batch_size: int, rows: dict[str, dict], ratios: dict[str, float]) -> None:
    for name, row in rows.items():
        figures = "  ".join(f"{key} {value:.4g}" for key, value in row.items())
        print(f"batch {batch_size:4}  {name:40} {figures}")
    for name, ratio in ratios.items():
        print(f"batch {batch_size:4}  {name:60} {ratio:.2f}")


def measure_all(args: argparse.Namespace, variants: Variants, report: dict, gpu: str) -> None:
    """Adds to the report what is found at each batch size, and prints it with all that is known."""
    variants.take_turns(partial(warm_up, args.warm_up))
    for batch_size in args.batch_size:
        rows = rows_of(variants, args, batch_size, report["flops"], gpu)
        ratios = ratios_of(rows)
        report["batches"][batch_size] = {"variants": rows, "ratios": ratios}
        print_rows(batch_size, rows, ratios)
        print(json.dumps(report), flush=True)
    # of one variant: to read the profile of a step of the peer takes longer than all else
    name = f"ours {args.precision[-1]} {args.modes[-1]}"
    for key in variants.pools if args.profile else ():
        if key[1] == name:
            (found,) = variants.take_turns(partial(profile_steps, args.profile), 1, [key])[key]
            report["batches"][key[0]]["profile"] = found
            if found:  # the profiler takes time of the host's, which a step that it does not watch has for its gaps
                seconds = report["batches"][key[0]]["variants"][name]["seconds"]
                found["busy_share_unwatched"] = found["busy_ms_per_step"] / (1000 * seconds)
            print(f"{name}, batch {key[0]}\n{device_profile.as_text(found)}\n{json.dumps(report)}", flush=True)


def main() -> None:
    args = get_args()
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else ""
    processor = gpu or f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    flops = count_flops(args.model)
    print(f"{args.model} on {processor}, torch {torch.__version__}: {flops / 1e9:.1f} GFLOP an image", flush=True)
    report = {"model": args.model, "device": processor, "torch": torch.__version__, "flops": flops, "batches": {}}
    with tempfile.TemporaryDirectory() as log_dir:
        all_variants = {
            (batch_size, name): arguments
            for batch_size in args.batch_size
            for name, arguments in list_variants(args, batch_size, log_dir).items()
        }
        with Variants(start, all_variants, args.at_once) as variants:
            report["failed"] = [f"batch {batch_size}, {name}" for batch_size, name in variants.failed]
            measure_all(args, variants, report, gpu)
    print(json.dumps(report))
    sys.exit(bool(report["failed"]))


if __name__ == "__main__":
    main()
