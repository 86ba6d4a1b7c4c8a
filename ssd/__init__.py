"""SSD: Single Shot MultiBox Detector (Liu et al., 2016, https://arxiv.org/abs/1512.02325).

The model, with torch and torchvision alone:

model.py           the detector, its loss, its post-processing
boxes.py           IoU, and offsets from default boxes
default_boxes.py   the fixed boxes that predictions are relative to
matcher.py         which default box predicts which object
head.py            predictions from feature maps
postprocess.py     candidates, and their suppression
backbones.py       VGG and ResNet as SSD uses them, and a light one; a new backbone goes here
ssdlite.py         SSDlite on MobileNetV3
initialisation.py  how layers begin that have no weights
family.py          every backbone at its input sizes, as a whole model
weights.py         where weights come from: files, and torchvision's enums
vgg_weights.py     what a VGG brings along: its convolutions, and its classifier as fc6 and fc7
export.py          the model as a file that runs without this repository
files.py           files of tensors: written whole or not at all, sealed, read as plain data
"""

from .backbones import SSDFeatureExtractorLight, SSDFeatureExtractorResNet, SSDFeatureExtractorVGG
from .boxes import BoxCoder, pairwise_iou
from .default_boxes import CAFFE_DEFAULT_BOXES, DefaultBoxGenerator, guess_default_boxes
from .export import EXPORT_OUTPUTS, METADATA_FILE, check_export_target, check_installed, export_model, quietly
from .family import get_model, list_models
from .files import VERSION, first_line, load_file, save_file, write_file
from .head import SSDHead
from .initialisation import WEIGHT_INITS
from .matcher import SSDMatcher
from .model import INPUT_SCALINGS, SSD
from .postprocess import NotFiniteError, check_finite, find_detections, resize_boxes
from .ssdlite import SSDLiteFeatureExtractorMobileNet
from .weights import find_published, is_enum_name, not_finite, told

__all__ = [
    "CAFFE_DEFAULT_BOXES",
    "EXPORT_OUTPUTS",
    "INPUT_SCALINGS",
    "METADATA_FILE",
    "SSD",
    "VERSION",
    "WEIGHT_INITS",
    "BoxCoder",
    "DefaultBoxGenerator",
    "NotFiniteError",
    "SSDFeatureExtractorLight",
    "SSDFeatureExtractorResNet",
    "SSDFeatureExtractorVGG",
    "SSDHead",
    "SSDLiteFeatureExtractorMobileNet",
    "SSDMatcher",
    "check_export_target",
    "check_finite",
    "check_installed",
    "export_model",
    "find_detections",
    "find_published",
    "first_line",
    "get_model",
    "guess_default_boxes",
    "is_enum_name",
    "list_models",
    "load_file",
    "not_finite",
    "pairwise_iou",
    "quietly",
    "resize_boxes",
    "save_file",
    "told",
    "write_file",
]
