"""How a run ends early: what it says, and its exit code."""

import contextlib
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Set
from pathlib import Path

import torch
import torch.distributed as dist

import utils

from .loading import LoaderTimeoutError
from .output import keep_console_from_failing

ROOT = Path(__file__).resolve().parent.parent
OUR_FOLDERS = [ROOT, *(ROOT / wing for wing in ("ssd", "coco", "engine", "view"))]
EXIT_NOT_FINITE = 3
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: to be tried again
EXIT_CTRL_C = 130  # as shells have it for SIGINT

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
DISK_ERRORS |= {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}  # where a file is to be a folder, or a folder a file
# Remedies are clauses; those that name a flag which the script does not have are left out.
DISK = ("what was saved before is whole; mend that, or name another --output-dir", ", and go on with --resume")
SHARED_MEMORY = ("too little shared memory (a container's --shm-size) or memory: lower --workers or --batch-size",)
GPU_MEMORY = ("lower --batch-size", ", and --lr with it", ", or use --amp")
PEER = ("another process of the run has ended, or no longer answers; if it said why, it did so above",)
# what errors of PyTorch, the system and the loader say, and what to do
REMEDIES = (
    (torch.OutOfMemoryError, "", GPU_MEMORY),
    (RuntimeError, "CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED", GPU_MEMORY),
    (RuntimeError, "DefaultCPUAllocator", ("the machine lacks memory: lower --batch-size or --workers",)),
    (Exception, "Too many open files|items of ancdata", ("raise ulimit -n, or lower --workers",)),
    (Exception, "Resource temporarily unavailable|can't start new thread", ("raise ulimit -u, or lower --workers",)),
    (RuntimeError, r"shared memory|\bshm\b|[Bb]us error", SHARED_MEMORY),
    (RuntimeError, "DataLoader worker.* (killed by signal|exited unexpectedly|cannot start)", SHARED_MEMORY),
    (OSError, "(?s)in DataLoader worker process.*No space left", SHARED_MEMORY),
    (LoaderTimeoutError, "", ("the storage hangs, or is so slow that it takes more --workers", ", or --cache ram")),
    (ValueError, "Expected more than 1 value per channel", ("batch norm needs a --batch-size of 2 or more",)),
    (dist.DistError, "", PEER),
    (RuntimeError, r"closed by peer|reset by peer|Broken pipe|[Tt]imed out (waiting|after)|gloo/transport", PEER),
)
FOREIGN_FLAGS = {"--shm-size"}  # of other programs


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """A run was asked to stop, and has saved its state."""


@contextlib.contextmanager
def one_line_errors(flags: Set[str]) -> Iterator[None]:
    """Ends the script with one line, and the exit code that tells what happened, where there is something to explain.

    That is for Ctrl-C, for errors that this repository raises or defines for the user, and for those of PyTorch and the
    system that a user can do something about. Any other keeps its traceback. What is printed meanwhile never fails.

    Args:
        flags: of the script, the only ones that a remedy may name.
    """
    keep_console_from_failing()
    try:
        try:
            yield
        except Exception as error:
            text = explain(error, flags)
            if text is None and not utils.started_by_torchrun():
                raise
            if text is None:
                traceback.print_exc()
            elif utils.is_main() or not getattr(error, "is_common", False):
                say(text)
            leave(exit_code(error))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun repeats it
        if utils.is_main():
            say("stopped by Ctrl-C")
        leave_at_once(EXIT_CTRL_C)


def say(text: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)


def leave(code: int) -> None:
    """Exits; at once where other processes may be gone, because PyTorch would wait for what they were to send."""
    if utils.started_by_torchrun():
        leave_at_once(code)
    sys.unraisablehook = lambda _: None  # PyTorch's loaders, half made or short of threads, fail once more in their end
    sys.exit(code)


def leave_at_once(code: int) -> None:
    """Exits without waiting for threads and loader workers, which end with this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_code(error: Exception) -> int:
    if isinstance(error, Interrupted):
        return EXIT_INTERRUPTED
    return EXIT_NOT_FINITE if isinstance(error, FloatingPointError) else 1


def explain(error: Exception, flags: Set[str]) -> str | None:
    """A line for the user of a script with these ``flags``; None if there is nothing that he could do about it."""
    if isinstance(error, Interrupted):
        return f"stopped: {error}"
    text = str(error)
    for kind, pattern, clauses in REMEDIES:
        if isinstance(error, kind) and re.search(pattern, text):
            # the last line of an error that a loader worker has passed on
            line = text.strip().splitlines()[-1 if "Original Traceback" in text else 0]
            return f"error: {line}; {remedy(clauses, flags)}"
    if isinstance(error, (ValueError, FloatingPointError)) and is_ours(error):
        return f"error: {error}"
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"error: {error.filename or 'cannot write'}: {error.strerror}; {remedy(DISK, flags)}"
    return None


def remedy(clauses: tuple[str, ...], flags: Set[str]) -> str:
    """The clauses that name only ``flags``."""
    known = flags | FOREIGN_FLAGS
    return "".join(clause for clause in clauses if known.issuperset(re.findall(r"--[a-z][a-z-]*", clause)))


def is_ours(error: Exception) -> bool:
    """Whether this repository defines the error, or raised it itself, not a built-in that it called."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised_in = last.filename if last.line.startswith("raise ") else None
    defined_in = getattr(sys.modules[type(error).__module__], "__file__", None)
    return any(path and Path(path).resolve().parent in OUR_FOLDERS for path in (raised_in, defined_in))
