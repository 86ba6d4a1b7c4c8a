"""The prediction head: one 3x3 convolution per feature map for classes and one for offsets (paper section 2.1).

Dimension key: B images, A default boxes, C classes including the background.
"""

import torch
from torch import Tensor, nn


def xavier_init(module: nn.Module) -> None:
    """Xavier weights and zero biases for every convolution in ``module``, as Caffe's SSD initialises new layers."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class SSDScoringHead(nn.Module):
    """Predicts ``num_columns`` values for each default box of each feature map."""

    def __init__(self, in_channels: list[int], num_anchors: list[int], num_columns: int):
        super().__init__()
        self.num_columns = num_columns
        self.module_list = nn.ModuleList(
            nn.Conv2d(channels, anchors * num_columns, kernel_size=3, padding=1)
            for channels, anchors in zip(in_channels, num_anchors, strict=True)
        )
        xavier_init(self)

    def forward(self, feature_maps: list[Tensor]) -> Tensor:
        """Feature maps [B, channels, H, W] -> [B, A, num_columns], in the order of the default boxes."""
        predictions = []
        for conv, features in zip(self.module_list, feature_maps, strict=True):
            prediction = conv(features).permute(0, 2, 3, 1)  # [B, H, W, anchors * num_columns]
            predictions.append(prediction.reshape(len(prediction), -1, self.num_columns))
        return torch.cat(predictions, dim=1)


class SSDClassificationHead(SSDScoringHead):
    def __init__(self, in_channels: list[int], num_anchors: list[int], num_classes: int):
        super().__init__(in_channels, num_anchors, num_classes)


class SSDRegressionHead(SSDScoringHead):
    def __init__(self, in_channels: list[int], num_anchors: list[int]):
        super().__init__(in_channels, num_anchors, num_columns=4)


class SSDHead(nn.Module):
    """Class logits and box offsets for every default box.

    Args:
        in_channels: channels of each feature map.
        num_anchors: default boxes per cell of each feature map.
        num_classes: classes including the background.
    """

    def __init__(self, in_channels: list[int], num_anchors: list[int], num_classes: int):
        super().__init__()
        self.classification_head = SSDClassificationHead(in_channels, num_anchors, num_classes)
        self.regression_head = SSDRegressionHead(in_channels, num_anchors)

    def forward(self, feature_maps: list[Tensor]) -> dict[str, Tensor]:
        return {
            "cls_logits": self.classification_head(feature_maps),  # [B, A, C]
            "bbox_regression": self.regression_head(feature_maps),  # [B, A, 4]
        }
