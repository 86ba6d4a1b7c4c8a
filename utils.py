"""The processes of a run: what they agree on, exchange, and move to their devices.

The only room that knows ranks and process groups. Work for the main process alone is a no-op on the others.
"""

import contextlib
import datetime
import functools
import inspect
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

groups: dict[str, dist.ProcessGroup] = {}  # "host": through which processes exchange what lies in their hosts' memory


def init_distributed(device: str | None, timeout: float) -> torch.device:
    """Joins the process group if torchrun started this process, and returns the device to work on.

    NCCL connects GPUs, gloo CPUs; on a single machine both are told to listen on the loopback interface only.

    Args:
        device: ``cuda``, ``cpu`` or None, which takes the GPU if there is one.
        timeout: seconds after which a process gives up to wait for another.

    Raises:
        ValueError: ``cuda`` was asked for, and there is none.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    if device.type == "cuda":
        if started_by_torchrun() or device.index is None:
            device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    if started_by_torchrun():
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        if loopback and os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            for backend in ("GLOO", "NCCL"):
                os.environ.setdefault(f"{backend}_SOCKET_IFNAME", loopback[0])
        timeout = datetime.timedelta(seconds=timeout)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        store = store_of_this_start(store, rank, world_size, timeout)
        settings = {"store": store, "rank": rank, "world_size": world_size, "timeout": timeout}
        if device.type == "cuda":  # NCCL would guess the device, and connect in the midst of the first step
            dist.init_process_group("nccl", device_id=device, **settings)
        else:
            dist.init_process_group("gloo", **settings)
        groups["host"] = dist.new_group(backend="gloo", timeout=timeout)
    return device


def store_of_this_start(store: dist.Store, rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """A part of torchrun's store in which nothing is of processes before a restart.

    torchrun keeps its store, and PyTorch (2.10 to 2.15) takes the addresses that it finds in it for those of today.
    The main process offers a name for this start; the others reply to it, each with a name of its own, by which it
    knows its reply among those that the main process accepts. (How often torchrun has restarted the processes would not
    do as a name: the machines of a run count that each for itself.)

    Raises:
        torch.distributed.DistStoreError: the others did not come in time.
    """

    def read(key: str) -> str:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(
                f"process {rank} of {world_size} waited {timeout} (--dist-timeout) for the others"
            )
        time.sleep(0.02)
        return store.get(key).decode() if store.check([key]) else ""

    deadline = time.monotonic() + timeout.total_seconds()
    own = uuid.uuid4().hex
    accepted = own
    if rank == 0:
        store.set("offer", own)
        for other in range(1, world_size):
            while not (reply := read(f"reply {other}")).startswith(own):
                pass
            accepted += reply
        store.set("accepted", accepted)
    else:
        while own not in (accepted := read("accepted")):
            store.set(f"reply {rank}", read("offer") + own)
    return dist.PrefixStore(accepted[: len(own)], store)


def cleanup_distributed() -> None:
    if dist.is_initialized():
        groups.clear()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def started_by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_rank() -> int:
    """Which process of its machine this one is."""
    return int(os.environ.get("LOCAL_RANK", 0)) if started_by_torchrun() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def print_on_main(text: str) -> None:
    if is_main():
        print(text, flush=True)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Runs the block on the first process of each machine, then on the others, also where it fails there."""
    if local_rank() > 0:
        barrier()
    try:
        yield
    finally:
        if local_rank() == 0:
            barrier()


def gather(value) -> list:
    """Each process's ``value``, in rank order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, groups["host"])
    return values


def from_first_of_machine(make: Callable):
    """What ``make`` returns on the first process of each machine, for all processes of that machine."""
    if not dist.is_initialized():
        return make()
    values = [None] * world_size()
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))  # ``make`` may take long
    dist.all_gather_object(values, make() if local_rank() == 0 else None, group)
    dist.destroy_process_group(group)
    return values[rank() - local_rank()]


def gather_to_main(value) -> list | None:
    """Each process's ``value`` in rank order on the main process, None on the others. Goes through CPU memory."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values, dst=0, group=groups["host"])
    return values


def run_on_main(work: Callable):
    """What ``work`` returns on the main process, for all, which wait. If it raises an error, all of them do."""
    value = error = None
    if is_main():
        try:
            value = work()
        except Exception as raised:
            error = raised
    outcome = [value, error]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0, group=groups["host"])
    if outcome[1] is not None:
        raise common(error or outcome[1])
    return outcome[0]


def common(error: Exception) -> Exception:
    """Marks an error that all processes raise, so that one of them reports it."""
    error.is_common = True
    return error


class Votes:
    """Finds the highest of all processes' values without making any of them wait: it is known one call later."""

    def __init__(self):
        self.work = None

    def cast(self, value: int, wait: bool = False) -> int:
        """Takes this process's value. All processes must call this equally often.

        Returns:
            The highest value of the last call, or if ``wait``, or if this process is alone, of this one as well.
        """
        if not dist.is_initialized():
            return value
        highest = self.result()
        self.value = torch.tensor(value)
        self.work = dist.all_reduce(self.value, dist.ReduceOp.MAX, groups["host"], async_op=True)
        return max(highest, self.result()) if wait else highest

    def result(self) -> int:
        if self.work is None:
            return 0
        self.work.wait()
        self.work = None
        return self.value.item()


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Lets batch norm take its statistics from the batches of all processes.

    Raises:
        ValueError: the device is no GPU.
    """
    if device.type != "cuda":
        raise ValueError("--sync-bn needs GPUs: PyTorch has no synchronised batch norm for others")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def distribute(model: nn.Module) -> nn.Module:
    """``model`` as it is to be called in training: with gradients averaged over the processes, if there are several."""
    if not dist.is_initialized():
        return model
    # Buffers need not be equal in every step: ``broadcast_buffers`` sees to them before they matter.
    is_new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    settings = {"forward_sync_buffers" if is_new else "broadcast_buffers": False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **settings)


def averaging_gradients(forward: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
    """Where backward passes average the gradients over the processes; if not ``enabled``, a later one will."""
    return contextlib.nullcontext() if enabled or not dist.is_initialized() else forward.no_sync()


def broadcast_buffers(model: nn.Module) -> None:
    """Gives every process the main one's buffers. Batch norm's differ between them: each has seen its own batches."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def mean_over_processes(values: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= world_size()
    return values


def all_agree(value: int) -> bool:
    """Whether ``value`` is the same in every process."""
    return len(set(gather(value))) == 1


def to_device(batch: dict, device: torch.device) -> dict:
    """Moves the tensors of a batch without waiting for the copies."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU for copies; always the same one, since each has a pool of memory for itself."""
    return torch.cuda.Stream(device)


def moved_batches(batches: Iterable[dict], device: torch.device) -> Iterator[dict]:
    """Moves each batch to ``device``.

    To a GPU a stream of its own copies them, while the steps that the host has queued before are still computed.
    """
    if device.type != "cuda":
        for batch in batches:
            yield to_device(batch, device)
        return
    copies, computation = copy_stream(device), torch.cuda.current_stream(device)
    for batch in batches:
        with torch.cuda.stream(copies):
            batch = to_device(batch, device)
        computation.wait_stream(copies)
        for value in batch.values():
            if isinstance(value, Tensor):
                value.record_stream(computation)  # or the next copy might get its memory as soon as it is deleted
        yield batch
