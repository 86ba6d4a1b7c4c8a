"""Checkpoints: how they reach the disk, which of them a run may continue from, and what it may change."""

import argparse
import contextlib
import fcntl
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from torch import Tensor

import coco_annotations
import ssd
import utils
from coco_utils import CocoTrainDataset
from training_state import TrainingState

LATEST, BEST, LOCK = "checkpoint.pth", "best.pth", ".lock"
OLDER = re.compile(r"checkpoint_(\d+)\.pth")  # by step
RUN_FILES = (LATEST, "checkpoint_*.pth", BEST, "metrics.jsonl", "args.json", "pictures", "events.out.tfevents*")
RUN_FILES += ("not_finite_*.pth",)
# what a resumed run must share with the run that it continues, beside the number of images of a step
FIXED_FLAGS = (
    "model",
    "seed",
    "batch_size",
    "opt",
    "momentum",
    "weight_decay",
    "norm_weight_decay",
    "freeze_backbone",
    "trainable_backbone_layers",
    "input_scaling",
)
# what a checkpoint tells where the flags leave it open: how they do, and what it may be
TOLD_BY_CHECKPOINT = {
    "trainable_backbone_layers": (None, range(10)),
    "input_scaling": ("default", ssd.INPUT_SCALINGS),
}
FREE_FLAGS = {"resume", "output_dir", "tuned_for_batch"}  # no change of them is worth a line
KINDS = {"model": dict, "optimizer": dict, "lr_scheduler": dict, "scaler": dict, "rng": Tensor, "args": dict}
KINDS |= {"categories": list, "num_images": int, "evaluated_step": int, "best_ap": float}


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

    def save(self, state: TrainingState) -> None:
        """Saves ``state`` as the latest, unless it already is.

        Raises:
            ValueError: it cannot be written; on all processes.
            FloatingPointError: it has weights or momenta that are not finite; on all processes.
        """
        progress = (state.global_step, state.evaluated_step)
        if progress == self.saved:
            return
        utils.run_on_main(lambda: self.write(state.state_dict(), state.global_step))
        self.saved, self.latest_step = progress, state.global_step

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
    for name in ssd.not_finite(checkpoint["model"] | momenta):
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


def describe_origin(args: argparse.Namespace, dataset: CocoTrainDataset) -> dict:
    """What a checkpoint tells about its origin, beside the training state."""
    return {
        "args": vars(args),
        "categories": dataset.annotations.classes,
        "num_images": len(dataset),
        "git": git_commit(),
    }


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


def find_checkpoint(args: argparse.Namespace) -> Found | None:
    """The checkpoint to continue from: ``--resume``, or for ``auto`` the newest sound one of the output folder, if any.

    Raises:
        ValueError: there are checkpoints, but none is sound, or this run has other values of ``FIXED_FLAGS``.
    """
    if args.resume is None:
        return None
    if args.resume == "auto":
        found = newest_sound(Path(args.output_dir))
    else:
        found = Found(Path(args.resume), read_checkpoint(Path(args.resume)))
    if found is not None:
        check_flags(args, found)
    return found


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
    is_usual = all(isinstance(checkpoint[key], kind) for key, kind in KINDS.items())
    if not is_usual or type(checkpoint["lr_scheduler"].get("last_epoch")) is not int:
        raise ValueError(f"{path}: damaged, or made by another program: its content is not that of train.py")
    try:
        check_finite(checkpoint, "the checkpoint is of no use")
    except FloatingPointError as error:
        raise ValueError(f"{path}: {error}") from None
    return checkpoint


def check_flags(args: argparse.Namespace, found: Found) -> None:
    """Takes over what the flags leave open, and names what they change.

    Raises:
        ValueError: they change what must stay as it was.
    """
    # of what the first checkpoints do not tell, as it did not exist
    old = {"accumulate": 1, "freeze_backbone": False, "input_scaling": "default"} | found.content["args"]
    for name, (unset, values) in TOLD_BY_CHECKPOINT.items():
        told = old.get(name)
        if told not in [None, unset, *values]:
            raise ValueError(f"{found.path}: damaged, or made by another program: it has {flag(name)} {told!r}")
        if getattr(args, name) == unset:
            setattr(args, name, unset if told is None else told)
    for name in FIXED_FLAGS:
        if old.get(name) != getattr(args, name):
            raise ValueError(
                f"{found.path}: was made with {flag(name)} {old.get(name)}, this run has {getattr(args, name)}; "
                "they must agree"
            )
    processes, accumulate = old.get("world_size", 1), old["accumulate"]
    if args.world_size * args.accumulate != processes * accumulate:
        raise ValueError(
            f"{found.path}: was made with {processes} processes and --accumulate {accumulate}, this run has "
            f"{args.world_size} and {args.accumulate}; their product must stay {processes * accumulate}"
        )
    for change in changes(old, vars(args)):
        utils.print_on_main(f"Changed since {found.path}: {change}")


