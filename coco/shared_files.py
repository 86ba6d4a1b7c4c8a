"""Files held in memory that all processes of a machine share."""

import contextlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy import ndarray

import utils

READING_THREADS = 32  # a network file system answers many readers at once


class SharedFiles:
    """The content of files in shared memory, which is freed when the last process that uses it ends.

    Args:
        memory: path by which other processes of the machine open the memory, while the process that read lives.
        starts, ends: int64 [files], where the content of each file begins and ends.
    """

    def __init__(self, memory: str, starts: ndarray, ends: ndarray):
        self.memory = memory
        self.starts = starts
        self.ends = ends
        self.content = np.memmap(memory, np.uint8, mode="r")

    def __reduce__(self):
        return SharedFiles, (self.memory, self.starts, self.ends)

    def __getitem__(self, index: int) -> bytes:
        """The content of a file; empty if it could not be read."""
        return self.content[self.starts[index] : self.ends[index]].tobytes()


def hold_in_memory(paths: list[Path]) -> SharedFiles:
    """The files in memory that all processes of a machine share; the first of them reads."""
    utils.print_on_main(f"Reading {len(paths)} images into memory")
    return SharedFiles(*utils.from_first_of_machine(lambda: read_files(paths)))


def read_files(paths: list[Path]) -> tuple[str, ndarray, ndarray]:
    """Reads files into shared memory, and returns what ``SharedFiles`` takes, in any process of the machine.

    Raises:
        ValueError: they do not fit, or the system has no such memory.
    """
    if not hasattr(os, "memfd_create"):
        raise ValueError("--cache ram: this system has no shared memory of the kind that it needs; leave it out")
    with ThreadPoolExecutor(READING_THREADS) as pool:
        sizes = np.array(list(pool.map(size_of, paths)), dtype=np.int64)
        needed, free = int(sizes.sum()), free_memory()
        if needed > free:
            raise ValueError(
                f"--cache ram: the images take {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB of memory are free"
            )
        descriptor = os.memfd_create("files")  # left open for as long as this process runs
        os.ftruncate(descriptor, max(needed, 1))

        def read(path: Path, start: int, size: int) -> int:
            with contextlib.suppress(OSError):
                return os.pwrite(descriptor, path.read_bytes()[:size], start)
            return 0

        starts = sizes.cumsum() - sizes
        lengths = list(pool.map(read, paths, starts.tolist(), sizes.tolist()))
    return f"/proc/{os.getpid()}/fd/{descriptor}", starts, starts + np.array(lengths, dtype=np.int64)


def size_of(path: Path) -> int:
    """Size in bytes; 0 if there is no such file."""
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def free_memory() -> int:
    """Bytes that can be had without swapping, or that a container may have at all, if these are fewer."""
    (kib,) = re.findall(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    limits = [1024 * int(kib)]
    with contextlib.suppress(OSError, ValueError):  # no such control group, or "max"
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)
