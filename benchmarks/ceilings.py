"""What a device can do at most, and what the convolutions of SSD300-VGG16 make of it whose channels are odd.

    python -m benchmarks.ceilings [--convolutions] [--batch-size N] [--device cpu|cuda]

The ceilings are a product of two matrices and a copy, of random numbers. --convolutions times the forward pass and
both backward passes of the head's class predictions, as they are and with output channels up to the next multiple of 8,
and of the first convolution with 3 and with 8 channels; each with the ten plans that cuDNN tries by default, and with
all. Products are in bf16, on a CPU, where this is a rehearsal, in float32. The last line is one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.turns import in_new_process
from engine import flags

REPEATS = {"cpu": 1, "cuda": 20}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
MATRIX_SIDE = {"cpu": 512, "cuda": 8192}
COPIED_BYTES = {"cpu": 2**26, "cuda": 2**30}
# name -> input channels, output channels, side of the map
CONVOLUTIONS = {
    "classes of conv4_3": (512, 364, 38),
    "classes of conv4_3, padded": (512, 368, 38),
    "classes of fc7": (1024, 546, 19),
    "classes of fc7, padded": (1024, 552, 19),
    "conv1_1": (3, 64, 300),
    "conv1_1 of 8 channels": (8, 64, 300),
}


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one of many runs in a row, the median of three such rows, after one run to warm up."""
    run()
    times = []
    for _ in range(3):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(REPEATS[device.type]):
            run()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - begin) / REPEATS[device.type])
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def describe_machine(device: torch.device) -> dict:
    gpu = {}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {"memory_GiB": properties.total_memory / 2**30, "multiprocessors": properties.multi_processor_count}
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU ({torch.backends.cpu.get_cpu_capability()})",
        **gpu,
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "host_memory_GiB": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        "shared_memory_GiB": shutil.disk_usage("/dev/shm").free / 2**30,
    }


def measure_ceilings(device: torch.device) -> dict:
    side, size = MATRIX_SIDE[device.type], COPIED_BYTES[device.type]
    first, second = (torch.randn(side, side, device=device, dtype=DTYPES[device.type]) for _ in range(2))
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "TFLOP/s": 2 * side**3 / milliseconds(lambda: first @ second, device) / 1e9,
        "copy_GB/s_read_and_written": 2 * size / milliseconds(lambda: target.copy_(source), device) / 1e6,
    }


def passes_of(images: Tensor, weight: Tensor) -> dict[str, Callable[[], object]]:
    """Forward pass and the gradients of images and of weight."""
    gradient = F.conv2d(images, weight, padding=1)

    def backward(*wanted: bool):
        sizes = [1, 1], [1, 1], [1, 1], False, [0, 0], 1  # stride, padding, dilation; not transposed; groups
        return torch.ops.aten.convolution_backward(gradient, images, weight, None, *sizes, [*wanted, False])

    return {
        "forward": lambda: F.conv2d(images, weight, padding=1),
        "images": lambda: backward(True, False),
        "weight": lambda: backward(False, True),
    }


def measure_convolutions(device_name: str, batch_size: int, limit: int) -> dict:
    """Milliseconds of each pass, in channels last, where cuDNN tries ``limit`` plans, or with 0 all."""
    device, report = torch.device(device_name), {}
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, limit
    for name, (channels, outputs, side) in CONVOLUTIONS.items():
        images = torch.randn(batch_size, channels, side, side, device=device, dtype=DTYPES[device.type])
        weight = torch.randn(outputs, channels, 3, 3, device=device, dtype=DTYPES[device.type])
        images, weight = (one.to(memory_format=torch.channels_last) for one in (images, weight))
        times = {kind: milliseconds(run, device) for kind, run in passes_of(images, weight).items()}
        report[f"{name}, {outputs} outputs, limit {limit}"] = times
        figures = "  ".join(f"{kind} {value:.3f} ms" for kind, value in times.items())
        print(f"{name:26} {channels:5} to {outputs:4} at {side:3}, limit {limit:2}: {figures}", flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--convolutions", action="store_true", help="time these too")
    parser.add_argument("--batch-size", type=flags.positive, default=128)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    report = describe_machine(device) | measure_ceilings(device)
    for name, value in report.items():
        print(f"{name:28} {value if isinstance(value, (str, int)) else format(value, '.1f')}", flush=True)
    if args.convolutions:
        report["convolutions"] = {}
        for limit in (10, 0) if device.type == "cuda" else (10,):
            # in new processes, for a plan that was found once is kept, whatever the limit is later
            report["convolutions"] |= in_new_process(measure_convolutions, args.device, args.batch_size, limit)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
