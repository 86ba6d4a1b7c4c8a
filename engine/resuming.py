"""What a run may continue from, what it may change, and whose folder it writes to."""

import fcntl
import math
import os
import socket
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import ssd
import utils
from coco import CocoAnnotations, check_same_classes
from view.html_report import FILE_NAME as REPORT

from . import output
from .checkpoints import BEST, LATEST, Found, older_checkpoints, read_checkpoint, step_of
from .training_state import TrainingState

LOCK = ".lock"
RUN_FILES = (LATEST, "checkpoint_*.pth", BEST, "metrics.jsonl", "args.json", "pictures", "events.out.tfevents*")
RUN_FILES += ("not_finite_*.pth", REPORT)
# what a resumed run must share with the run that it continues, beside the number of images of a step
FIXED_FLAGS = (
    "model",
    "seed",
    "batch_size",
    "epoch_samples",
    "opt",
    "momentum",
    "weight_decay",
    "norm_weight_decay",
    "ema",
    "freeze_backbone",
    "trainable_backbone_layers",
    "input_scaling",
    "default_boxes",
)
# what a checkpoint tells where the flags leave it open: how they do, and what it may be
TOLD_BY_CHECKPOINT = {
    "trainable_backbone_layers": (None, range(1000)),
    "input_scaling": ("default", ssd.INPUT_SCALINGS),
    "default_boxes": ("default", ("default", *ssd.CAFFE_DEFAULT_BOXES)),
}
FREE_FLAGS = {"resume", "output_dir", "tuned_for_batch"}  # no change of them is worth a line


def agree(settings: dict, found: Found) -> dict:
    """What this run does where its ``settings``, flags by their names in Python, leave that to the checkpoint.

    Prints what changes since then.

    Returns:
        Values of ``TOLD_BY_CHECKPOINT``, to be taken over.

    Raises:
        ValueError: the settings change what must stay as it was.
    """
    old = found.content["args"]
    if not old.keys() >= {*FIXED_FLAGS, "world_size", "accumulate"}:
        raise ValueError(f"{found.path}: damaged, or made by another program: it does not tell all of its flags")
    told = {}
    for name, (unset, values) in TOLD_BY_CHECKPOINT.items():
        if old[name] not in [*values]:
            raise ValueError(f"{found.path}: damaged, or made by another program: it has {flag(name)} {old[name]!r}")
        if settings[name] == unset:
            told[name] = old[name]
    settings = settings | told
    for name in FIXED_FLAGS:
        if old[name] != settings[name]:
            raise ValueError(
                f"{found.path}: was made with {flag(name)} {old[name]}, this run has {settings[name]}; they must agree"
            )
    before, now = ([flags[name] for name in ("world_size", "accumulate")] for flags in (old, settings))
    if math.prod(before) != math.prod(now):
        raise ValueError(
            f"{found.path}: was made with {before[0]} processes and --accumulate {before[1]}, this run has "
            f"{now[0]} and {now[1]}; their product must stay {math.prod(before)}"
        )
    for change in changes(old, settings):
        utils.print_on_main(f"Changed since {found.path}: {change}")
    return told


def changes(old: dict, new: dict) -> Iterator[str]:
    """A text for each flag that a resumed run changes."""
    for name in sorted(old.keys() & new.keys() - FREE_FLAGS):
        if old[name] != new[name]:
            yield f"{flag(name)} {old[name]} -> {new[name]}"


def flag(name: str) -> str:
    return "number of processes" if name == "world_size" else "--" + name.replace("_", "-")


def begin_or_continue(
    output_dir: Path, state: TrainingState, found: Found | None, annotations: CocoAnnotations, num_images: int
) -> int | None:
    """Brings ``state`` to where the checkpoint that was found is, if there is one, and readies the output folder.

    Args:
        output_dir: the folder, which then belongs to this run.
        state: as new.
        found: the checkpoint.
        annotations: the training set.
        num_images: how many of its images are trained on.

    Returns:
        The step of the latest checkpoint that the folder holds, if it does.

    Raises:
        ValueError: the checkpoint is of other data, the processes found different ones, another run writes to the
            folder, or pictures cannot.
    """
    if found is not None:
        check_same_data(found.content, annotations, num_images)
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
    output.prepare(output_dir, [REPORT], folders=["pictures"])
    if not (output_dir / BEST).exists():
        state.best_ap = -1.0  # that of the resumed run is elsewhere
    return state.global_step if (output_dir / LATEST).exists() else None


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
    """The checkpoints that are unusable, or later than the one that the run goes on from; and the report of one."""
    step = step_of(found.content)
    files = {*output_dir.glob(LATEST), *output_dir.glob(REPORT), *found.unusable}
    files |= {file for file, other in older_checkpoints(output_dir).items() if other > step}
    for best in output_dir.glob(BEST):
        try:
            if step_of(read_checkpoint(best)) > step:
                files.add(best)
        except ValueError:
            files.add(best)
    return sorted(files)


def check_same_data(checkpoint: dict, annotations: CocoAnnotations, num_images: int) -> None:
    """Raises ValueError unless ``checkpoint`` was trained on these classes and as many images."""
    check_same_classes(checkpoint["categories"], "the checkpoint to resume", annotations)
    if checkpoint["num_images"] != num_images:
        raise ValueError(
            f"{annotations.path}: has {num_images} images to train on, the checkpoint to resume "
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
