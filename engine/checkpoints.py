"""Checkpoints: how they reach the disk, which of them is sound, and which model one holds."""

import contextlib
import os
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

import ssd
import utils
from coco import CocoAnnotations, check_same_classes

from .exported import ExportedDetector
from .training_state import TrainingState

LATEST, BEST = "checkpoint.pth", "best.pth"
OLDER = re.compile(r"checkpoint_(\d+)\.pth")  # by step
KINDS = {"model": dict, "optimizer": dict, "lr_scheduler": dict, "scaler": dict, "rng": Tensor, "args": dict}
KINDS |= {"categories": list, "num_images": int, "evaluated_step": int, "best_ap": float, "overflows": int}


class Checkpoints:
    """The checkpoints of a run in its output folder: the latest, the best, and ``keep`` older ones.

    Args:
        output_dir: the folder.
        keep: how many checkpoints older than the latest stay, beside the best.
        origin: what each tells about its origin, beside the training state.
        latest_step: the step of the latest that the folder has already, if any.
    """

    def __init__(self, output_dir: Path, keep: int, origin: dict, latest_step: int | None):
        self.output_dir = output_dir
        self.keep = keep
        self.origin = origin
        self.latest_step = latest_step
        self.saved = None  # how far the run was when it last saved

    def save(self, state: TrainingState) -> bool:
        """Saves ``state`` as the latest, unless it already is; tells whether it was not.

        Raises:
            ValueError: it cannot be written; on all processes.
            FloatingPointError: it has weights or momenta that are not finite; on all processes.
        """
        progress = (state.global_step, state.evaluated_step)
        if progress == self.saved:
            return False
        utils.run_on_main(lambda: self.write(state.state_dict(), state.global_step))
        self.saved, self.latest_step = progress, state.global_step
        return True

    def save_best(self, state_dict: dict) -> None:
        """Saves a state as the best; on the main process only."""
        save_checkpoint(state_dict | self.origin, self.output_dir / BEST)

    def write(self, state_dict: dict, step: int) -> None:
        latest = self.output_dir / LATEST
        if self.keep and self.latest_step not in (None, step):
            keep_as(latest, self.output_dir / f"checkpoint_{self.latest_step}.pth")
        save_checkpoint(state_dict | self.origin, latest)
        for path in list(older_checkpoints(self.output_dir))[self.keep :]:
            path.unlink(missing_ok=True)


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Writes a checkpoint, with an error for the user.

    Raises:
        ValueError: it cannot be written; the one before is as it was.
        FloatingPointError: it has weights or momenta that are not finite.
    """
    check_finite(checkpoint, "nothing was saved; lower --lr")
    try:
        ssd.save_file(checkpoint | {"version": ssd.VERSION}, path)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be saved ({error.strerror}); the checkpoint before it is whole. "
            "Mend that, and go on with --resume auto"
        ) from None


def check_finite(checkpoint: dict, remedy: str) -> None:
    """Raises FloatingPointError if a weight or momentum is nan or infinite."""
    momenta = {f"{name} {i}": m for i, s in checkpoint["optimizer"]["state"].items() for name, m in s.items()}
    average = {f"model_ema {name}": value for name, value in checkpoint.get("model_ema", {}).items()}
    for name in ssd.not_finite(checkpoint["model"] | average | momenta):
        raise FloatingPointError(f"{name} is no longer finite; {remedy}")


def keep_as(latest: Path, older: Path) -> None:
    """Gives the latest checkpoint a second name, under which it stays when the next one replaces it."""
    older.unlink(missing_ok=True)
    try:
        os.link(latest, older)
    except OSError:  # of a file system without links; until the next one is written, only the older name is there
        with contextlib.suppress(FileNotFoundError):
            latest.rename(older)


def older_checkpoints(output_dir: Path) -> dict[Path, int]:
    """Those that were kept, with their steps, the newest first."""
    steps = {path: int(match[1]) for path in output_dir.iterdir() if (match := OLDER.fullmatch(path.name))}
    return dict(sorted(steps.items(), key=lambda one: one[1], reverse=True))


def describe_origin(flags: dict, annotations: CocoAnnotations, num_images: int) -> dict:
    """What a checkpoint tells about its origin: flags by their names in Python, classes, images trained on, commit."""
    return {"args": flags, "categories": annotations.classes, "num_images": num_images, "git": git_commit()}


def git_commit() -> str | None:
    """The commit that the scripts run from, or None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass(frozen=True)
class Found:
    """A checkpoint to continue from."""

    path: Path
    content: dict
    unusable: tuple[Path, ...] = ()  # which were looked at before it


def find_checkpoint(resume: str | None, output_dir: Path) -> Found | None:
    """The checkpoint to continue from: a path, or for ``auto`` the newest sound one of ``output_dir``, if any.

    Raises:
        ValueError: there are checkpoints, but none is sound.
    """
    if resume is None:
        return None
    if resume == "auto":
        return newest_sound(output_dir)
    return Found(Path(resume), read_checkpoint(Path(resume)))


