"""What a run needs around model and data: processes, errors in one line, and its log.

The only room that knows ranks and process groups. Work for the main process alone is a no-op on the others.
"""

import contextlib
import datetime
import functools
import inspect
import json
import math
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy import ndarray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parent


def init_distributed(device: str | None) -> torch.device:
    """Joins the process group if torchrun started this process, and returns the device to work on.

    NCCL connects GPUs, gloo CPUs.

    Args:
        device: ``cuda``, ``cpu`` or None, which takes the GPU if there is one.

    Raises:
        ValueError: ``cuda`` was asked for, and there is none.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    if device.type == "cuda":
        if started_by_torchrun() or device.index is None:
            device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    if started_by_torchrun():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def cleanup_distributed() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def started_by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_rank() -> int:
    """Which process of its machine this one is."""
    return int(os.environ.get("LOCAL_RANK", 0)) if started_by_torchrun() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def print_on_main(text: str) -> None:
    if is_main():
        print(text, flush=True)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Runs the block on the first process of each machine, then on the others, also where it fails there."""
    if local_rank() > 0:
        barrier()
    try:
        yield
    finally:
        if local_rank() == 0:
            barrier()


def gather(value) -> list:
    """Each process's ``value``, in rank order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first_of_machine(make: Callable):
    """What ``make`` returns on the first process of each machine, for all processes of that machine."""
    if not dist.is_initialized():
        return make()
    values = [None] * world_size()
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))  # ``make`` may take long
    dist.all_gather_object(values, make() if local_rank() == 0 else None, group)
    dist.destroy_process_group(group)
    return values[rank() - local_rank()]


def gather_to_main(value) -> list | None:
    """Each process's ``value`` in rank order on the main process, None on the others. Goes through CPU memory."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if is_main() else None
    group = dist.new_group(backend="gloo")
    dist.gather_object(value, values, dst=0, group=group)
    dist.destroy_process_group(group)
    return values


def distribute(model: nn.Module) -> nn.Module:
    """``model`` as it is to be called in training: with gradients averaged over the processes, if there are several."""
    if not dist.is_initialized():
        return model
    # Buffers need not be equal in every step: ``broadcast_buffers`` sees to them before they matter.
    is_new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    settings = {"forward_sync_buffers" if is_new else "broadcast_buffers": False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **settings)


