"""Checkpoints: what they hold, how they reach the disk, and which of them a run may continue from."""

import argparse
import os
import subprocess
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import coco_annotations
import ssd
import utils
from coco_utils import CocoTrainDataset

VERSION = 1
RUN_FILES = ("checkpoint.pth", "best.pth", "metrics.jsonl", "args.json", "pictures", "events.out.tfevents*")
# what a resumed run must share with the run that it continues
FIXED_FLAGS = (
    "model",
    "seed",
    "batch_size",
    "accumulate",
    "world_size",
    "opt",
    "momentum",
    "weight_decay",
    "trainable_backbone_layers",
)


@dataclass
class TrainingState:
    """Everything that training changes, and so everything that a checkpoint must hold."""

    model: ssd.SSD
    optimizer: torch.optim.Optimizer
    lr_scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    steps_per_epoch: int
    accumulate: int = 1
    evaluated_step: int = 0
    best_ap: float = -1.0
    num_parts: int = 0  # batches whose gradients the next step has so far

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
    def completes_step(self) -> bool:
        """Whether the next batch is the last of a step."""
        return self.num_parts + 1 == self.accumulate

    def add_gradients(self, loss: Tensor) -> None:
        """Adds those of the loss of a batch, which counts as one of ``accumulate``."""
        self.scaler.scale(loss / self.accumulate).backward()
        self.num_parts += 1

    def update(self) -> None:
        """One step down the gradients."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=self.accumulate == 1)
        self.lr_scheduler.step()
        self.num_parts = 0

    def state_dict(self) -> dict:
        """Tensors and plain data. ``epoch`` is the last complete one, as in torchvision; ``step`` counts since then."""
        return {
            "model": finite(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.global_step // self.steps_per_epoch - 1,
            "step": self.global_step % self.steps_per_epoch,
            "evaluated_step": self.evaluated_step,
            "best_ap": self.best_ap,
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, checkpoint: dict) -> None:
        """Continues from ``checkpoint``, with the learning rates of this run's flags, and its way to compute a step."""
        base_lrs = self.lr_scheduler.base_lrs
        is_fused = [group["fused"] for group in self.optimizer.param_groups]
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.lr_scheduler.load_state_dict(checkpoint["lr_scheduler"] | {"base_lrs": base_lrs})
        for group, fused, base_lr, factor in zip(
            self.optimizer.param_groups, is_fused, base_lrs, self.lr_scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base_lr * factor(self.global_step)
            group["fused"] = fused
        if checkpoint["scaler"]:  # empty without fp16
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.evaluated_step = checkpoint["evaluated_step"]
        self.best_ap = checkpoint["best_ap"]
        torch.set_rng_state(checkpoint["rng"])


def finite(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state_dict``, unless a weight is nan or infinite: such a model must not replace a good checkpoint."""
    for name, value in state_dict.items():
        if not value.isfinite().all():
            raise FloatingPointError(f"the weight {name} is no longer finite and was not saved; lower --lr")
    return state_dict


def copy_to_host(state):
    """A copy of tensors and plain data that training will not change, in memory that a GPU does not lack."""
    if isinstance(state, dict):
        return {key: copy_to_host(value) for key, value in state.items()}
    if isinstance(state, list):
        return [copy_to_host(value) for value in state]
    return state.detach().to("cpu", copy=True) if isinstance(state, Tensor) else state


def describe_origin(args: argparse.Namespace, dataset: CocoTrainDataset) -> dict:
    """What a checkpoint tells about its origin, beside the training state."""
    return {
        "args": vars(args),
        "categories": dataset.annotations.classes,
        "num_images": len(dataset),
        "version": VERSION,
        "git": git_commit(),
    }


def git_commit() -> str | None:
    """The commit that the scripts run from, or None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Writes ``checkpoint`` so that ``path`` is the old or the new file at any moment, even if the machine dies."""
    if not utils.is_main():
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def find_checkpoint(args: argparse.Namespace) -> dict | None:
    """The checkpoint to continue from: ``--resume``, or for ``auto`` that of the output folder, if it has one.

    Raises:
        ValueError: the file is no training checkpoint, or this run has other values of ``FIXED_FLAGS``.
    """
    path = Path(args.output_dir) / "checkpoint.pth" if args.resume == "auto" else args.resume
    if not path or (args.resume == "auto" and not path.exists()):
        return None
    checkpoint = ssd.load_file(path)
    if "lr_scheduler" not in checkpoint or "categories" not in checkpoint:
        raise ValueError(f"{path}: not a checkpoint of train.py; to start from its weights use --weights {path}")
    if args.trainable_backbone_layers is None:
        args.trainable_backbone_layers = checkpoint["args"]["trainable_backbone_layers"]
    for name in FIXED_FLAGS:
        # the first checkpoints do not tell --accumulate, which did not exist
        old, new = ({"accumulate": 1} | checkpoint["args"])[name], getattr(args, name)
        if old != new:
            setting = "number of processes" if name == "world_size" else "--" + name.replace("_", "-")
            raise ValueError(f"{path}: was made with {setting} {old}, this run has {new}; they must agree")
    return checkpoint


def begin_or_continue(
    args: argparse.Namespace, state: TrainingState, checkpoint: dict | None, dataset: CocoTrainDataset
) -> None:
    """Brings ``state`` to where ``checkpoint`` was, if there is one, and readies the output folder.

    Raises:
        ValueError: the checkpoint is of other data, or the processes found different ones.
    """
    output_dir = Path(args.output_dir)
    if checkpoint is not None:
        check_same_data(checkpoint, dataset)
        state.load_state_dict(checkpoint)
    if not utils.all_agree(state.global_step):
        raise ValueError("the processes found different checkpoints: --output-dir must be shared by all machines")
    if checkpoint is None or not continues_in_place(args):
        set_aside_earlier_run(output_dir)
    if not (output_dir / "best.pth").exists():
        state.best_ap = -1.0  # that of the resumed run is elsewhere


def check_same_data(checkpoint: dict, dataset: CocoTrainDataset) -> None:
    """Raises ValueError unless ``checkpoint`` was trained on the classes and the number of images of ``dataset``."""
    coco_annotations.check_same_classes(checkpoint["categories"], "the checkpoint to resume", dataset.annotations)
    if checkpoint["num_images"] != len(dataset):
        raise ValueError(
            f"{dataset.annotations.path}: has {len(dataset)} images to train on, the checkpoint to resume "
            f"{checkpoint['num_images']}; to train its weights on other images use --weights"
        )


def continues_in_place(args: argparse.Namespace) -> bool:
    """Whether ``--resume`` names a checkpoint of the output folder, whose log then goes on."""
    return args.resume == "auto" or Path(args.resume).resolve().parent == Path(args.output_dir).resolve()


def set_aside_earlier_run(output_dir: Path) -> None:
    """Moves the files of an earlier run into ``previous-N``: a new run must neither mix with them nor lose them."""
    utils.barrier()  # a slower process may still be reading one of them
    earlier = [path for name in RUN_FILES for path in output_dir.glob(name)] if utils.is_main() else []
    if earlier:
        folder = next(path for n in count(1) if not (path := output_dir / f"previous-{n}").exists())
        folder.mkdir()
        for path in earlier:
            path.rename(folder / path.name)
        print(f"{output_dir} held an earlier run, which is now in {folder}")
