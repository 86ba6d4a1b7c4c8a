"""SSD: Single Shot MultiBox Detector (Liu et al., 2016, https://arxiv.org/abs/1512.02325)."""

from .backbones import SSDFeatureExtractorResNet, SSDFeatureExtractorVGG
from .boxes import BoxCoder, pairwise_iou
from .default_boxes import DefaultBoxGenerator
from .head import SSDHead
from .matcher import SSDMatcher
from .model import SSD, ssd300_resnet18, ssd300_vgg16
from .postprocess import NotFiniteError
from .weights import VERSION, is_enum_name, load_file, load_state_dict, not_finite, save_file

MODELS = {"ssd300_vgg16": ssd300_vgg16, "ssd300_resnet18": ssd300_resnet18}

__all__ = [
    "MODELS",
    "SSD",
    "VERSION",
    "BoxCoder",
    "DefaultBoxGenerator",
    "NotFiniteError",
    "SSDFeatureExtractorResNet",
    "SSDFeatureExtractorVGG",
    "SSDHead",
    "SSDMatcher",
    "is_enum_name",
    "load_file",
    "load_state_dict",
    "not_finite",
    "pairwise_iou",
    "save_file",
    "ssd300_resnet18",
    "ssd300_vgg16",
]
