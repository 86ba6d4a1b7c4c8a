"""How a run ends early: what it says, and its exit code."""

import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

import utils

ROOT = Path(__file__).resolve().parent.parent
OUR_FOLDERS = [ROOT, *(ROOT / wing for wing in ("ssd", "coco", "engine", "view"))]
EXIT_NOT_FINITE = 3
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: to be tried again

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
DISK_ERRORS |= {errno.ENOTDIR, errno.EEXIST}  # where --output-dir is a file
DISK_HINT = "what was saved before is whole; mend that, or name another --output-dir, and go on with --resume"
SHARED_MEMORY_HINT = "too little shared memory (a container's --shm-size) or memory: lower --workers or --batch-size"
GPU_MEMORY_HINT = "lower --batch-size, and --lr with it, or use --amp"
PEER_HINT = "another process of the run has ended, or no longer answers; if it said why, it did so above"
# what PyTorch's errors say, and what to do
HINTS = (
    (torch.OutOfMemoryError, "", GPU_MEMORY_HINT),
    (RuntimeError, "CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED", GPU_MEMORY_HINT),
    (RuntimeError, "DefaultCPUAllocator", "the machine lacks memory: lower --batch-size or --workers"),
    (RuntimeError, r"shared memory|\bshm\b|[Bb]us error", SHARED_MEMORY_HINT),
    (RuntimeError, "DataLoader worker.* (killed by signal|exited unexpectedly)", SHARED_MEMORY_HINT),
    (ValueError, "Expected more than 1 value per channel", "batch norm needs a --batch-size of 2 or more"),
    (dist.DistError, "", PEER_HINT),
    (RuntimeError, r"closed by peer|reset by peer|Broken pipe|[Tt]imed out (waiting|after)|gloo/transport", PEER_HINT),
)


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """A run was asked to stop, and has saved its state."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the script with one line, and the exit code that tells what happened, where there is something to explain.

    That is for errors that this repository raises or defines for the user, and for those of PyTorch and the system that
    a user can do something about. Any other keeps its traceback.
    """
    try:
        yield
    except Exception as error:
        text = explain(error)
        if text is None and not utils.started_by_torchrun():
            raise
        if text is None:
            traceback.print_exc()
        elif utils.is_main() or not getattr(error, "is_common", False):
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
        leave(exit_code(error))


def leave(code: int) -> None:
    """Exits; at once where other processes may be gone, because PyTorch would wait for what they were to send."""
    if not utils.started_by_torchrun():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_code(error: Exception) -> int:
    if isinstance(error, Interrupted):
        return EXIT_INTERRUPTED
    return EXIT_NOT_FINITE if isinstance(error, FloatingPointError) else 1


def explain(error: Exception) -> str | None:
    """A line for the user; None if there is nothing that he could do about it."""
    if isinstance(error, Interrupted):
        return f"stopped: {error}"
    if isinstance(error, (ValueError, FloatingPointError)) and is_ours(error):
        return f"error: {error}"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"error: {error.filename or 'cannot write'}: {error.strerror}; {DISK_HINT}"
    text = str(error)
    for kind, pattern, hint in HINTS:
        if isinstance(error, kind) and re.search(pattern, text):
            # the last line of an error that a loader worker has passed on
            return f"error: {text.strip().splitlines()[-1 if 'Original Traceback' in text else 0]}; {hint}"
    return None


def is_ours(error: Exception) -> bool:
    """Whether this repository defines the error, or raised it itself, not a built-in that it called."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised_in = last.filename if last.line.startswith("raise ") else None
    defined_in = getattr(sys.modules[type(error).__module__], "__file__", None)
    return any(path and Path(path).resolve().parent in OUR_FOLDERS for path in (raised_in, defined_in))
