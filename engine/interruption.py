"""What may stop a run from outside, signals and the clock, and the mark that it leaves."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import utils

from .failures import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TIME_IS_UP = 100  # beyond all signals
MARKER = "interrupted.json"


class Interruption:
    """Takes note of signals and of the end of the time, for the run to stop where it can be continued.

    As a context manager it listens to the signals, and leaves a file in ``output_dir`` if the run in it was stopped. A
    second SIGINT, as Ctrl-C sends it, stops the process at once.

    Args:
        output_dir: of the run.
        time_limit: in minutes; None for none.
    """

    def __init__(self, output_dir: Path, time_limit: float | None):
        self.marker = output_dir / MARKER
        self.deadline = None if time_limit is None else time.monotonic() + 60 * time_limit
        self.received, self.received_at = 0, 0.0
        self.is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        if not self.is_restart:
            with contextlib.suppress(OSError):  # that it cannot write there, the run will say
                self.marker.unlink(missing_ok=True)  # of an earlier run, even if this one fails before it begins

    def __enter__(self):
        self.earlier = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in self.earlier.items():
            if handler is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.receive)
        return self

    def __exit__(self, kind, error, _) -> None:
        is_stopped = isinstance(error, Interrupted)
        if is_stopped and utils.is_main():
            with contextlib.suppress(OSError):  # the exit code tells it as well
                self.marker.write_text(json.dumps({"reason": str(error)}) + "\n")
        if not (is_stopped and utils.started_by_torchrun()):  # which signals those that end later than others
            for number, handler in self.earlier.items():
                signal.signal(number, handler)

    def refuse_restart(self) -> None:
        """Raises Interrupted, on all processes, if torchrun has restarted a run that was asked to stop."""
        utils.run_on_main(self.check_marker)

    def check_marker(self) -> None:
        if self.is_restart and self.marker.exists():
            raise Interrupted("as it was before torchrun restarted it")

    def receive(self, number: int, _) -> None:
        """Handles a signal. What comes twice within a second was sent once, by way of several."""
        if number == self.received == signal.SIGINT and time.monotonic() - self.received_at > 1:
            raise KeyboardInterrupt
        if number != self.received:
            self.received, self.received_at = number, time.monotonic()
        if utils.is_main():
            hint = "; once more to stop at once, without" if number == signal.SIGINT else ""
            text = f"{signal.Signals(number).name}: stopping after this step, with a checkpoint{hint}\n"
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(sys.stderr.fileno(), text.encode())  # print() may be what was interrupted

    def vote(self) -> int:
        """Why this process wants to stop: the number of a signal, or ``TIME_IS_UP``; 0 if it does not."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            return TIME_IS_UP
        return self.received

    @staticmethod
    def obey(vote: int) -> None:
        """Raises Interrupted if a process has voted to stop."""
        if vote:
            reason = "the --time-limit is reached" if vote == TIME_IS_UP else signal.Signals(vote).name
            raise utils.common(Interrupted(reason))
