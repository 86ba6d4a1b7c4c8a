"""The log of a run: console, ``metrics.jsonl`` and TensorBoard."""

import json
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

import utils
from view import reports

from .json_lines import add_records, read_records, write_records
from .progress import LiveLine, as_time, bar


class RunLog:
    """Console, ``metrics.jsonl`` and TensorBoard of a run, in ``output_dir``; silent except on the main process."""

    def __init__(self, output_dir: Path, last_steps: dict[str, int] | None = None):
        """Begins a log, or continues it: what was logged of a kind after its step in ``last_steps`` is dropped."""
        self.enabled = utils.is_main()
        self.output_dir = output_dir
        self.path = output_dir / "metrics.jsonl"
        self.live_line = LiveLine()
        self.faults: set[str] = set()  # what was wrong with samples that were skipped
        self.num_skipped = 0  # samples, of all processes
        if self.enabled:
            # imported here, for it takes seconds, and only the main process writes
            from torch.utils.tensorboard import SummaryWriter

            output_dir.mkdir(parents=True, exist_ok=True)
            for record in keep_earlier_records(self.path, last_steps or {}):
                if record["kind"] == "skipped":
                    self.num_skipped = record["samples"]
                    self.faults |= set(record["faults"])
            last_step = max((last_steps or {}).values(), default=0)
            self.tensorboard = SummaryWriter(str(output_dir), purge_step=last_step + 1 if last_step else None)

    def begin(self, lines: Iterable[str], flags: dict) -> None:
        """Says ``lines``, and writes the flags to args.json."""
        for line in lines:
            self.info(line)
        if self.enabled:
            (self.output_dir / "args.json").write_text(json.dumps(flags, indent=2) + "\n")

    def info(self, text: str) -> None:
        if self.enabled:
            self.live_line.clear()
            print(text, flush=True)

    def record(self, record: dict) -> None:
        """Adds a line to metrics.jsonl."""
        add_records(self.path, [record])

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
            self.record({"kind": "skipped", "step": step, "samples": self.num_skipped, "faults": new})

    def metrics(self, kind: str, step: int, values: dict[str, float | None], **context) -> None:
        """Logs the numbers of one moment as a line of json and as TensorBoard scalars ``kind/name``."""
        if not self.enabled:
            return
        self.record({"kind": kind, **context, "step": step, **values})
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

    def draw_learning_curve(self, steps_per_epoch: int) -> None:
        """Draws what is logged so far to pictures/learning_curve.png; on the main process only."""
        reports.write_learning_curve(self.output_dir, [*read_records(self.path)], steps_per_epoch)

    def finish(self, text: str) -> None:
        """Says what was skipped in all, then ``text``, and closes the log."""
        if self.num_skipped:
            self.info(f"Skipped {self.num_skipped} samples, whose images could not be read")
        self.info(text)
        self.close()

    def close(self) -> None:
        if self.enabled:
            self.live_line.clear()
            self.tensorboard.close()


def keep_earlier_records(path: Path, last_steps: dict[str, int]) -> list[dict]:
    """Keeps the lines of metrics.jsonl up to the last step of their kind; a line cut short by a crash goes too.

    Returns:
        What those lines hold.
    """
    kept = [record for record in read_records(path) if record["step"] <= last_steps.get(record["kind"], 0)]
    write_records(path, kept)
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
    seconds_left: Callable[[], float]  # of the whole run

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

    def add(self, losses: dict[str, Tensor]) -> Tensor:
        """Takes the losses of a batch, the same in each, and returns a copy of them, in the order of ``names``."""
        self.names = list(losses)
        self.window_batches += 1
        values = torch.stack([loss.detach() for loss in losses.values()])
        self.window_losses = self.window_losses + values
        return values

    @property
    def line_is_due(self) -> bool:
        """Whether the next step ends with a line."""
        return self.window_steps + 1 == self.print_freq or self.step + 1 == self.last_step

    def update(self, lr: float, overflows: int = 0) -> None:
        """Takes note of a step, and writes a line if one is due.

        Args:
            lr: learning rate of the step.
            overflows: how many steps of the run fp16 has skipped.
        """
        line_is_due = self.line_is_due
        self.step += 1
        self.global_step += 1
        self.window_steps += 1
        if line_is_due:
            self.write_line(lr, overflows)
        self.log.live(f"{bar(self.step, self.last_step)} {self.last_line}")

    def report_skipped(self) -> None:
        """Reports what was skipped since the last line, which a run that continues from here would not know."""
        self.log.skipped([fault for faults in utils.gather(self.window_faults) for fault in faults], self.global_step)
        self.window_faults = []

    def write_line(self, lr: float, overflows: int) -> None:
        means = utils.mean_over_processes(self.window_losses / self.window_batches).tolist()
        means = dict(zip(self.names, means, strict=True))
        seconds = (time.perf_counter() - self.window_start) / self.window_steps
        for name, value in means.items():
            self.totals[name] = self.totals.get(name, 0.0) + value * self.window_steps
        rates = {"lr": lr, "images/s": self.images_per_step / seconds, "time": seconds}
        rates["data"] = self.wait_time / self.window_steps
        rates["max mem"] = max_memory()
        self.report_skipped()
        if self.log.num_skipped:
            rates["skipped"] = self.log.num_skipped
        if overflows:
            rates["overflows"] = overflows
        eta = f"{as_time(seconds * (self.last_step - self.step))} (run: {as_time(self.seconds_left())})"
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


def max_memory() -> float:
    """Most memory in use so far in MiB: of the GPU where one is used, else of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
