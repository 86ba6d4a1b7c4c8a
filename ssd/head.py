"""The prediction head: one 3x3 convolution per feature map for classes and one for offsets (paper section 2.1).

Dimension key: B images, A default boxes, C classes including the background.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .initialisation import xavier_init


def conv3x3(in_channels: int, out_channels: int) -> nn.Module:
    """What makes the predictions for one feature map, in the paper."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def predict(layers: Sequence[nn.Module], features: Tensor) -> Sequence[Tensor]:
    """What each of ``layers`` predicts from one feature map.

    On a GPU one convolution of many channels takes less time than two, of which one has few (``benchmarks/NOTES.md``).
    """
    if features.device.type == "cuda" and are_alike(layers):
        return convolve_together(layers, features)
    return [layer(features) for layer in layers]


def are_alike(layers: Sequence[nn.Module]) -> bool:
    """Whether they are plain convolutions that differ in their output channels alone, as ``conv3x3`` makes them."""
    if any(type(layer) is not nn.Conv2d or layer.bias is None or layer.groups > 1 for layer in layers):
        return False
    settings = [(one.kernel_size, one.stride, one.padding, one.dilation, one.padding_mode) for one in layers]
    return all(one == settings[0] and one[-1] == "zeros" for one in settings)


def convolve_together(convs: Sequence[nn.Conv2d], features: Tensor) -> Sequence[Tensor]:
    """What each of ``convs``, which ``are_alike``, makes of ``features``, by one convolution.

    Its output channels are filled up to a multiple of 8, so that tensor cores find them aligned.
    """
    channels = [conv.out_channels for conv in convs]
    missing = -sum(channels) % 8
    weight = F.pad(torch.cat([conv.weight for conv in convs]), (0, 0) * 3 + (0, missing))
    bias = F.pad(torch.cat([conv.bias for conv in convs]), (0, missing))
    together = F.conv2d(features, weight, bias, convs[0].stride, convs[0].padding, convs[0].dilation)
    return together.split([*channels, missing], dim=1)[:-1]


class SSDScoringHead(nn.Module):
    """The layers that predict ``num_columns`` values for each default box, one for each feature map."""

    def __init__(
        self,
        in_channels: list[int],
        num_anchors: list[int],
        num_columns: int,
        predictor: Callable[[int, int], nn.Module],
        init: Callable[[nn.Module], None],
    ):
        super().__init__()
        self.num_columns = num_columns
        self.module_list = nn.ModuleList(
            predictor(channels, anchors * num_columns)
            for channels, anchors in zip(in_channels, num_anchors, strict=True)
        )
        init(self)

    def flatten(self, predictions: Sequence[Tensor]) -> Tensor:
        """From all maps, [B, anchors * num_columns, H, W] each -> [B, A, num_columns], as default boxes are ordered."""
        per_cell = [prediction.permute(0, 2, 3, 1) for prediction in predictions]
        return torch.cat([cells.reshape(cells.shape[0], -1, self.num_columns) for cells in per_cell], dim=1)


class SSDHead(nn.Module):
    """Class logits and box offsets for every default box.

    Args:
        in_channels: channels of each feature map.
        num_anchors: default boxes per cell of each feature map.
        num_classes: classes including the background.
        predictor: makes the layers that predict from one map, from the numbers of channels that go in and out.
        init: initialises them, see ``ssd/initialisation.py``.
    """

    def __init__(
        self,
        in_channels: list[int],
        num_anchors: list[int],
        num_classes: int,
        *,
        predictor: Callable[[int, int], nn.Module] = conv3x3,
        init: Callable[[nn.Module], None] = xavier_init,
    ):
        super().__init__()
        self.classification_head = SSDScoringHead(in_channels, num_anchors, num_classes, predictor, init)
        self.regression_head = SSDScoringHead(in_channels, num_anchors, 4, predictor, init)

    def forward(self, feature_maps: list[Tensor]) -> dict[str, Tensor]:
        layers = zip(self.classification_head.module_list, self.regression_head.module_list, strict=True)
        predictions = [predict(pair, features) for pair, features in zip(layers, feature_maps, strict=True)]
        logits, offsets = zip(*predictions, strict=True)
        return {
            "cls_logits": self.classification_head.flatten(logits),  # [B, A, C]
            "bbox_regression": self.regression_head.flatten(offsets),  # [B, A, 4]
        }
