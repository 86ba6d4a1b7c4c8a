"""Numbers that are not finite: found without making the host wait for the device, and kept for study."""

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
    names: list[str]  # of the numbers
    values: Tensor  # on the host, once ``arrived``
    arrived: torch.cuda.Event | None

    @property
    def have_arrived(self) -> bool:
        return self.arrived is None or self.arrived.query()

    @property
    def faults(self) -> list[int]:
        """Which numbers are not finite."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return torch.nonzero(~self.values.isfinite()).flatten().tolist()


class Divergence:
    """Watches the numbers of all steps of this process.

    Args:
        output_dir: where the batches of a step with a fault are written.
    """

    def __init__(self, output_dir: Path):
        self.output_dir = output_dir
        self.pending: deque[StepNumbers] = deque()
        self.found: StepNumbers | None = None

    def add(
        self, step: int, batches: list[dict], loss_names: list[str], losses: list[Tensor], gradient_norm: Tensor
    ) -> None:
        """Takes the batches of a step with the losses of each, and the norm of its gradients."""
        names = [f"the loss {name}" for name in loss_names] * len(batches)
        values = torch.cat([*losses, gradient_norm.view(1)])
        arrived = None
        if values.is_cuda:
            on_host = torch.empty_like(values, device="cpu", pin_memory=True)
            values = on_host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.pending.append(StepNumbers(step, batches, [*names, "the norm of the gradients"], values, arrived))

    def vote(self, wait: bool = False) -> int:
        """``NOT_FINITE`` if a number is not.

        Args:
            wait: for those that the device has not computed yet; else they are looked at in a later call.
        """
        while self.pending and self.found is None:
            if not (wait or self.pending[0].have_arrived or len(self.pending) > MAX_PENDING):
                break
            numbers = self.pending.popleft()
            if numbers.faults:
                self.found = numbers
        return 0 if self.found is None else NOT_FINITE

    def report(self) -> None:
        """Keeps the batches of the first step with a fault, and raises an error that names it, on all processes.

        Raises:
            FloatingPointError: always.
        """
        self.vote(wait=True)
        findings = utils.gather(None if self.found is None else self.keep(self.found))
        step, text = min((finding for finding in findings if finding), key=lambda finding: finding[0])
        raise utils.common(
            FloatingPointError(
                f"step {step}: {text}; no update since the last checkpoint was saved. "
                "Lower --lr, or look at the boxes of these images"
            )
        )

    def keep(self, numbers: StepNumbers) -> tuple[int, str]:
        """Writes the batches of a step. Returns the step and what was wrong with it."""
        path = self.output_dir / f"not_finite_{utils.rank()}.pth"
        values = numbers.values.tolist()
        content = {"step": numbers.step, "batches": numbers.batches, "names": numbers.names, "values": values}
        ssd.save_file(content, path)
        first = numbers.faults[0]
        image_ids = [image_id for batch in numbers.batches for image_id in batch["image_id"].tolist()]
        return numbers.step, f"{numbers.names[first]} is {values[first]}, images {image_ids} (kept in {path})"
