import pytest
import torch
from torch import nn

import ssd
from ssd.head import are_alike, conv3x3, convolve_together


@pytest.mark.parametrize("channels", [(28, 16), (364, 16), (546, 24), (5, 2)])
def test_convolutions_together_are_what_they_are_alone(monkeypatch, channels):
    """Values and gradients; and what the one convolution has for output is a multiple of 8."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, number, kernel_size=3, padding=1, dtype=torch.float64) for number in channels]
    features = torch.rand(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    parameters = [features, *(parameter for conv in convs for parameter in conv.parameters())]

    def with_gradients(outputs) -> list[torch.Tensor]:
        return [*outputs, *torch.autograd.grad(sum(output.square().sum() for output in outputs), parameters)]

    expected = with_gradients([conv(features) for conv in convs])
    sizes, conv2d = [], torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda x, weight, *args: sizes.append(len(weight)) or conv2d(x, weight, *args)
    )
    torch.testing.assert_close(with_gradients(convolve_together(convs, features)), expected, rtol=1e-12, atol=1e-12)
    assert sizes == [sum(channels) + -sum(channels) % 8]


def test_what_a_gpu_does_is_compiled_as_one_graph():
    layers = [conv3x3(4, 6), conv3x3(4, 8)]
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    features = torch.rand(1, 4, 5, 5)
    predict = torch.compile(
        lambda x: convolve_together(layers, x) if are_alike(layers) else None, backend=keep, fullgraph=True
    )
    torch.testing.assert_close(predict(features), tuple(conv(features) for conv in layers))
    (graph,) = graphs
    assert sum("conv2d" in str(node.target) for node in graph.graph.nodes) == 1


class Doubled(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (conv3x3(4, 8), True),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3), False),
        (nn.Conv2d(4, 8, 3, padding=1, stride=2), False),
        (nn.Conv2d(4, 8, 3, padding=2, dilation=2), False),
        (nn.Conv2d(4, 8, 3, padding=1, groups=2), False),
        (nn.Conv2d(4, 8, 3, padding=1, bias=False), False),
        (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), False),
        (Doubled(4, 8, 3, padding=1), False),
        (nn.Sequential(conv3x3(4, 8)), False),
    ],
)
def test_only_what_is_alike_is_joined(other, expected):
    assert are_alike([conv3x3(4, 6), other]) == expected


def test_convolutions_that_reflect_stay_alone():
    reflecting = [nn.Conv2d(4, number, 3, padding=1, padding_mode="reflect") for number in (6, 8)]
    assert not are_alike(reflecting)
    dilated = [nn.Conv2d(4, number, 3, padding=2, dilation=2) for number in (6, 8)]
    features = torch.rand(1, 4, 9, 9)
    assert are_alike(dilated)
    torch.testing.assert_close(convolve_together(dilated, features), tuple(conv(features) for conv in dilated))


def test_predictions_are_in_the_order_of_the_default_boxes():
    """Map by map, row by row, cell by cell, and for each cell its default boxes."""
    head = ssd.SSDHead([1, 1], [2, 1], num_classes=3, init=lambda module: None)
    for i, conv in enumerate(head.classification_head.module_list):
        nn.init.zeros_(conv.weight)
        conv.weight.data[:, 0, 1, 1] = 1  # the value of the cell
        conv.bias.data = 100.0 * (i + 1) + 10 * torch.arange(len(conv.bias))
    maps = [torch.arange(4.0).view(1, 1, 2, 2), torch.full((1, 1, 1, 1), 7.0)]
    logits = head(maps)["cls_logits"]
    assert logits.shape == (1, 9, 3)
    first = [[100 + 10 * (3 * box + k) + cell for k in range(3)] for cell in range(4) for box in range(2)]
    assert logits[0].tolist() == [*first, [207, 217, 227]]
