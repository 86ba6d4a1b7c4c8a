"""The moving average of a model's weights: PyTorch's, without what makes the host wait."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ssd
from engine import averaging
from tests import tiny


def make_model() -> ssd.SSD:
    return tiny.MODEL(num_classes=3).to(memory_format=torch.channels_last).train()


def change(model: nn.Module, step: int) -> None:
    """Weights, and what batch norm has seen."""
    torch.manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
        model(torch.randint(0, 256, (2, 3, model.size, model.size), dtype=torch.uint8))


def test_it_equals_pytorchs_bit_for_bit():
    model = make_model()
    ours, theirs = (averaging.make_average(model, 0.9) for _ in range(2))
    for step in range(4):
        change(model, step)
        averaging.update_average(ours, model)
        theirs.update_parameters(model)
        averages = [without_counters(average.state_dict()) for average in (ours, theirs)]
        torch.testing.assert_close(*averages, rtol=0, atol=0)
        counters = {name: value for name, value in ours.module.state_dict().items() if "num_batches" in name}
        assert counters == dict.fromkeys(counters, step + 1)  # PyTorch's are averages, cut to integers
    assert len(counters) == 2
    assert ours.n_averaged == 4


def without_counters(state_dict: dict) -> dict:
    return {name: value for name, value in state_dict.items() if "num_batches_tracked" not in name}


def test_statistics_of_batch_norm_are_averaged_too():
    norm = nn.BatchNorm1d(1)
    average = averaging.make_average(norm, 0.75)
    for mean in (4.0, 8.0, 16.0):
        norm.running_mean.fill_(mean)
        averaging.update_average(average, norm)
    assert average.module.running_mean.item() == 0.75 * (0.75 * 4 + 0.25 * 8) + 0.25 * 16


def test_what_never_changes_stays_as_it_is():
    """Default boxes, mean and deviation of the input, and frozen weights, through many steps of rounding."""
    model = make_model()
    before = copy.deepcopy(model)
    average = averaging.make_average(model, 0.9)
    for _ in range(50):
        averaging.update_average(average, model)
    for tensors in ("parameters", "buffers"):
        for expected, found in zip(getattr(before, tensors)(), getattr(average.module, tensors)(), strict=True):
            assert torch.equal(found, expected)
            assert found.stride() == expected.stride()


class NoCopies(TorchDispatchMode):
    """Lets no operation have tensors of two devices."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
        assert len(devices) < 2, f"{function} copies between {devices}"
        return result


def test_it_never_makes_the_host_wait():
    """Tensors without values show it: none is read, and nothing is copied. PyTorch's own update does copy."""
    model = make_model().to("meta")
    average = averaging.make_average(model, 0.9)
    with NoCopies():
        for _ in range(3):
            averaging.update_average(average, model)
        with pytest.raises(AssertionError, match="copies between"):
            average.update_parameters(model)
    assert average.n_averaged.device.type == "cpu"


def test_without_a_decay_there_is_none():
    assert averaging.make_average(nn.Linear(1, 1), None) is None