def averaging_gradients(forward: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
    """Where backward passes average the gradients over the processes; if not ``enabled``, a later one will."""
    return contextlib.nullcontext() if enabled or not dist.is_initialized() else forward.no_sync()


def broadcast_buffers(model: nn.Module) -> None:
    """Gives every process the main one's buffers. Batch norm's differ between them: each has seen its own batches."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def mean_over_processes(values: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= world_size()
    return values


def all_agree(value: int) -> bool:
    """Whether ``value`` is the same in every process."""
    if not dist.is_initialized():
        return True
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    extremes = torch.tensor([value, -value], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    return extremes[0].item() == -extremes[1].item()


def to_device(batch: dict, device: torch.device) -> dict:
    """Moves the tensors of a (nested) batch without waiting for the copies."""
    return {
        key: to_device(value, device) if isinstance(value, dict) else value.to(device, non_blocking=True)
        for key, value in batch.items()
    }


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU for copies; always the same one, since each has a pool of memory for itself."""
    return torch.cuda.Stream(device)


def moved_batches(batches: Iterable[dict], device: torch.device) -> Iterator[dict]:
    """Moves each batch to ``device``.

    To a GPU a stream of its own copies them, while the steps that the host has queued before are still computed.
    """
    if device.type != "cuda":
        for batch in batches:
            yield to_device(batch, device)
        return
    copies, computation = copy_stream(device), torch.cuda.current_stream(device)
    for batch in batches:
        with torch.cuda.stream(copies):
            batch = to_device(batch, device)
        computation.wait_stream(copies)
        for tensor in tensors_of(batch):
            tensor.record_stream(computation)  # or its memory would be free for the next copy as soon as it is deleted
        yield batch


def tensors_of(batch: dict) -> Iterator[Tensor]:
    """The tensors of a (nested) batch."""
    for value in batch.values():
        if isinstance(value, dict):
            yield from tensors_of(value)
        else:
            yield value


def max_memory() -> float:
    """Most memory in use so far in MiB: of the GPU where one is used, else of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the script with one line for an error that was raised for the user; any other keeps its traceback.

    Errors for the user are ``ValueError`` and ``FloatingPointError`` where this repository raises or defines them.
    """
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raised_in = last.filename if last.line.startswith("raise ") else None  # not by a built-in that we called
        defined_in = getattr(sys.modules[type(error).__module__], "__file__", None)
        if not any(path and Path(path).resolve().parent in (ROOT, ROOT / "ssd") for path in (raised_in, defined_in)):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


class LiveLine:
    """A line on a terminal that each ``show`` overwrites; writes nothing where the output goes to a file."""

    def __init__(self):
        self.is_shown = False

    def show(self, text: str) -> None:
        if sys.stdout.isatty():
            self.is_shown = True
            print("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)

    def clear(self) -> None:
        if self.is_shown:
            print("\r\x1b[K", end="")
            self.is_shown = False


def bar(done: int, total: int, width: int = 20) -> str:
    filled = width * done // total
    return f"{done:6}/{total} [{'#' * filled}{'.' * (width - filled)}]"


class RunLog:
    """Console, ``metrics.jsonl`` and TensorBoard of a run, in ``output_dir``; silent except on the main process."""

    def __init__(self, output_dir: Path, last_steps: dict[str, int] | None = None):
        """Begins a log, or continues it: what was logged of a kind after its step in ``last_steps`` is dropped."""
        self.enabled = is_main()
        self.live_line = LiveLine()
        self.faults: set[str] = set()  # what was wrong with samples that were skipped
        self.num_skipped = 0  # samples, of all processes
        if self.enabled:
            # imported here, for it takes seconds, and only the main process writes
            from torch.utils.tensorboard import SummaryWriter

            output_dir.mkdir(parents=True, exist_ok=True)
            path = output_dir / "metrics.jsonl"
            for record in keep_earlier_records(path, last_steps or {}):
                if record["kind"] == "skipped":
                    self.num_skipped = record["samples"]
                    self.faults |= set(record["faults"])
            self.json_lines = open(path, "a")  # noqa: SIM115
            last_step = max((last_steps or {}).values(), default=0)
            self.tensorboard = SummaryWriter(str(output_dir), purge_step=last_step + 1 if last_step else None)

    def info(self, text: str) -> None:
        if self.enabled:
            self.live_line.clear()
            print(text, flush=True)

    def live(self, text: str) -> None:
        if self.enabled:
            self.live_line.show(text)

    def skipped(self, faults: list[str], step: int) -> None:
        """Counts samples that were skipped, and reports each fault when it is first met."""
        if not faults:
            return
        self.num_skipped += len(faults)
        new = sorted(set(faults) - self.faults)
        self.faults |= set(new)
        for fault in new:
            self.info(f"Skipped {fault}")
        if self.enabled:
            record = {"kind": "skipped", "step": step, "samples": self.num_skipped, "faults": new}
            print(json.dumps(record), file=self.json_lines, flush=True)

    def metrics(self, kind: str, step: int, values: dict[str, float | None], **context) -> None:
        """Logs the numbers of one moment as a line of json and as TensorBoard scalars ``kind/name``."""
        if not self.enabled:
            return
        print(json.dumps({"kind": kind, **context, "step": step, **values}), file=self.json_lines, flush=True)
        for name, value in values.items():
            if value is not None:
                self.tensorboard.add_scalar(f"{kind}/{name}", value, step)
        self.tensorboard.flush()

    def image(self, tag: str, image: Tensor, step: int) -> None:
        """Logs a uint8 image [3, H, W] to TensorBoard."""
        if self.enabled:
            self.tensorboard.add_image(tag, image, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Logs text with the line breaks and columns that it has to TensorBoard."""
        if self.enabled:
            self.tensorboard.add_text(tag, f"```\n{text}\n```", step)

    def curve(self, tag: str, step: int, *, right: ndarray, false: ndarray, missed: ndarray) -> None:
        """Logs precision and recall to TensorBoard, from counts for score thresholds that rise evenly from 0 to 1."""
        if self.enabled:
            detections, objects = right + false, right + missed
            precision, recall = (right / np.maximum(total, 1) for total in (detections, objects))
            counts = (right, false, np.zeros_like(right), missed)
            self.tensorboard.add_pr_curve_raw(tag, *counts, precision, recall, step, num_thresholds=len(right))

    def close(self) -> None:
        if self.enabled:
            self.live_line.clear()
            self.json_lines.close()
            self.tensorboard.close()


def keep_earlier_records(path: Path, last_steps: dict[str, int]) -> list[dict]:
    """Keeps the lines of metrics.jsonl up to the last step of their kind; a line cut short by a crash goes too.

    Returns:
        What those lines hold.
    """
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if record["step"] <= last_steps.get(record["kind"], 0):
                kept.append(record)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(temporary, path)
    return kept


@dataclass(kw_only=True)
class StepLog:
    """Progress of one epoch: a line every ``print_freq`` steps, and a live bar on a terminal.

    Losses stay on the device until a line is due, because reading one makes the host wait for the device.
    """

    log: RunLog
    epoch: int
    first_step: int  # the steps of ``epoch`` that are run
    last_step: int
    global_step: int  # steps before this one, in all epochs
    images_per_step: int  # of all processes
    print_freq: int

    def __post_init__(self):
        self.step = self.first_step
        self.totals: dict[str, float] = {}
        self.last_line = "starting"
        self.start_window()

    def start_window(self) -> None:
        """Begins to gather for the next line."""
        self.window_start = time.perf_counter()
        self.window_steps = 0
        self.window_batches = 0
        self.window_losses: Tensor | float = 0.0  # sums, in the order of self.names
        self.window_faults: list[str] = []
        self.wait_time = 0.0

    def watch(self, loader: Iterable) -> Iterator:
        """Yields from ``loader``; measures how long it makes the training wait, and keeps what it had to skip."""
        iterator = iter(loader)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.wait_time += time.perf_counter() - start
            self.window_faults += filter(None, batch.pop("fault"))
            yield batch

    def add(self, losses: dict[str, Tensor]) -> None:
        """Takes the losses of a batch, the same in each."""
        self.names = list(losses)
        self.window_batches += 1
        self.window_losses = self.window_losses + torch.stack([loss.detach() for loss in losses.values()])

    def update(self, lr: float) -> None:
        """Takes note of a step, and writes a line if one is due."""
        self.step += 1
        self.global_step += 1
        self.window_steps += 1
        if self.window_steps == self.print_freq or self.step == self.last_step:
            self.write_line(lr)
        self.log.live(f"{bar(self.step, self.last_step)} {self.last_line}")

    def before_checkpoint(self) -> None:
        """Raises FloatingPointError, on all processes alike, if a loss since the last line is not finite.

        Reports what was skipped since, as a run that continues from the checkpoint will not.
        """
        if self.window_steps > 0:
            self.read_losses()
            self.report_skipped()

    def report_skipped(self) -> None:
        self.log.skipped([fault for faults in gather(self.window_faults) for fault in faults], self.global_step)
        self.window_faults = []

    def read_losses(self) -> dict[str, float]:
        """Means of the losses since the last line, over batches and processes."""
        means = mean_over_processes(self.window_losses / self.window_batches).tolist()
        means = dict(zip(self.names, means, strict=True))
        for name, value in means.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss {name} is {value} in epoch {self.epoch}, in the {self.window_steps} steps before step "
                    f"{self.step}; nothing was saved since. Lower --lr, or check the boxes of the training data"
                )
        return means

    def write_line(self, lr: float) -> None:
        means = self.read_losses()
        seconds = (time.perf_counter() - self.window_start) / self.window_steps
        for name, value in means.items():
            self.totals[name] = self.totals.get(name, 0.0) + value * self.window_steps
        rates = {"lr": lr, "images/s": self.images_per_step / seconds, "time": seconds}
        rates["data"] = self.wait_time / self.window_steps
        rates["max mem"] = max_memory()
        self.report_skipped()
        if self.log.num_skipped:
            rates["skipped"] = self.log.num_skipped
        eta = datetime.timedelta(seconds=round(seconds * (self.last_step - self.step)))
        done = self.step - self.first_step
        losses = "  ".join(f"{name}: {value:.4f} ({self.totals[name] / done:.4f})" for name, value in means.items())
        width = len(str(self.last_step))
        self.last_line = (
            f"Epoch: [{self.epoch}]  [{self.step:{width}}/{self.last_step}]  eta: {eta}  lr: {lr:.6f}  {losses}  "
            + "  ".join(f"{name}: {value:.4g}" for name, value in rates.items() if name != "lr")
        )
        self.log.info(self.last_line)
        self.log.metrics("train", self.global_step, means | rates, epoch=self.epoch)
        self.start_window()
