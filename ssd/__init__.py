"""SSD: Single Shot MultiBox Detector (Liu et al., 2016, https://arxiv.org/abs/1512.02325)."""

from .backbones import SSDFeatureExtractorResNet, SSDFeatureExtractorVGG
from .boxes import BoxCoder, pairwise_iou
from .default_boxes import DefaultBoxGenerator, guess_default_boxes
from .family import MODELS
from .head import SSDHead
from .initialisation import WEIGHT_INITS
from .matcher import SSDMatcher
from .model import INPUT_SCALINGS, SSD
from .postprocess import NotFiniteError
from .ssdlite import SSDLiteFeatureExtractorMobileNet
from .weights import VERSION, is_enum_name, load_file, load_state_dict, not_finite, save_file, told

__all__ = [
    "INPUT_SCALINGS",
    "MODELS",
    "SSD",
    "VERSION",
    "WEIGHT_INITS",
    "BoxCoder",
    "DefaultBoxGenerator",
    "NotFiniteError",
    "SSDFeatureExtractorResNet",
    "SSDFeatureExtractorVGG",
    "SSDHead",
    "SSDLiteFeatureExtractorMobileNet",
    "SSDMatcher",
    "guess_default_boxes",
    "is_enum_name",
    "load_file",
    "load_state_dict",
    "not_finite",
    "pairwise_iou",
    "save_file",
    "told",
]
