"""Loader processes that are killed, stuck, or left behind, and what a run says then."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from engine import failures, loading
from tests.conftest import ROOT, SMALL, children_of


class ParentProcess(torch.utils.data.Dataset):
    """The id of the process that the one which serves a sample was forked from."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return os.getppid()


def test_loader_workers_are_not_forked_from_this_process():
    """Such a fork inherits the locks of its threads; a worker once waited for one of them until the run was killed."""
    parents = [next(iter(loading.make_loader(ParentProcess(), 1, patience=60))).item() for _ in range(2)]
    assert parents[0] == parents[1] != os.getpid()


def test_signals_of_the_run_stay_as_they_were():
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    loading.start_fork_server()
    assert signal.pthread_sigmask(signal.SIG_SETMASK, mask) == {signal.SIGUSR2} | mask


class Slow(torch.utils.data.Dataset):
    """Samples that take so many seconds each."""

    def __init__(self, seconds: list[float]):
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self.seconds)

    def __getitem__(self, index: int) -> int:
        time.sleep(self.seconds[index])
        return index


@pytest.mark.parametrize("warnings", [None, "default", "always,ignore::DeprecationWarning"])
def test_what_a_run_that_ends_early_leaves_behind_is_freed_in_silence(warnings):
    code = """if True:
        import multiprocessing, os
        from engine import loading
        loading.start_fork_server()
        semaphore = multiprocessing.get_context("forkserver").Semaphore()
        print(semaphore._semlock.name, os.environ.get("PYTHONWARNINGS"), flush=True)
        os._exit(1)
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    environment |= {"PYTHONWARNINGS": warnings} if warnings else {}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    name, kept = result.stdout.split()
    assert kept == str(warnings)
    assert "resource_tracker" not in result.stderr
    assert not Path("/dev/shm", "sem." + name[1:]).exists()


def test_a_worker_that_dies_before_its_batch_is_fetched_is_named():
    """The fork server, which would report the death, is stopped meanwhile."""
    others = set(multiprocessing.active_children())  # of loaders that live on
    iterator = iter(loading.make_loader(Slow([0.0] * 8), 1, patience=60, batch_size=1))
    next(iterator)
    (worker,) = set(multiprocessing.active_children()) - others
    server = next(iter(loading.make_loader(ParentProcess(), 1, patience=60))).item()
    os.kill(server, signal.SIGSTOP)
    try:
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(0.5)
        with pytest.raises(RuntimeError, match=r"DataLoader worker.* exited unexpectedly"):
            list(iterator)
    finally:
        os.kill(server, signal.SIGCONT)


@pytest.mark.parametrize("workers", [0, 1])
def test_only_a_single_batch_may_take_too_long(workers):
    """Three batches take longer than the patience with one."""
    next(iter(loading.make_loader(ParentProcess(), 1, patience=60)))  # the fork server's imports take longer
    patience = 4.0
    loader = loading.make_loader(Slow([1.5] * 3 + [60]), workers, patience, batch_size=1)
    iterator = iter(loader)
    assert [next(iterator).item() for _ in range(3)] == [0, 1, 2]
    start = time.monotonic()
    with pytest.raises(loading.LoaderTimeoutError, match=r"no images came for 4 s \(--loader-timeout\)"):
        next(iterator)
    assert time.monotonic() - start < 30
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.fixture
def training(data_path, tmp_path):
    """Starts train.py in a session of its own, with a training set of links that a test may replace."""
    copy = tmp_path / "data"
    shutil.copytree(data_path, copy)
    started = []

    def start(*flags, prefix=()) -> tuple[subprocess.Popen, Path]:
        command = ["train.py", *SMALL, "--data-path", copy, "--output-dir", tmp_path / "out", "--eval-freq", 0]
        process = subprocess.Popen(
            [*prefix, sys.executable, *map(str, [*command, *flags])],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process, copy / "train2017"

    yield start
    for process in started:
        process.kill()
        process.stdout.close()


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} never came")


def workers_of(process: subprocess.Popen) -> list[int]:
    """The children of the fork server, a child of the run."""
    return [worker for server in children_of(process.pid) for worker in children_of(server)]


def error_of(process: subprocess.Popen, seconds: float) -> str:
    """The one line that a run ends with, within so many seconds."""
    console, _ = process.communicate(timeout=seconds)
    assert process.returncode == 1
    assert "Traceback" not in console
    return console.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_killed_worker_ends_a_run_with_one_line(training, number):
    """As the kernel kills it when memory or shared memory is short."""
    process, _ = training("--workers", 2, "--epochs", 99, "--print-freq", 1)
    wait_for(process, "Epoch: [0]  [1/4]")
    os.kill(workers_of(process)[0], number)
    error = error_of(process, 30)
    assert "error: DataLoader worker" in error
    assert "too little shared memory" in error


@pytest.mark.parametrize("moment", ["Training on", "Epoch: [0]  [1/4]"])
def test_storage_that_hangs_ends_a_run_with_one_line(training, moment):
    """Before the first step the run itself reads images, later its worker does. Here they become empty pipes."""
    process, images = training("--workers", 1, "--epochs", 99, "--print-freq", 1, "--loader-timeout", 15)
    wait_for(process, moment)
    for path in list(images.iterdir()):
        os.mkfifo(images / "pipe")
        (images / "pipe").replace(path)
    assert "no images came for 15 s (--loader-timeout)" in error_of(process, 60)


def test_workers_end_with_a_run_that_is_killed(training):
    process, _ = training("--workers", 2, "--epochs", 99, "--print-freq", 1)
    wait_for(process, "Epoch: [0]  [1/4]")
    workers = workers_of(process)
    assert len(workers) == 2
    process.kill()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.1)


class Failing(torch.utils.data.Dataset):
    """A sample that raises an error of the system."""

    def __init__(self, number: int):
        self.number = number

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        raise OSError(self.number, os.strerror(self.number), "sample")


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "--shm-size"), (errno.EMFILE, "ulimit -n"), (errno.EACCES, None), (errno.ENOENT, None)],
)
def test_an_error_within_a_worker_is_not_blamed_on_the_output_folder(number, says):
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        next(iter(loading.make_loader(Failing(number), 1, patience=60)))
    text = failures.explain(raised.value, {"--workers", "--batch-size", "--output-dir", "--resume"})
    assert (says in text and "--output-dir" not in text) if says else text is None


def test_an_error_without_workers_stays_what_it_is():
    with pytest.raises(FileNotFoundError, match="sample"):
        next(iter(loading.make_loader(Failing(errno.ENOENT), 0, patience=60)))


NO_SEMAPHORES = """if True:
    import errno, multiprocessing.synchronize, runpy, sys

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    multiprocessing.synchronize.SemLock.__init__ = fail
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def checkpoint(data_path, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("trained")
    flags = [*SMALL, "--data-path", data_path, "--output-dir", output_dir, "--max-steps", 1, "--eval-freq", 0]
    train.main(train.parse_args([str(flag) for flag in [*flags, "--workers", 0]]))
    return output_dir / "checkpoint.pth"


COMMANDS = {
    "training": ["train.py", *SMALL],
    "check-data": ["train.py", "--check-data"],
    "test-only": ["train.py", "--test-only", "--resume", "{checkpoint}"],
    "scoring": ["evaluate.py", "--checkpoint", "{checkpoint}"],
    "images": ["evaluate.py", "--checkpoint", "{checkpoint}", "--images", "{data}/val2017"],
}


@pytest.fixture
def command(data_path, tmp_path, checkpoint):
    """Gives the command of a mode, with so many workers."""

    def of_mode(mode: str, workers: int) -> list[str]:
        words = [word.format(checkpoint=checkpoint, data=data_path) for word in COMMANDS[mode]]
        return [*words, "--data-path", str(data_path), "--output-dir", str(tmp_path), "--workers", str(workers)]

    return of_mode


@pytest.mark.parametrize("mode", COMMANDS)
def test_workers_that_cannot_start_are_one_line(command, mode):
    """Where /dev/shm is full, there are no semaphores either."""
    script, *flags = command(mode, 1)
    result = subprocess.run(
        [sys.executable, "-c", NO_SEMAPHORES, script, *flags], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"{script}: error: DataLoader workers cannot start, or not hand over a batch: No space left on device; "
        "too little shared memory (a container's --shm-size) or memory: lower --workers or --batch-size"
    ]


@pytest.mark.parametrize("mode", ["check-data", "images"])
def test_too_many_open_files_are_one_line(command, mode):
    """Of the script. Python's fork server, which waits for what cannot be opened, may have a traceback of its own."""
    limited = ["sh", "-c", 'ulimit -n 48 && exec "$@"', "sh", sys.executable, "-W", "ignore", *command(mode, 32)]
    result = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith(COMMANDS[mode][0]))
    assert "Too many open files; raise ulimit -n, or lower --workers" in line
    assert "Exception ignored" not in result.stderr


SMALL_SHARED_MEMORY = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=100k tmpfs /dev/shm && exec "$@"', "sh"]


def can_mount() -> bool:
    command = [*SMALL_SHARED_MEMORY, "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="this user may not mount file systems")
def test_too_little_shared_memory_ends_a_run_with_one_line(training):
    process, _ = training("--workers", 1, "--epochs", 1, prefix=SMALL_SHARED_MEMORY)
    console, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "--shm-size" in console.splitlines()[-1]
    assert "train.py: error: " in console.splitlines()[-1]