def changes(old: dict, new: dict) -> Iterator[str]:
    """A text for each flag that a resumed run changes."""
    for name in sorted(old.keys() & new.keys() - FREE_FLAGS):
        if old[name] != new[name]:
            yield f"{flag(name)} {old[name]} -> {new[name]}"


def flag(name: str) -> str:
    return "number of processes" if name == "world_size" else "--" + name.replace("_", "-")


def begin_or_continue(
    args: argparse.Namespace, state: TrainingState, found: Found | None, dataset: CocoTrainDataset
) -> Checkpoints:
    """Brings ``state`` to where the checkpoint that was found is, if there is one, and readies the output folder.

    Raises:
        ValueError: the checkpoint is of other data, the processes found different ones, or another run writes to the
            folder.
    """
    output_dir = Path(args.output_dir)
    if found is not None:
        check_same_data(found.content, dataset)
        try:
            state.load_state_dict(found.content)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{found.path}: does not fit the model and optimizer of this run ({reason})") from None
    if not utils.all_agree(state.global_step):
        raise ValueError("the processes found different checkpoints: --output-dir must be shared by all machines")
    utils.run_on_main(lambda: claim(output_dir))
    if found is None or found.path.resolve().parent != output_dir.resolve():
        set_aside(output_dir, [file for name in RUN_FILES for file in output_dir.glob(name)])
    elif found.path.name != LATEST:
        set_aside(output_dir, not_continued(output_dir, found))
    if not (output_dir / BEST).exists():
        state.best_ap = -1.0  # that of the resumed run is elsewhere
    latest_step = state.global_step if (output_dir / LATEST).exists() else None
    return Checkpoints(output_dir, args.keep, describe_origin(args, dataset), latest_step)


def claim(output_dir: Path) -> None:
    """Keeps other runs out of the folder until this process ends, on a file system that has locks.

    Raises:
        ValueError: another process that lives has claimed it.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(output_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)  # for good: to close it would give the lock up
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = os.read(lock, 1000).decode()
        raise ValueError(
            f"{output_dir}: another run ({owner}) writes there; wait for its end, or name another --output-dir"
        ) from None
    except OSError:  # there are none
        return
    os.truncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())


def not_continued(output_dir: Path, found: Found) -> list[Path]:
    """The checkpoints that are unusable, or later than the one that the run goes on from."""
    step = step_of(found.content)
    files = {*output_dir.glob(LATEST), *found.unusable}
    files |= {file for file, other in older_checkpoints(output_dir).items() if other > step}
    for best in output_dir.glob(BEST):
        try:
            if step_of(read_checkpoint(best)) > step:
                files.add(best)
        except ValueError:
            files.add(best)
    return sorted(files)


def check_same_data(checkpoint: dict, dataset: CocoTrainDataset) -> None:
    """Raises ValueError unless ``checkpoint`` was trained on the classes and the number of images of ``dataset``."""
    coco_annotations.check_same_classes(checkpoint["categories"], "the checkpoint to resume", dataset.annotations)
    if checkpoint["num_images"] != len(dataset):
        raise ValueError(
            f"{dataset.annotations.path}: has {len(dataset)} images to train on, the checkpoint to resume "
            f"{checkpoint['num_images']}; to train its weights on other images use --weights"
        )


def set_aside(output_dir: Path, files: list[Path]) -> None:
    """Moves files of an earlier run into ``previous-N``: a run must neither mix with them nor lose them."""
    utils.barrier()  # a slower process may still be reading one of them
    if files and utils.is_main():
        folder = next(path for n in count(1) if not (path := output_dir / f"previous-{n}").exists())
        folder.mkdir()
        for file in files:
            file.rename(folder / file.name)
        names = ", ".join(sorted(file.name for file in files))
        print(f"{output_dir} held files that this run does not continue, now in {folder}: {names}")
