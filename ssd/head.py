"""The prediction head: one 3x3 convolution per feature map for classes and one for offsets (paper section 2.1).

Dimension key: B images, A default boxes, C classes including the background.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .initialisation import xavier_init


def conv3x3(in_channels: int, out_channels: int) -> nn.Module:
    """What makes the predictions for one feature map, in the paper."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


class SSDScoringHead(nn.Module):
    """Predicts ``num_columns`` values for each default box of each feature map."""

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

    def forward(self, feature_maps: list[Tensor]) -> Tensor:
        """Feature maps [B, channels, H, W] -> [B, A, num_columns], in the order of the default boxes."""
        predictions = []
        for predict, features in zip(self.module_list, feature_maps, strict=True):
            prediction = predict(features).permute(0, 2, 3, 1)  # [B, H, W, anchors * num_columns]
            predictions.append(prediction.reshape(len(prediction), -1, self.num_columns))
        return torch.cat(predictions, dim=1)


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
        return {
            "cls_logits": self.classification_head(feature_maps),  # [B, A, C]
            "bbox_regression": self.regression_head(feature_maps),  # [B, A, 4]
        }
