"""What a run says when it ends early, and its exit codes; test_interruption.py has the runs."""

import errno
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import evaluate
import train
import utils
from engine import failures, flags
from engine.loading import LoaderTimeoutError

FLAGS = {script.__name__: flags.names_of(script.get_args_parser()) for script in (train, evaluate)}
one_line_errors = partial(failures.one_line_errors, FLAGS["train"])


@pytest.fixture(autouse=True)
def hook(monkeypatch):
    """Is put back, which a script that ends need not do."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)


def test_an_error_for_the_user_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit, one_line_errors():
        utils.init_distributed("cuda", timeout=60)
    assert exit.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: --device cuda: PyTorch finds no GPU here" in line


def test_other_errors_keep_their_traceback(monkeypatch, capsys):
    monkeypatch.setattr(failures, "OUR_FOLDERS", [Path(__file__).parent])
    with pytest.raises(ValueError, match="could not convert"), one_line_errors():
        torch.zeros(1).new_tensor(float("one"))
    with pytest.raises(ValueError, match="zip"), one_line_errors():
        list(zip([1], [1, 2], strict=True))  # by a built-in, though called from a file of the repository
    with pytest.raises(RuntimeError), one_line_errors():
        torch.zeros(2) + torch.zeros(3)
    with pytest.raises(FileNotFoundError), one_line_errors():
        Path("nowhere").read_text()
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit), one_line_errors():
        raise ValueError("for the user")
    assert "for the user" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "says", "code"),
    [
        (failures.Interrupted("SIGTERM"), "stopped: SIGTERM", failures.EXIT_INTERRUPTED),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore"), "lower --batch-size", 1),
        (RuntimeError("CUDA error: out of memory\nCompile with ..."), "lower --batch-size", 1),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "lower --workers", 1),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "--shm-size", 1),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left"), "--shm-size", 1),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:80"), "another process", 1),
        (RuntimeError("Timed out waiting 10000ms for recv operation to complete"), "another process", 1),
        (dist.DistBackendError("NCCL error: remote process exited"), "another process", 1),
        (OSError(errno.ENOSPC, "No space left on device", "out/args.json"), "out/args.json: No space left", 1),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write: No space left", 1),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "out/args.json"), "out/args.json: Is a directory", 1),
        (OSError(errno.EMFILE, "Too many open files", "a.npy"), "ulimit -n", 1),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n", 1),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u", 1),
        (RuntimeError("can't start new thread"), "ulimit -u", 1),
        (LoaderTimeoutError("no images came for 9 s (--loader-timeout)"), "(--loader-timeout); the storage hangs", 1),
    ],
)
def test_errors_that_a_user_can_mend_come_with_a_remedy(capsys, error, says, code):
    with pytest.raises(SystemExit) as exit, one_line_errors():
        raise error
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert exit.value.code == code


def test_an_error_of_a_loader_worker_is_told_without_its_traceback(capsys):
    text = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\n"
    with pytest.raises(SystemExit), one_line_errors():
        raise RuntimeError(text + "RuntimeError: unable to open shared memory object </torch_1> in read-write mode\n")
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: RuntimeError: unable to open shared memory object" in line


def test_numbers_that_are_not_finite_have_an_exit_code_of_their_own(monkeypatch):
    monkeypatch.setattr(failures, "OUR_FOLDERS", [Path(__file__).parent])
    with pytest.raises(SystemExit) as exit, one_line_errors():
        raise FloatingPointError("the loss is nan")
    assert exit.value.code == failures.EXIT_NOT_FINITE


@pytest.mark.parametrize("script", FLAGS)
def test_remedies_name_flags_that_the_script_has(script):
    for *_, clauses in [*failures.REMEDIES, (failures.DISK,)]:
        text = failures.remedy(clauses, FLAGS[script])
        assert text
        assert set(re.findall("--[a-z-]+", text)) <= FLAGS[script] | {"--shm-size"}
        assert script == "evaluate" or text == "".join(clauses)


def test_a_clause_of_another_script_is_left_out():
    timeout, disk = LoaderTimeoutError("no images came"), OSError(errno.ENOSPC, "No space left on device", "out/a")
    texts = {script: [failures.explain(error, FLAGS[script]) for error in (timeout, disk)] for script in FLAGS}
    assert texts["train"][0].endswith("it takes more --workers, or --cache ram")
    assert texts["evaluate"][0].endswith("it takes more --workers")
    assert texts["train"][1].endswith("or name another --output-dir, and go on with --resume")
    assert texts["evaluate"][1].endswith("or name another --output-dir")
