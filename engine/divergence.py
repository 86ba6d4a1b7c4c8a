"""Numbers that are not finite: found without making the host wait for the device, and kept for study."""

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import ssd
import utils

NOT_FINITE = 1000  # as a vote; outweighs all reasons to stop with a checkpoint
MAX_PENDING = 16  # steps that the host may be ahead of the device before it waits


@dataclass
class StepNumbers:
    """The losses of the batches of a step and the norm of its gradients, on their way to the host."""

    step: int
    batches: list[dict]
    loss_names: list[str]
    values: Tensor  # on the host, once they ``arrived``: the losses of each batch in turn, then the norm
    arrived: torch.cuda.Event | None

    @property
    def have_arrived(self) -> bool:
        return self.arrived is None or self.arrived.query()

    def are_finite(self) -> bool:
        if not self.have_arrived:
            self.arrived.synchronize()
        return bool(self.values.isfinite().all())

    def losses_of_batches(self) -> list[dict[str, float]]:
        losses = self.values[:-1].view(len(self.batches), -1).tolist()
        return [dict(zip(self.loss_names, one, strict=True)) for one in losses]


class Divergence:
    """Watches the numbers of all steps of this process.

    Args:
        output_dir: where the batches of a step with a fault are written.
    """

    def __init__(self, output_dir: Path):
        self.output_dir = output_dir
        self.pending: deque[StepNumbers] = deque()
        self.free_rows: list[Tensor] = []  # of the host's memory, for the numbers of one step each
        self.found: StepNumbers | None = None

    def add(
        self, step: int, batches: list[dict], loss_names: list[str], losses: list[Tensor], gradient_norm: Tensor
    ) -> None:
        """Takes the batches of a step with the losses of each, and the norm of its gradients."""
        values = torch.cat([*losses, gradient_norm.view(1)])
        if not self.free_rows:
            # For many steps at once: to get pinned memory, the host may have to wait for the device.
            rows = torch.empty(MAX_PENDING + 1, len(values), pin_memory=values.is_cuda)
            self.free_rows += rows.unbind()
        on_host = self.free_rows.pop().copy_(values, non_blocking=True)
        arrived = None
        if values.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self.pending.append(StepNumbers(step, batches, loss_names, on_host, arrived))

    def vote(self, wait: bool = False) -> int:
        """``NOT_FINITE`` if a number is not.

        Args:
            wait: for those that the device has not computed yet; else they are looked at in a later call.
        """
        while self.pending and self.found is None:
            if not (wait or self.pending[0].have_arrived or len(self.pending) > MAX_PENDING):
                break
            numbers = self.pending.popleft()
            if numbers.are_finite():
                self.free_rows.append(numbers.values)
            else:
                self.found = numbers
        return 0 if self.found is None else NOT_FINITE

    def report(self) -> None:
        """Keeps the batches of the first step with a fault, and raises an error that names it, on all processes.

        Raises:
            FloatingPointError: always.
        """
        self.vote(wait=True)
        findings = filter(None, utils.gather(None if self.found is None else self.keep(self.found)))
        step, _, text = min(findings, key=lambda finding: finding[:2])
        raise utils.common(
            FloatingPointError(
                f"step {step}: {text}; no update since the last checkpoint was saved. "
                "Lower --lr, or look at the boxes of these images"
            )
        )

    def keep(self, numbers: StepNumbers) -> tuple[int, bool, str]:
        """Writes the batches of a step whose losses are not finite, or all where only the norm is not.

        Returns:
            The step, whether only the norm is at fault, as on processes that got it from another, and what to say.
        """
        losses = numbers.losses_of_batches()
        bad = [i for i, one in enumerate(losses) if not all(map(math.isfinite, one.values()))]
        fault = f"the norm of the gradients is {numbers.values[-1]}"
        for name, value in losses[bad[0]].items() if bad else ():
            if not math.isfinite(value):
                fault = f"the loss {name} is {value}"  # the last one: the first is the sum of the others
        chosen = bad or range(len(losses))
        batches = [numbers.batches[i] for i in chosen]
        path = self.output_dir / f"not_finite_{utils.rank()}.pth"
        try:
            ssd.save_file({"step": numbers.step, "batches": batches, "losses": [losses[i] for i in chosen]}, path)
            where = f"kept in {path}"
        except OSError as error:
            where = f"{path} could not be written: {error.strerror}"
        image_ids = [image_id for batch in batches for image_id in batch["image_id"]]
        return numbers.step, not bad, f"{fault}, images {image_ids} ({where})"
