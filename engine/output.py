"""Where a script's output goes: a console that cannot fail, and a folder that is tried before anything is computed."""

import io
import os
import select
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import utils


class Unfailing(io.FileIO):
    """A file that drops what it cannot take: of a reader or terminal that has gone, or on a full disk."""

    def write(self, content) -> int:
        """Writes some bytes, and waits where others have made the file one that does not block."""
        try:
            while (written := super().write(content)) is None:
                select.select([], [self], [])
            return written
        except OSError:
            return len(content)


def keep_console_from_failing() -> None:
    """Lets standard output and error take any text, for as long as the process lives.

    What nobody can read any more is dropped, as is all for a stream that was closed before Python started, and a letter
    that the encoding lacks becomes a question mark. A stream in the place of the process's own, as of pytest, stays.
    """
    if sys.stdout is sys.__stdout__:
        sys.stdout = unfailing(sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = unfailing(sys.stderr)


def unfailing(stream: TextIO | None) -> TextIO:
    """A stream to where ``stream`` goes, in its encoding."""
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(Unfailing(os.devnull, "w")))
    file = Unfailing(stream.fileno(), "w", closefd=False)
    by_lines = stream.line_buffering or stream.write_through  # the latter with python -u
    return io.TextIOWrapper(io.BufferedWriter(file), stream.encoding, errors="replace", line_buffering=by_lines)


def prepare(folder: Path, files: Iterable[str] = (), folders: Iterable[str] = (), flag: str = "--output-dir") -> None:
    """Makes the output folder, and sees whether it takes files: before hours of work, whose results it is for.

    Args:
        folder: the output folder.
        files: names of what will be written there; a file of an earlier evaluation must be one that may be changed.
        folders: names of folders in it, which are made and tried too.
        flag: that names it.

    Raises:
        ValueError: it does not, on all processes.
    """

    def try_all() -> None:
        try_to_write(folder, files, flag)
        for name in folders:
            try_to_write(folder / name, (), flag)

    utils.run_on_main(try_all)


def try_to_write(folder: Path, files: Iterable[str], flag: str) -> None:
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"content")
        for path in (folder / name for name in files):
            if path.exists():
                path.open("ab").close()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); mend that, or name another {flag}") from None
