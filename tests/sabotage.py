"""Runs train.py and lets something happen to one of its processes:

    torchrun --nproc-per-node=2 -m tests.sabotage RANK MOMENT CALL WHAT [flags of train.py]

WHAT is a signal, which the process sends to itself, or "nan": a loss becomes that. It happens in the CALL-th call of a
function that is called at the MOMENT, and not again after a restart by torchrun. Then the first process comes late, so
that the others meet what the processes before have left behind.
"""

import os
import signal
import sys
import time

import ssd
import train
from engine import failures, flags, inference
from engine.training_state import TrainingState
from tests import tiny

MOMENTS = {
    "start": (train, "make_model"),
    "batch": (train.BatchLosses, "forward"),
    "loss": (ssd.SSD, "compute_loss"),
    "step": (TrainingState, "optimizer_step"),
    "save": (ssd, "save_file"),
    "detect": (inference, "predict"),
    "score": (inference, "score"),
}


def sabotage(moment: str, call: int, what: str, replace=setattr) -> None:
    """Lets it happen to this process; ``replace`` may undo it, as ``monkeypatch.setattr`` does."""
    owner, name = MOMENTS[moment]
    function = getattr(owner, name)
    calls = 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call and what != "nan":
            os.kill(os.getpid(), signal.Signals[what])
        result = function(*args, **kwargs)
        if calls == call and what == "nan":
            result["classification"] = result["classification"] * float("nan")
        return result

    replace(owner, name, wrapped)


if __name__ == "__main__":
    rank, moment, call, what, *arguments = sys.argv[1:]
    ssd.family.MODELS["tiny"] = tiny.MODEL
    is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if is_restart and os.environ["RANK"] == "0":
        time.sleep(5)
    if not is_restart and os.environ.get("RANK", "0") == rank:
        sabotage(moment, int(call), what)
    with failures.one_line_errors(flags.names_of(train.get_args_parser())):
        train.main(train.parse_args(arguments))
