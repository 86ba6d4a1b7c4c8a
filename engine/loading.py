"""Loader processes: how they are started, what they survive, and how they end."""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker

import torch
from torch.utils.data import DataLoader, Dataset

# What schedulers, torchrun and terminals send to all processes of a job, and only the run itself is to act on.
SIGNALS_OF_THE_RUN = {
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
}

# of glibc's mallopt(3), and the highest threshold that all its versions accept
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 32 * 2**20


class LoaderTimeoutError(ValueError):
    """No batch came in time."""


class Loader(DataLoader):
    """A DataLoader that gives up when a batch takes longer than ``patience`` seconds; 0 waits forever.

    Unlike the DataLoader's own timeout, this one leaves it to look for dead workers meanwhile.
    """

    def __init__(self, dataset: Dataset, patience: float, **settings):
        super().__init__(dataset, **settings)
        self.patience = patience

    def __iter__(self) -> Iterator:
        with at_most(self.patience), system_errors_named(self.num_workers):
            iterator = super().__iter__()
        while True:
            with at_most(self.patience), system_errors_named(self.num_workers):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch


def make_loader(dataset: Dataset, workers: int, patience: float, *, pin_memory: bool = False, **settings) -> DataLoader:
    """A ``Loader`` with ``workers`` processes, started so that neither they nor the random state of a run can suffer.

    The workers are forked from a server that has one thread. If this process were forked, they would inherit the locks
    that its other threads hold at that moment, and could wait for them forever. (From 3.14 on, this is Python's way.)
    """
    context = None
    if workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torchvision"])  # so that a worker need not import them
        with system_errors_named(workers):
            start_fork_server()
    return Loader(
        dataset,
        patience,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=begin_worker,
        multiprocessing_context=context,
        generator=torch.Generator(),  # by default it would draw from the random state that checkpoints keep
        **settings,
    )


def start_fork_server() -> None:
    """Starts it, unless it runs, with the run's signals blocked, which all workers inherit.

    A run that is asked to stop first finishes a step, for which it needs its workers.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_THE_RUN)
    try:
        start_resource_tracker()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_THE_RUN)  # some of which the tracker's start unblocks
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start_resource_tracker() -> None:
    """Starts, unless it runs, Python's process that frees what others leave behind, and lets it do so in silence.

    It would warn of a few semaphores wherever a run ends early: below the line that says why.
    """
    earlier = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (earlier, "ignore:resource_tracker")))
    try:
        resource_tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        if earlier is not None:
            os.environ["PYTHONWARNINGS"] = earlier


def begin_worker(worker_id: int) -> None:
    """What a worker does first."""
    keep_freed_memory()
    threading.Thread(target=end_with_the_run, daemon=True).start()


def end_with_the_run() -> None:
    """Ends this worker when the run has died. PyTorch's own watch looks at the fork server, which lives on."""
    multiprocessing.parent_process().join()
    os._exit(1)


@atexit.register
def kill_workers() -> None:
    """Ends all workers, also those that hang: Python would wait for them, as they do not hear SIGTERM."""
    for process in multiprocessing.active_children():
        process.kill()


def keep_freed_memory() -> None:
    """Lets the C library keep memory that is freed.

    A worker needs the same few megabytes again for every image. By default glibc returns them to the kernel each time,
    and to get them back, page by page, takes as long as decoding. Other C libraries are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        set_option = ctypes.CDLL(None).mallopt
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            set_option(option, KEPT_BYTES)


@contextlib.contextmanager
def system_errors_named(workers: int) -> Iterator[None]:
    """Says of an error of the system that it is one of the ``workers``: that they cannot start, or hand a batch over.

    A worker that died as it handed over a batch, before the DataLoader noticed, is reported as the DataLoader does. An
    error from within a worker, which comes with a text alone, stays what it is.

    Raises:
        RuntimeError: in the place of an OSError or EOFError.
    """
    try:
        yield
    except (OSError, EOFError) as error:
        if not workers or "in DataLoader worker process" in str(error):
            raise
        if isinstance(error, (ConnectionError, EOFError, FileNotFoundError)):
            raise RuntimeError("DataLoader worker exited unexpectedly") from error
        raise RuntimeError(f"DataLoader workers cannot start, or not hand over a batch: {error.strerror}") from error


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises LoaderTimeoutError where the block takes longer; without effect outside the main thread."""

    def give_up(*_) -> None:
        kill_workers()
        raise LoaderTimeoutError(f"no images came for {seconds:g} s (--loader-timeout)")

    if seconds == 0 or threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
