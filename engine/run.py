"""When a run evaluates, saves and ends. How a step is made it does not know."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

import utils

from .checkpoints import Checkpoints
from .failures import Interrupted
from .run_log import StepLog
from .stopping import Stopping
from .training_state import TrainingState
from .validation import Validation


@dataclass
class Run:
    """A run from where its state is to its last step, or to where it is stopped."""

    state: TrainingState
    last_step: int
    eval_freq: int  # epochs between evaluations; 0 for none
    checkpoint_freq: int  # steps between checkpoints, beside those after each epoch; 0 for none
    validation: Validation
    checkpoints: Checkpoints
    stopping: Stopping
    step_log: StepLog | None = None  # of the epoch that it is in

    def __post_init__(self):
        self.begin = time.perf_counter()
        self.first_step = self.state.global_step

    @contextlib.contextmanager
    def saved_if_stopped(self) -> Iterator[None]:
        """Where a run may be stopped from outside: its state is saved, and the error says so.

        Raises:
            Interrupted: a process was asked to stop.
        """
        try:
            self.stopping.stop_if_asked(wait=True)
            yield
        except Interrupted as reason:
            self.save()
            text = f"{reason}; everything is saved after {self.state.global_step} steps, go on with --resume auto"
            raise utils.common(Interrupted(text)) from None

    @property
    def is_complete(self) -> bool:
        return self.state.global_step >= self.last_step

    def seconds_left(self) -> float:
        """Until the last step at the pace so far, evaluations included; call it after a step."""
        step = self.state.global_step
        return (time.perf_counter() - self.begin) / (step - self.first_step) * (self.last_step - step)

    def evaluate_if_due(self) -> None:
        """Evaluates after every ``eval_freq`` epochs and after the last step, unless that is done."""
        step, steps_per_epoch = self.state.global_step, self.state.steps_per_epoch
        if self.eval_freq == 0 or self.state.evaluated_step == step:
            return
        if self.is_complete or step % (steps_per_epoch * self.eval_freq) == 0:
            self.validation.begin(after_batch=self.stopping.stop_if_asked)

    def check_numbers(self, batches: list[dict], losses: list[Tensor], gradient_norm: Tensor) -> None:
        """Ends the run on all processes if a number of the step, or of one before, is not finite.

        Those that the device has not computed yet are waited for only where a line, which shows them, is due.
        """
        self.stopping.divergence.add(self.state.global_step, batches, self.step_log.names, losses, gradient_norm)
        self.stopping.stop_if_asked(wait=self.step_log.line_is_due)

    def after_step(self) -> None:
        self.validation.settle(wait=False)
        if self.checkpoint_freq and self.state.global_step % self.checkpoint_freq == 0:
            self.save()

    def save(self) -> None:
        """Saves the latest checkpoint, once it is certain that nothing in it is wrong and nothing amiss.

        After an epoch it draws the learning curve too.
        """
        self.stopping.stop_if_not_finite()
        if self.step_log is not None:
            self.step_log.report_skipped()
        self.validation.settle()
        step, steps_per_epoch = self.state.global_step, self.state.steps_per_epoch
        is_new = self.checkpoints.save(self.state)
        if is_new and step > 0 and (self.is_complete or step % steps_per_epoch == 0):
            utils.run_on_main(lambda: self.validation.log.draw_learning_curve(steps_per_epoch))
