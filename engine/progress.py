"""How far something is: a line on a terminal that goes on."""

import datetime
import shutil
import sys
import time


class LiveLine:
    """A line on a terminal that each ``show`` overwrites; writes nothing where the output goes to a file."""

    def __init__(self):
        self.is_shown = False

    def show(self, text: str) -> None:
        if sys.stdout.isatty():
            self.is_shown = True
            print("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)

    def clear(self) -> None:
        if self.is_shown:
            print("\r\x1b[K", end="", flush=True)
            self.is_shown = False


class Progress:
    """A bar of ``total`` images under the lines that are printed, with their pace and what is left."""

    def __init__(self, total: int):
        self.total = total
        self.done = 0
        self.line = LiveLine()
        self.begin = time.perf_counter()

    @property
    def pace(self) -> float:
        """Images per second so far."""
        return self.done / (time.perf_counter() - self.begin)

    def add(self, texts: list[str]) -> None:
        """Prints a line of each of the images that were done."""
        self.done += len(texts)
        self.line.clear()
        for text in texts:
            print(text)
        eta = as_time((self.total - self.done) / self.pace) if self.done else "?"
        self.line.show(f"{bar(self.done, self.total)} {self.pace:.1f} images/s  eta: {eta}")

    def finish(self, text: str) -> None:
        self.line.clear()
        print(f"{text} ({self.pace:.1f} images/s)" if self.done else text)


def bar(done: int, total: int, width: int = 20) -> str:
    filled = width * done // total
    return f"{done:6}/{total} [{'#' * filled}{'.' * (width - filled)}]"


def as_time(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=round(seconds))
