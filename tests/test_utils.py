import datetime
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

import utils


def test_of_a_batch_the_tensors_move():
    moved = utils.to_device({"image": torch.zeros(2), "image_id": [3, 4]}, torch.device("meta"))
    assert moved["image"].is_meta
    assert moved["image_id"] == [3, 4]


@pytest.mark.parametrize(("asked", "expected"), [(None, "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_a_gpu_has_its_number(monkeypatch, asked, expected):
    """PyTorch takes no other."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert utils.init_distributed(asked, timeout=60) == torch.device(expected)
    assert chosen == [torch.device(expected)]


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    backends, chosen = [], []
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(None, 5, 8)]))
    monkeypatch.setattr(utils, "store_of_this_start", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, **settings: backends.append((backend, settings["device_id"])),
    )
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: None)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert utils.init_distributed(None, timeout=60) == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]
    assert backends == [("nccl", torch.device("cuda:1"))]


def join(store: dist.Store, late: tuple[int, ...], world_size: int = 3, seconds: float = 20) -> list[dist.Store]:
    """What each process of a start gets; those that are ``late`` come after the others have been waiting."""

    def start(rank: int) -> dist.Store:
        time.sleep(0.5 if rank in late else 0)
        return utils.store_of_this_start(store, rank, world_size, datetime.timedelta(seconds=seconds))

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(start, range(world_size)))


@pytest.mark.parametrize("late", [(0,), (1,), (0, 2), (1, 2)])
def test_a_restart_finds_nothing_in_the_store_of_what_was_before(late):
    store = dist.HashStore()
    before = join(store, late=())
    before[0].set("address", "old")
    with pytest.raises(dist.DistStoreError, match=r"process 0 of 3 waited .* \(--dist-timeout\)"):
        # one start of which only the main process and none of the others came
        utils.store_of_this_start(store, 0, 3, datetime.timedelta(seconds=0.2))
    after = join(store, late)
    assert not any(one.check(["address"]) for one in after)
    after[0].set("address", "new")
    assert [one.get("address") for one in after] == [b"new"] * 3
    assert before[0].get("address") == b"old"
