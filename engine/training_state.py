"""What training changes: the model, its optimizer and schedule, and how far they are."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

import ssd
import utils

from .averaging import update_average

MAX_OVERFLOWS_IN_A_ROW = 50  # GradScaler halves its scale at each; from 2 ** 16 that is far below any use


@dataclass
class TrainingState:
    """Everything that training changes, and so everything that a checkpoint must hold."""

    model: ssd.SSD
    optimizer: torch.optim.Optimizer
    lr_scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    steps_per_epoch: int
    accumulate: int = 1
    ema: AveragedModel | None = None  # of the weights, over the steps
    evaluated_step: int = 0
    best_ap: float = -1.0
    num_parts: int = 0  # batches whose gradients the next step has so far
    overflows: int = 0  # steps that fp16 has skipped
    overflows_in_a_row: int = 0

    def __post_init__(self):
        if self.accumulate > 1:
            # To gradients that exist PyTorch adds. The first ones it takes over as they are, and where they lie in
            # the memory of a CUDA graph (--compile reduce-overhead), the next batch would overwrite them.
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    @property
    def global_step(self) -> int:
        """Steps done since the start of training."""
        return self.lr_scheduler.last_epoch

    @property
    def evaluated_model(self) -> ssd.SSD:
        """What evaluations score, and best.pth is chosen for: the average of the weights, if there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def completes_step(self) -> bool:
        """Whether the next batch is the last of a step."""
        return self.num_parts + 1 == self.accumulate

    def backward(self, loss: Tensor) -> None:
        """Adds those of the loss of a batch, which counts as one of ``accumulate``."""
        self.scaler.scale(loss / self.accumulate).backward()
        self.num_parts += 1

    def optimizer_step(self) -> Tensor:
        """One step down the gradients; with fp16 none, where they overflow.

        Returns:
            The norm of all gradients, on their device; with fp16 zero, for there it need not be finite.

        Raises:
            FloatingPointError: fp16 has overflowed too often.
        """
        self.scaler.unscale_(self.optimizer)
        parameters = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=self.accumulate == 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # where fp16 skips the first step
            self.lr_scheduler.step()
        self.num_parts = 0
        overflowed = self.scaler.get_scale() < scale
        if self.ema is not None and not overflowed:
            update_average(self.ema, self.model)
        if self.scaler.is_enabled():
            self.count_overflow(overflowed)
            norm = torch.zeros_like(norm)
        return norm

    def count_overflow(self, overflowed: bool) -> None:
        self.overflows += overflowed
        self.overflows_in_a_row = self.overflows_in_a_row + 1 if overflowed else 0
        if self.overflows_in_a_row == MAX_OVERFLOWS_IN_A_ROW:
            raise utils.common(
                FloatingPointError(
                    f"the gradients of {MAX_OVERFLOWS_IN_A_ROW} steps in a row, up to step {self.global_step}, do not "
                    "fit into fp16, or are not finite; lower --lr, or use --amp bf16"
                )
            )

    @property
    def last_steps(self) -> dict[str, int]:
        """For each kind of line in the log, up to which step it belongs to this state."""
        return {"train": self.global_step, "skipped": self.global_step, "val": self.evaluated_step}

    def state_dict(self) -> dict:
        """Tensors and plain data. ``epoch`` is the last complete one, as in torchvision; ``step`` counts since then."""
        return {
            "model": self.model.state_dict(),
            **({} if self.ema is None else {"model_ema": self.ema.state_dict()}),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.global_step // self.steps_per_epoch - 1,
            "step": self.global_step % self.steps_per_epoch,
            "evaluated_step": self.evaluated_step,
            "best_ap": self.best_ap,
            "overflows": self.overflows,
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, checkpoint: dict) -> None:
        """Continues from ``checkpoint``, with the learning rates of this run's flags, and its way to compute a step."""
        base_lrs = self.lr_scheduler.base_lrs
        self.model.load_state_dict(checkpoint["model"])
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint["model_ema"])
        # Said before PyTorch loads the state, since that decides by it on which device AdamW counts its steps.
        is_fused = self.optimizer.param_groups[0]["fused"]
        groups = [group | {"fused": is_fused} for group in checkpoint["optimizer"]["param_groups"]]
        self.optimizer.load_state_dict(checkpoint["optimizer"] | {"param_groups": groups})
        self.lr_scheduler.load_state_dict(checkpoint["lr_scheduler"] | {"base_lrs": base_lrs})
        for group, base_lr, factor in zip(
            self.optimizer.param_groups, base_lrs, self.lr_scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base_lr * factor(self.global_step)
        if checkpoint["scaler"]:  # empty without fp16
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.evaluated_step = checkpoint["evaluated_step"]
        self.best_ap = checkpoint["best_ap"]
        self.overflows = checkpoint["overflows"]
        torch.set_rng_state(checkpoint["rng"])


def copy_to_host(state):
    """A copy of tensors and plain data that training will not change, in memory that a GPU does not lack."""
    if isinstance(state, dict):
        return {key: copy_to_host(value) for key, value in state.items()}
    if isinstance(state, list):
        return [copy_to_host(value) for value in state]
    return state.detach().to("cpu", copy=True) if isinstance(state, Tensor) else state
