import pytest
import torch
from torch import nn

from engine import execution


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [
        ("cuda", "AVX2", torch.channels_last),
        ("cpu", "AVX512", torch.channels_last),
        ("cpu", "AVX2", torch.contiguous_format),
        ("cpu", "DEFAULT", torch.contiguous_format),
    ],
)
def test_a_device_gets_the_layout_that_it_is_fast_with(monkeypatch, device, capability, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert execution.memory_format(torch.device(device)) == expected


class Pools(nn.Module):
    """Those that VGG has: two by two, rounded up, and three by three that keep the size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        pools = (nn.MaxPool2d(2), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(3, stride=1, padding=1))
        self.pools = nn.Sequential(*pools)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.pools(self.conv(images).relu())


@pytest.mark.parametrize(
    ("mode", "is_distributed", "expected"),
    [
        ("auto", False, "reduce-overhead"),
        ("auto", True, "default"),
        ("default", False, "default"),
        ("max-autotune", True, "max-autotune"),
    ],
)
def test_graphs_are_recorded_where_gradients_are_not_exchanged(monkeypatch, mode, is_distributed, expected):
    settings = {}
    monkeypatch.setattr(nn.Module, "compile", lambda module, **given: settings.update(given))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: is_distributed)
    execution.compile_whole(nn.ReLU(), mode)
    assert settings == {"mode": expected, "fullgraph": True}


def test_pools_are_compiled_without_atomic_additions():
    pytest.importorskip("triton", reason="PyTorch without Triton writes no code for GPUs")
    from benchmarks.generated_code import code_for_gpu, count, graphs_of

    net = Pools().to(memory_format=torch.channels_last)
    execution.compile_whole(net, "default")  # which is told, before anything is compiled
    graphs = graphs_of(net, lambda: net(torch.rand(2, 3, 33, 33)).sum().backward())
    forward, backward = map(code_for_gpu, graphs)
    assert count(forward)["convolutions"] == count(backward)["convolutions"] == 1
    assert "max_pool2d_with_indices_backward" in backward
    assert count(backward)["Triton kernels"] > 0
    assert count(backward)["atomic additions"] == 0