def newest_sound(output_dir: Path) -> Found | None:
    """The latest checkpoint of a folder; if that is damaged or missing, the newest of the others. Says so.

    Raises:
        ValueError: there are checkpoints, but all are damaged.
    """
    older = list(older_checkpoints(output_dir)) if output_dir.is_dir() else []
    latest, best = output_dir / LATEST, output_dir / BEST
    if not any(path.exists() for path in (latest, *older, best)):
        return None
    found, faults = None, {}
    for path in (latest, *older, best):
        if found is not None and path != best:
            continue
        try:
            content = read_checkpoint(path)
            if found is None or step_of(content) > step_of(found.content):
                found = Found(path, content)
        except ValueError as error:
            faults[path] = error
        if found is not None and found.path == latest:
            return found
    if found is None:
        raise ValueError(f"{faults[latest]}; no other checkpoint in {output_dir} is sound")
    for fault in faults.values():
        utils.print_on_main(f"{fault}; continuing from {found.path} instead")
    return replace(found, unusable=tuple(path for path in faults if path.exists()))


def step_of(checkpoint: dict) -> int:
    return checkpoint["lr_scheduler"]["last_epoch"]


def read_checkpoint(path: Path) -> dict:
    """Reads a checkpoint of train.py.

    Raises:
        ValueError: it is missing, damaged, not finite, or none of train.py.
    """
    checkpoint = ssd.load_file(path)
    if not checkpoint.keys() >= KINDS.keys():
        raise ValueError(f"{path}: not a checkpoint of train.py; to start from its weights use --weights {path}")
    if key := unusual_part(checkpoint):
        raise ValueError(f"{path}: damaged, or made by another program: its {key} is missing, or not that of train.py")
    try:
        check_finite(checkpoint, "the checkpoint is of no use")
    except FloatingPointError as error:
        raise ValueError(f"{path}: {error}") from None
    return checkpoint


def unusual_part(checkpoint: dict) -> str | None:
    """The first key whose value is missing, or of another kind than train.py saves there."""
    has_average = "model_ema" in checkpoint or ssd.told(checkpoint, "ema") is not None
    for key, kind in (KINDS | ({"model_ema": dict} if has_average else {})).items():
        if not isinstance(checkpoint.get(key), kind):
            return key
    return None if type(checkpoint["lr_scheduler"].get("last_epoch")) is int else "lr_scheduler"


def load_model(
    checkpoint: str,
    model_name: str | None,
    input_scaling: str = "default",
    default_boxes: str = "default",
    ema: bool = True,
) -> tuple[ssd.SSD, list[dict] | None]:
    """The model of a checkpoint (ours, torchvision's, a state dict, or an enum name).

    A ``model_name``, an ``input_scaling`` and ``default_boxes`` are needed where the checkpoint does not tell. Of one
    that has the average of its weights too, ``ema`` takes that.

    Returns:
        The model, and the classes that a checkpoint of ours tells (``CocoAnnotations.classes``), else None.

    Raises:
        ValueError: it cannot be read, or is of another model.
    """
    content = {} if ssd.is_enum_name(checkpoint) else ssd.load_file(checkpoint)
    published = ssd.find_published(checkpoint)
    if "categories" in content:
        model_name = ssd.told(content, "model")
    elif model_name is None and published is not None:
        model_name = type(published).__name__.removesuffix("_Weights").lower()
    model_name = model_name or "ssd300_vgg16"
    if model_name not in ssd.list_models():
        raise ValueError(f"{checkpoint}: is of a model that is not known here, {model_name!r}")
    asked = {"input_scaling": input_scaling, "default_boxes": default_boxes, "ema": ema}
    model = ssd.get_model(model_name, weights=checkpoint, weights_backbone=None, **asked)
    return model, content.get("categories")


def check_knows(
    model: ssd.SSD | ExportedDetector, classes: list[dict] | None, checkpoint: str, annotations: CocoAnnotations
) -> CocoAnnotations:
    """The annotations, with the classes of ``checkpoint`` where they leave classes open.

    Classes without ids, whose names were assumed when a file was exported, say nothing.

    Raises:
        ValueError: its model was trained on other classes.
    """
    if classes is not None and all("id" in one for one in classes):
        annotations = annotations.with_classes(classes)
        check_same_classes(classes, checkpoint, annotations)
    if not annotations.categories:
        raise ValueError(f"{annotations.path}: lists no categories, and {checkpoint} does not tell which it knows")
    if model.num_classes != annotations.num_classes:
        raise ValueError(
            f"{checkpoint}: predicts {model.num_classes} classes (background included), "
            f"but {annotations.path} needs {annotations.num_classes}"
        )
    return annotations
