"""Backbones: each turns an image batch into the feature maps that the head predicts from.

The contract of a backbone is small: ``forward(images) -> list[Tensor]``, largest map first; ``out_channels``, the
channels of each map; and ``trainable_layers``, how many of its blocks train. Grid sizes, default boxes and the models
of the family are derived from it and from its entry in ``BACKBONES``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18, resnet34, resnet50, vgg

from .default_boxes import CAFFE_DEFAULT_BOXES, DefaultBoxGenerator
from .initialisation import kaiming_init, xavier_init
from .vgg_weights import load_vgg
from .weights import Weights, load_matching

Init = Callable[[nn.Module], None]  # see initialisation.py


class SSDFeatureExtractorVGG(nn.Module):
    """VGG as SSD uses it (paper section 3): fc6 and fc7 become convolutions, conv8 to conv11 follow.

    Args:
        features: the layers of a torchvision VGG, from the first convolution to the fifth pool.
        highres: the layers for an input of 512 pixels: one block more, and conv10 and conv11 halve the map as well.
        trainable_layers: how many of the five convolution blocks train, counted from the last; by default all. The
            others are frozen.
        init: initialises the layers that VGG has not.

    Raises:
        ValueError: ``trainable_layers`` is not 0 to 5.
    """

    def __init__(
        self,
        features: nn.Sequential,
        highres: bool = False,
        trainable_layers: int | None = None,
        init: Init = xavier_init,
    ):
        super().__init__()
        pools = [i for i, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
        self.trainable_layers = freeze_first_blocks(features, [0, *pools[:-1]], trainable_layers)
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
            init(block)
        self.extra = nn.ModuleList([nn.Sequential(*body[pool4:pool5], fc), *extra])
        self.out_channels = [512, 1024, 512] + [256] * (len(extra) - 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.features(images)
        # in float32 under autocast too, as the squares of 512 channels are summed; both heads would round it anew
        first = self.scale_weight.view(1, -1, 1, 1) * F.normalize(x.float())
        return [first.to(x.dtype), *outputs_of(self.extra, x)]


class SSDFeatureExtractorResNet(nn.Module):
    """ResNet's stages 2 to 4 and extra blocks, with the grids of SSD300 and SSD512.

    Args:
        backbone: a torchvision ResNet.
        highres: the layers for an input of 512 pixels: one block more, and all extra blocks halve the map.
        trainable_layers: how many of the five parts (stem, stages 1 to 4) train, counted from the last; by default
            all. The others are frozen, their batch norm included (``SSD.train``).
        init: initialises the extra blocks.

    Raises:
        ValueError: ``trainable_layers`` is not 0 to 5.
    """

    def __init__(
        self, backbone: ResNet, highres: bool = False, trainable_layers: int | None = None, init: Init = xavier_init
    ):
        super().__init__()
        stem = nn.Sequential(backbone.conv1, backbone.bn1, backbone.relu, backbone.maxpool)
        stages = nn.Sequential(stem, backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
        self.trainable_layers = freeze_first_blocks(stages, list(range(len(stages))), trainable_layers)
        self.features = stages[:3]
        channels = backbone.fc.in_features  # each stage has twice the channels of the one before
        small_map = {"stride": 2, "padding": 1} if highres else {}
        extra = [
            extra_block(channels, 256, 512, stride=2, padding=1, norm=True),
            extra_block(512, 128, 256, norm=True, **small_map),
            *([extra_block(256, 128, 256, norm=True, **small_map)] if highres else []),
            extra_block(256, 128, 256, **small_map),  # its map is one cell, too few values for batch norm
        ]
        for block in extra:
            init(block)
        self.extra = nn.ModuleList([*stages[3:], *extra])
        self.out_channels = [channels // 4, channels // 2, channels, 512] + [256] * (len(extra) - 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.features(images)
        return [x, *outputs_of(self.extra, x)]


class SSDFeatureExtractorLight(nn.Module):
    """Two 3x3 convolutions for each map, which halve the one before: for trials, without weights of ImageNet.

    Args:
        trainable_layers: how many of the seven parts (stem, and one for each map) train, counted from the last; by
            default all.
        init: initialises all layers.

    Raises:
        ValueError: ``trainable_layers`` is not 0 to 7.
    """

    def __init__(self, trainable_layers: int | None = None, init: Init = xavier_init):
        super().__init__()
        self.out_channels = [64, 128, 256, 128, 128, 128]
        stages = [nn.Sequential(*conv_norm(3, 16, stride=2), *conv_norm(16, 32, stride=2))]
        for in_channels, out_channels in zip([32, *self.out_channels], self.out_channels, strict=False):
            convs = *conv_norm(in_channels, out_channels, stride=2), *conv_norm(out_channels, out_channels)
            stages.append(nn.Sequential(*convs))
        self.features = nn.Sequential(*stages)
        self.trainable_layers = freeze_first_blocks(self.features, list(range(len(stages))), trainable_layers)
        init(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        stem, *stages = self.features
        return outputs_of(stages, stem(images))


def conv_norm(in_channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    """A 3x3 convolution, batch norm and ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def outputs_of(blocks: Iterable[nn.Module], x: Tensor) -> list[Tensor]:
    """What each of ``blocks`` makes of the output of the one before."""
    outputs = []
    for block in blocks:
        x = block(x)
        outputs.append(x)
    return outputs


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


