"""Files held in memory that all processes of a machine share."""

import contextlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy import ndarray

READING_THREADS = 32  # a network file system answers many readers at once


class SharedFiles:
    """The content of files in shared memory, which is freed when the process that read them ends.

    Args:
        memory: path by which other processes of the machine open the memory.
        offsets: int64 [files + 1]; file ``i`` is ``offsets[i]`` to ``offsets[i + 1]``.
    """

    def __init__(self, memory: str, offsets: ndarray):
        self.memory = memory
        self.offsets = offsets
        self.content = np.memmap(memory, np.uint8, mode="r")

    def __reduce__(self):
        return SharedFiles, (self.memory, self.offsets)

    def __getitem__(self, index: int) -> bytes:
        """The content of a file; empty if it could not be read."""
        start, end = self.offsets[index : index + 2]
        return self.content[start:end].tobytes()


def read_files(paths: list[Path]) -> tuple[str, ndarray]:
    """Reads files into shared memory, and returns what ``SharedFiles`` takes, in any process of the machine.

    Raises:
        ValueError: they do not fit, or the system has no such memory.
    """
    if not hasattr(os, "memfd_create"):
        raise ValueError("--cache ram: this system has no shared memory of the kind that it needs; leave it out")
    with ThreadPoolExecutor(READING_THREADS) as pool:
        offsets = np.concatenate(([0], np.cumsum(list(pool.map(size_of, paths)), dtype=np.int64)))
        needed, free = int(offsets[-1]), free_memory()
        if needed > free:
            raise ValueError(
                f"--cache ram: the images take {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB of memory are free"
            )
        descriptor = os.memfd_create("files")  # left open for as long as this process runs
        os.ftruncate(descriptor, max(needed, 1))

        def read(path: Path, start: int, end: int) -> None:
            with contextlib.suppress(OSError):
                os.pwrite(descriptor, path.read_bytes()[: end - start], start)

        list(pool.map(read, paths, offsets[:-1].tolist(), offsets[1:].tolist()))
    return f"/proc/{os.getpid()}/fd/{descriptor}", offsets


def size_of(path: Path) -> int:
    """Size in bytes; 0 if there is no such file."""
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    (kib,) = re.findall(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return 1024 * int(kib)
