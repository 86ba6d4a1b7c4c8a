"""SSDlite: SSD with depthwise separable convolutions (MobileNetV2, section 6.2) on MobileNetV3, as in torchvision.

The state dict has the keys and shapes of ``torchvision.models.detection.ssdlite320_mobilenet_v3_large``.
"""

from functools import partial
from itertools import pairwise

from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large
from torchvision.ops import Conv2dNormActivation

from .backbones import Backbone, Init, freeze_first_blocks, outputs_of
from .default_boxes import DefaultBoxGenerator
from .initialisation import normal_init
from .weights import Weights, load_matching

BatchNorm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
ConvNormReLU6 = partial(Conv2dNormActivation, norm_layer=BatchNorm, activation_layer=nn.ReLU6)

# of SSD, where they differ from those of SSD300
SSDLITE_SETTINGS = {
    "score_thresh": 0.001,
    "nms_thresh": 0.55,
    "detections_per_img": 300,
    "topk_candidates": 300,
}


def separable_conv3x3(in_channels: int, out_channels: int) -> nn.Sequential:
    """Makes the predictions for one feature map: each channel filtered alone, then all mixed."""
    return nn.Sequential(
        ConvNormReLU6(in_channels, in_channels, kernel_size=3, groups=in_channels),
        nn.Conv2d(in_channels, out_channels, kernel_size=1),
    )


def separable_extra_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Makes the next feature map, of half the size."""
    hidden = out_channels // 2
    return nn.Sequential(
        ConvNormReLU6(in_channels, hidden, kernel_size=1),
        ConvNormReLU6(hidden, hidden, kernel_size=3, stride=2, groups=hidden),
        ConvNormReLU6(hidden, out_channels, kernel_size=1),
    )


class SSDLiteFeatureExtractorMobileNet(nn.Module):
    """MobileNet from the expansion of its last halving block on, and four extra blocks.

    Args:
        layers: the feature layers of a torchvision MobileNetV3.
        trainable_layers: how many of the six blocks, each of which begins with a halving of the map (the sixth is the
            last layer), train, counted from the last; by default all.
        init: initialises the extra blocks.

    Raises:
        ValueError: ``trainable_layers`` is not 0 to 6.
    """

    def __init__(self, layers: nn.Sequential, trainable_layers: int | None = None, init: Init = normal_init):
        super().__init__()
        halving = [i for i, layer in enumerate(layers) if any(has_stride(module) for module in layer.modules())]
        self.trainable_layers = freeze_first_blocks(layers, [*halving, len(layers) - 1], trainable_layers)
        last_halving = layers[halving[-1]].block
        self.features = nn.Sequential(
            nn.Sequential(*layers[: halving[-1]], last_halving[0]),
            nn.Sequential(last_halving[1:], *layers[halving[-1] + 1 :]),
        )
        channels = [layers[-1].out_channels, 512, 256, 256, 128]
        self.extra = nn.ModuleList(separable_extra_block(*pair) for pair in pairwise(channels))
        init(self.extra)
        self.out_channels = [last_halving[0].out_channels, *channels]

    def forward(self, images: Tensor) -> list[Tensor]:
        return outputs_of((*self.features, *self.extra), images)


def has_stride(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.stride != (1, 1)


def make_mobilenet(weights: Weights | None, size: int, **settings) -> SSDLiteFeatureExtractorMobileNet:
    """With torchvision's MobileNetV3-Large, whose last layers have half the channels (MobileNetV3, table 6).

    torchvision's weights for ImageNet are for all channels; the published model was trained without any.
    """
    network = mobilenet_v3_large(reduced_tail=True, norm_layer=BatchNorm)
    normal_init(network)
    if weights is not None:
        load_matching(network, weights)
    return SSDLiteFeatureExtractorMobileNet(network.features, **settings)


MOBILENET_V3_LARGE = Backbone(
    make_mobilenet,
    weights=None,
    input_scaling="tensorflow",
    weight_init="normal",
    default_boxes={"default": {320: DefaultBoxGenerator([[2, 3]] * 6, min_ratio=0.2, max_ratio=0.95)}},
)