def freeze_first_blocks(layers: nn.Sequential, block_starts: list[int], trainable_layers: int | None) -> int:
    """Freezes the parameters of all blocks but the last ``trainable_layers``; returns how many train."""
    num_blocks = len(block_starts)
    if trainable_layers is None:
        return num_blocks
    if not 0 <= trainable_layers <= num_blocks:
        raise ValueError(f"trainable backbone layers must be 0 to {num_blocks}, got {trainable_layers}")
    first_trainable = [*block_starts, len(layers)][num_blocks - trainable_layers]
    layers[:first_trainable].requires_grad_(False)
    return trainable_layers


def make_vgg(
    name: str, weights: Weights | None, size: int, subsample_fc: bool = False, **settings
) -> SSDFeatureExtractorVGG:
    """With the layers of torchvision's VGG of this name; see ``load_vgg`` for ``weights`` and ``subsample_fc``."""
    layers = vgg.make_layers(vgg.cfgs[VGG_LAYERS[name.removesuffix("_bn")]], batch_norm=name.endswith("_bn"))
    kaiming_init(layers)
    extractor = SSDFeatureExtractorVGG(layers, highres=is_highres(size), **settings)
    if weights is not None:
        _, fc6, _, fc7, _ = extractor.extra[0][-1]
        load_vgg(name, layers, nn.ModuleDict({"fc6": fc6, "fc7": fc7}), weights, subsample_fc)
    return extractor


def make_resnet(
    network: Callable[[], ResNet], weights: Weights | None, size: int, **settings
) -> SSDFeatureExtractorResNet:
    resnet = network()
    if weights is not None:
        load_matching(resnet, weights)
    return SSDFeatureExtractorResNet(resnet, highres=is_highres(size), **settings)


def make_light(weights: Weights | None, size: int, **settings) -> SSDFeatureExtractorLight:
    """For images of any ``size``."""
    extractor = SSDFeatureExtractorLight(**settings)
    if weights is not None:
        load_matching(extractor, weights)
    return extractor


def is_highres(size: int) -> bool:
    if size not in (300, 512):
        raise ValueError(f"VGG and ResNet have layers for inputs of 300 and 512 pixels, not of {size}")
    return size == 512


@dataclass(frozen=True)
class Backbone:
    """A backbone, and what belongs to it.

    Args:
        make: ``make(weights, size, trainable_layers, init)`` gives the module for images of ``size`` pixels;
            ``weights`` is a ``Weights`` or None.
        weights: those to begin with, torchvision's for ImageNet.
        input_scaling: what these were trained on, a key of ``INPUT_SCALINGS``.
        trainable_layers: how many blocks train by default, where it begins with weights; None for all.
        weight_init: how new layers are initialised, a key of ``WEIGHT_INITS``.
        default_boxes: by name and by size of the input, those of the first name by default; without any, or for
            another size, they are guessed.
        has_fc: whether ``make`` takes ``subsample_fc`` too, as ``load_vgg`` does.
    """

    make: Callable[..., nn.Module]
    weights: str | None
    input_scaling: str = "imagenet"
    trainable_layers: int | None = None
    weight_init: str = "xavier"
    default_boxes: dict[str, dict[int, DefaultBoxGenerator]] = field(default_factory=dict)
    has_fc: bool = False


VGG_LAYERS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}  # torchvision's names of them
# conv1 stays frozen, as in the run that made 25.1
VGG = partial(Backbone, trainable_layers=4, default_boxes=CAFFE_DEFAULT_BOXES, has_fc=True)

BACKBONES = {
    "vgg11": VGG(partial(make_vgg, "vgg11"), "VGG11_Weights.IMAGENET1K_V1"),
    "vgg11_bn": VGG(partial(make_vgg, "vgg11_bn"), "VGG11_BN_Weights.IMAGENET1K_V1"),
    "vgg13": VGG(partial(make_vgg, "vgg13"), "VGG13_Weights.IMAGENET1K_V1"),
    "vgg13_bn": VGG(partial(make_vgg, "vgg13_bn"), "VGG13_BN_Weights.IMAGENET1K_V1"),
    "vgg16": VGG(partial(make_vgg, "vgg16"), "VGG16_Weights.IMAGENET1K_FEATURES", input_scaling="caffe"),
    "vgg16_bn": VGG(partial(make_vgg, "vgg16_bn"), "VGG16_BN_Weights.IMAGENET1K_V1"),
    "vgg19": VGG(partial(make_vgg, "vgg19"), "VGG19_Weights.IMAGENET1K_V1"),
    "vgg19_bn": VGG(partial(make_vgg, "vgg19_bn"), "VGG19_BN_Weights.IMAGENET1K_V1"),
    "resnet18": Backbone(partial(make_resnet, resnet18), "ResNet18_Weights.IMAGENET1K_V1"),
    "resnet34": Backbone(partial(make_resnet, resnet34), "ResNet34_Weights.IMAGENET1K_V1"),
    "resnet50": Backbone(partial(make_resnet, resnet50), "ResNet50_Weights.IMAGENET1K_V1"),
    "light": Backbone(make_light, None),
}
