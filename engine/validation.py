"""Evaluation within a training run: detection between two epochs, all that needs no model beside the next one."""

import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import utils
from coco import scoring
from coco_utils import CocoEvalDataset, CocoTrainDataset
from view import html_report, reports

from . import inference
from .inference import Inference
from .json_lines import read_records
from .run_log import RunLog
from .training_state import TrainingState, copy_to_host

NUM_PICTURES = 8


@dataclass
class Pending:
    """An evaluation whose scores are not known yet."""

    step: int
    checkpoint: dict  # of the model that was evaluated, in the memory of the host
    report: Future


class Validation:
    """Evaluates a model in training, or the average of its weights, and keeps the best.

    A checkpoint that says that a step was evaluated must be right, so ``settle`` comes before any is saved.

    Args:
        state: what is trained.
        dataset: the validation set.
        infer: ``inference.infer`` with its settings.
        log: of the run.
        output_dir: where the pictures and the report go.
        save_best: writes a training state to best.pth.
        training_set: for the report.
        flags: for the report, by their names in Python.
    """

    def __init__(
        self,
        state: TrainingState,
        dataset: CocoEvalDataset,
        infer: Callable[..., Inference | None],
        log: RunLog,
        output_dir: Path,
        save_best: Callable[[dict], None],
        training_set: CocoTrainDataset,
        flags: dict,
    ):
        self.state = state
        self.dataset = dataset
        self.annotations = dataset.annotations
        self.infer = infer
        self.log = log
        self.output_dir = output_dir
        self.save_best = save_best
        self.training_set = training_set
        self.flags = flags
        self.thread = ThreadPoolExecutor(1)
        self.pending: Pending | None = None

    def begin(self, after_batch: Callable[[], None] = lambda: None) -> None:
        """Detects on the validation set; the main process goes on to score in another thread.

        What ``after_batch``, which is called after each batch, raises, ends it as if it had not begun.
        """
        assert self.pending is None
        state, model = self.state, self.state.evaluated_model
        utils.broadcast_buffers(model)
        found = self.infer(model, self.dataset, self.annotations.category_id_of, after_batch=after_batch)
        state.evaluated_step = state.global_step
        if found is not None:
            report = self.thread.submit(self.report, found, state.global_step)
            self.pending = Pending(state.global_step, copy_to_host(state.state_dict()), report)

    def report(self, found: Inference, step: int) -> tuple[str, dict]:
        """Scores and draws what was found. Returns what to print and the numbers to log."""
        start = time.perf_counter()
        scores = inference.score(self.annotations, found, "hotcoco")
        seconds = time.perf_counter() - start
        numbers = numbers_of(found, scores.metrics, seconds)
        try:
            self.show(found, scores, step, numbers)
        except OSError:  # as of a full disk, which will not take checkpoints either
            raise
        except Exception:  # what is only to be looked at must not cost what was trained
            self.log.info(
                f"The pictures and the report of this evaluation could not be made:\n{traceback.format_exc()}"
            )
        return inference.describe(found, scores.metrics, seconds), numbers

    def show(self, found: Inference, scores: scoring.Scores, step: int, numbers: dict) -> None:
        """What a person looks at, as files and in TensorBoard."""
        annotations = self.annotations
        diagnosis = scoring.diagnose(annotations, found.detections)
        worst = reports.draw_worst(annotations, self.dataset.images_dir, diagnosis)
        rows = reports.choose_images(annotations, diagnosis, NUM_PICTURES, "first")
        drawn = dict(reports.draw_images(annotations, self.dataset.images_dir, diagnosis, rows, worst))
        charts = reports.draw_charts(annotations, scores, diagnosis)
        reports.write_pictures(self.output_dir, (drawn | charts).items())
        for name, picture in drawn.items():
            self.log.image(f"detections/{name}", picture, step)
        for name, chart in charts.items():
            self.log.image(f"charts/{name}", chart, step)
        self.log.text("classes", scoring.format_class_table(scores.metrics, at_most=len(annotations.categories)), step)
        self.log.curve("precision_recall_at_IoU_0.50", step, **reports.count_by_threshold(annotations, diagnosis))
        epochs = step / self.state.steps_per_epoch
        # its own numbers are logged later
        records = [*read_records(self.log.path), {"kind": "val", "step": step, **numbers}]
        curve = {"learning_curve": reports.draw_learning_curve(records, self.state.steps_per_epoch)}
        html_report.write(
            self.output_dir,
            title=f"{self.flags['model']} after {epochs:,.2f}".rstrip("0").rstrip(".") + " epochs",
            facts=self.facts(step),
            warnings=inference.warnings(found, scores.metrics),
            metrics=scores.metrics,
            charts=charts | curve,
            worst=worst.values(),
            data={"training": self.training_set.annotations, "validation": annotations},
            flags=self.flags,
        )

    def facts(self, step: int) -> Iterator[str]:
        """What a report says of the model, a line each."""
        training_set = self.training_set
        yield f"{step:,} steps, in {self.output_dir}"
        yield f"trained on {len(training_set):,} images with {training_set.num_boxes:,} boxes"
        yield f"evaluated on {self.annotations.path}"
        if self.state.ema is not None:
            yield "evaluated is the moving average of the weights"

    def settle(self, wait: bool = True) -> None:
        """Logs the scores of the last evaluation, and saves its model if it is the best.

        Args:
            wait: for the scores; else nothing is done while they are not known.
        """
        if self.pending is None or not (wait or self.pending.report.done()):
            return
        pending, self.pending = self.pending, None
        text, numbers = pending.report.result()
        epoch = (pending.step - 1) // self.state.steps_per_epoch
        self.log.info(f"Evaluation in epoch {epoch}\n{text}")
        self.log.metrics("val", pending.step, numbers, epoch=epoch)
        ap = numbers["AP"]
        if ap is not None and ap > self.state.best_ap:
            self.state.best_ap = ap
            self.save_best(pending.checkpoint | {"best_ap": ap})


def numbers_of(found: Inference, metrics: dict, seconds: float) -> dict[str, float | None]:
    """Those of an evaluation, scored in ``seconds``, that are logged."""
    num_images = len(found.image_ids)
    rates = {"images/s": num_images / found.seconds, "images scored/s": num_images / seconds}
    numbers = {name: metrics[name] for name in scoring.METRICS} | metrics.get("loss", {}) | rates
    if "VOC" in metrics:
        numbers |= {f"VOC {name}": metrics["VOC"][name] for name in ("AP11", "AP")}
    return numbers
