import pytest
import torch

import utils


def test_batches_move_with_their_nested_parts():
    moved = utils.to_device({"a": torch.zeros(2), "b": {"c": torch.ones(1)}}, torch.device("meta"))
    assert moved["a"].is_meta
    assert moved["b"]["c"].is_meta


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: backends.append(backend))
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: None)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert utils.init_distributed(None, timeout=60) == torch.device("cuda:1")
    assert (chosen, backends) == ([torch.device("cuda:1")], ["nccl"])
