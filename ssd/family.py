"""The family: every backbone at its input sizes, as a whole model that weights can be loaded into."""

from functools import partial

from torch import Tensor
from torchvision.models import get_weight

from .backbones import BACKBONES, Backbone
from .head import SSDHead, conv3x3
from .initialisation import WEIGHT_INITS
from .model import INPUT_SCALINGS, SSD
from .ssdlite import MOBILENET_V3_LARGE, SSDLITE_SETTINGS, separable_conv3x3
from .weights import is_enum_name, load_matching, load_weights

NUM_COCO_CLASSES = 91  # the background and COCO's category ids, which run from 1 to 90 with gaps
CLASSIFICATION_HEAD = "head.classification_head."


def build(
    backbone: Backbone,
    size: int,
    *,
    weights: str | None = None,
    num_classes: int | None = None,
    weights_backbone: str | None = "default",
    trainable_backbone_layers: int | None = None,
    input_scaling: str | None = None,
    weight_init: str | None = None,
    predictor=conv3x3,
    **kwargs,
) -> SSD:
    """A member of the family. ``MODELS["ssd300_vgg16"]`` has 25.1 mAP on COCO val2017 with torchvision's weights.

    Args:
        backbone: an entry of ``BACKBONES``.
        size: side of the network input in pixels.
        weights: weights of the whole model: ``SSD300_VGG16_Weights.COCO_V1``, or a file (state dict or checkpoint).
            ``"none"`` means None, here and below.
        num_classes: number of classes, background included. By default as many as ``weights`` have, else 91 (COCO).
            Where ``weights`` have another number, the layers that it shapes begin anew, and ``initialised_anew`` of
            the model has their names (None without ``weights``).
        weights_backbone: weights of the backbone: the name of a torchvision enum, or a file; None for random weights.
            Not read where ``weights`` are given.
        trainable_backbone_layers: how many of the backbone's blocks train, counted from the last. By default as
            ``backbone`` has it if there are weights (4 of 5 for a VGG), else all.
        input_scaling: a key of ``INPUT_SCALINGS``; by default the one that the weights were trained with, as far as
            they tell, else that of ``backbone``.
        weight_init: how layers without weights begin, a key of ``WEIGHT_INITS``; by default that of ``backbone``.
        predictor: see ``SSDHead``.
        kwargs: keyword arguments of ``SSD``.

    Raises:
        ValueError: weights that are missing, damaged or of another model.
        TypeError: an unknown keyword argument.
    """
    if weights_backbone == "default":
        weights_backbone = backbone.weights
    weights, weights_backbone = (None if source == "none" else source for source in (weights, weights_backbone))
    if trainable_backbone_layers is None and (weights or weights_backbone):
        trainable_backbone_layers = backbone.trainable_layers
    content = None
    if weights is not None:
        content, weights_backbone = load_weights(weights), None
    init = WEIGHT_INITS[weight_init or backbone.weight_init]
    feature_extractor = backbone.make(
        weights_backbone, size=size, trainable_layers=trainable_backbone_layers, init=init
    )
    if input_scaling is None:
        told = scaling_of_backbone(weights_backbone) if content is None else scaling_of_checkpoint(content, weights)
        input_scaling = told or backbone.input_scaling
    if num_classes is None:
        num_classes = NUM_COCO_CLASSES if content is None else count_classes(content["model"], weights)
    model = SSD(
        feature_extractor,
        backbone.default_boxes.get(size),
        size,
        num_classes,
        head=partial(SSDHead, predictor=predictor, init=init),
        input_scaling=input_scaling,
        **kwargs,
    )
    model.initialised_anew = None if content is None else load_fitting(model, content["model"], weights)
    return model


def scaling_of_checkpoint(content: dict, source: str) -> str | None:
    """The input scaling that a checkpoint was trained with, if it tells.

    Raises:
        ValueError: it tells one that there is not.
    """
    arguments = content.get("args")  # torchvision's are no dict
    told = arguments.get("input_scaling") if isinstance(arguments, dict) else None
    if told not in [None, *INPUT_SCALINGS]:
        raise ValueError(f"{source}: was trained with an unknown input scaling, {told!r}")
    return told


def scaling_of_backbone(weights: str | None) -> str | None:
    """The input scaling that weights of a backbone were trained with, if they are torchvision's, which tells."""
    if weights is None or not is_enum_name(weights):
        return None
    transforms = get_weight(str(weights)).transforms()
    told = tuple(transforms.mean), tuple(transforms.std)
    return next((name for name, scaling in INPUT_SCALINGS.items() if scaling == told), None)


def count_classes(state_dict: dict[str, Tensor], source: str) -> int:
    """Number of classes, background included, that the weights of a whole model predict."""
    biases = []
    for head in ("classification_head", "regression_head"):
        predictor = [name for name in state_dict if name.startswith(f"head.{head}.module_list.0.")]
        if not predictor:
            raise ValueError(f"{source}: not the weights of an SSD model (it has no {head.replace('_', ' ')})")
        biases.append(len(state_dict[predictor[-1]]))
    return 4 * biases[0] // biases[1]  # the one for each class, the other for each coordinate of a default box


def load_fitting(model: SSD, state_dict: dict[str, Tensor], source: str) -> list[str]:
    """Loads everything but scores of another number of classes; returns the names of what stays as it was."""
    own = model.state_dict()
    anew = {
        name: own[name]
        for name, value in state_dict.items()
        if name.startswith(CLASSIFICATION_HEAD) and name in own and value.shape != own[name].shape
    }
    load_matching(model, state_dict | anew, source)
    return list(anew)


MODELS = {
    f"ssd{size}_{name}": partial(build, backbone, size) for size in (300, 512) for name, backbone in BACKBONES.items()
}
MODELS["ssdlite320_mobilenet_v3_large"] = partial(
    build, MOBILENET_V3_LARGE, 320, predictor=separable_conv3x3, **SSDLITE_SETTINGS
)
