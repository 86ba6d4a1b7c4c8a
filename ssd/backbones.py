"""Backbones: each turns an image batch into the feature maps that the head predicts from.

The contract of a backbone is small: ``forward(images) -> list[Tensor]``, largest map first, and ``out_channels``, the
channels of each map. Everything else (grid sizes, number of default boxes) is derived from it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet

from .head import xavier_init


class SSDFeatureExtractorVGG(nn.Module):
    """VGG as SSD uses it (paper section 3): fc6 and fc7 become convolutions, conv8 to conv11 follow.

    Args:
        features: the layers of a torchvision VGG, from the first convolution to the fifth pool.
        highres: the layers for an input of 512 pixels: one block more, and conv10 and conv11 halve the map as well.
        trainable_layers: how many of the five convolution blocks train, counted from the last. The others are frozen.

    Raises:
        ValueError: ``trainable_layers`` is not 0 to 5.
    """

    def __init__(self, features: nn.Sequential, highres: bool = False, trainable_layers: int = 5):
        super().__init__()
        pools = [i for i, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
        freeze_first_blocks(features, [0, *pools[:-1]], trainable_layers)
        pool3, pool4, pool5 = pools[2:]

        # Caffe rounds pooled sizes up: 75 becomes 38 cells, not 37.
        body = list(features)
        body[pool3] = nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)
        # L2 norm with a learnable scale for conv4_3, whose values are larger than those of the other maps (section 3.1)
        self.scale_weight = nn.Parameter(torch.full((512,), 20.0))
        self.features = nn.Sequential(*body[:pool4])

        fc = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1),  # pool5 keeps the resolution
            nn.Conv2d(512, 1024, kernel_size=3, padding=6, dilation=6),  # fc6 "with atrous"
            nn.ReLU(inplace=True),
            nn.Conv2d(1024, 1024, kernel_size=1),  # fc7
            nn.ReLU(inplace=True),
        )
        small_map = {"stride": 2, "padding": 1} if highres else {}
        extra = [
            extra_block(1024, 256, 512, stride=2, padding=1),  # conv8
            extra_block(512, 128, 256, stride=2, padding=1),  # conv9
            extra_block(256, 128, 256, **small_map),  # conv10
            extra_block(256, 128, 256, **small_map),  # conv11
        ]
        if highres:
            extra.append(extra_block(256, 128, 256, kernel_size=4, padding=1))  # conv12
        for block in (fc, *extra):
            xavier_init(block)
        self.extra = nn.ModuleList([nn.Sequential(*body[pool4:pool5], fc), *extra])
        self.trainable_layers = trainable_layers
        self.out_channels = [512, 1024, 512] + [256] * (len(extra) - 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.features(images)
        # in float32 under autocast too: the squares of 512 channels are summed
        feature_maps = [self.scale_weight.view(1, -1, 1, 1) * F.normalize(x.float())]
        for block in self.extra:
            x = block(x)
            feature_maps.append(x)
        return feature_maps


class SSDFeatureExtractorResNet(nn.Module):
    """ResNet's stages 2 to 4 and three extra blocks, with the grid of SSD300: 38, 19, 10, 5, 3 and 1 cells.

    Args:
        backbone: a torchvision ResNet.
        trainable_layers: how many of the five parts (stem, stages 1 to 4) train, counted from the last. The others
            are frozen, their batch norm included.

    Raises:
        ValueError: ``trainable_layers`` is not 0 to 5.
    """

    def __init__(self, backbone: ResNet, trainable_layers: int = 5):
        super().__init__()
        stem = nn.Sequential(backbone.conv1, backbone.bn1, backbone.relu, backbone.maxpool)
        stages = nn.Sequential(stem, backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
        freeze_first_blocks(stages, list(range(len(stages))), trainable_layers)
        self.features = stages[:3]
        channels = backbone.fc.in_features  # each stage has twice the channels of the one before
        extra = [
            extra_block(channels, 256, 512, stride=2, padding=1, norm=True),
            extra_block(512, 128, 256, norm=True),
            extra_block(256, 128, 256),  # its map is one cell, too few values for batch norm
        ]
        for block in extra:
            xavier_init(block)
        self.extra = nn.ModuleList([*stages[3:], *extra])
        self.frozen_stages = list(stages[: len(stages) - trainable_layers])
        self.trainable_layers = trainable_layers
        self.out_channels = [channels // 4, channels // 2, channels, 512, 256, 256]

    def train(self, mode: bool = True) -> "SSDFeatureExtractorResNet":
        super().train(mode)
        for stage in self.frozen_stages:
            stage.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.features(images)
        feature_maps = [x]
        for block in self.extra:
            x = block(x)
            feature_maps.append(x)
        return feature_maps


def extra_block(in_channels, hidden_channels, out_channels, kernel_size=3, norm=False, **last_conv) -> nn.Sequential:
    """1x1 convolution to ``hidden_channels``, then the convolution that makes the next, smaller feature map."""
    convs = [
        nn.Conv2d(in_channels, hidden_channels, kernel_size=1, bias=not norm),
        nn.Conv2d(hidden_channels, out_channels, kernel_size=kernel_size, bias=not norm, **last_conv),
    ]
    layers = []
    for conv in convs:
        layers.append(conv)
        if norm:
            layers.append(nn.BatchNorm2d(conv.out_channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def freeze_first_blocks(layers: nn.Sequential, block_starts: list[int], trainable_layers: int) -> None:
    """Freezes the parameters of all blocks but the last ``trainable_layers``."""
    num_blocks = len(block_starts)
    if not 0 <= trainable_layers <= num_blocks:
        raise ValueError(f"trainable backbone layers must be 0 to {num_blocks}, got {trainable_layers}")
    first_trainable = [*block_starts, len(layers)][num_blocks - trainable_layers]
    layers[:first_trainable].requires_grad_(False)
