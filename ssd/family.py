"""The family: every backbone at its input sizes, as a whole model that weights can be loaded into."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torchvision.models import get_weight

from .backbones import BACKBONES, Backbone
from .head import SSDHead, conv3x3
from .initialisation import WEIGHT_INITS
from .model import INPUT_SCALINGS, SSD
from .ssdlite import MOBILENET_V3_LARGE, SSDLITE_SETTINGS, separable_conv3x3
from .weights import is_enum_name, load_matching, load_weights, told

NUM_COCO_CLASSES = 91  # the background and COCO's category ids, which run from 1 to 90 with gaps
CLASSIFICATION_HEAD = "head.classification_head."


def list_models() -> list[str]:
    """The names of the family, as ``torchvision.models.list_models`` has those of its models."""
    return list(MODELS)


def get_model(name: str, **config) -> SSD:
    """A member of the family, as ``torchvision.models.get_model`` makes one.

    ``get_model("ssd300_vgg16", weights="SSD300_VGG16_Weights.COCO_V1")`` is published with 25.1 mAP on COCO val2017.

    Args:
        name: one of ``list_models()``.
        config: the keyword arguments of ``build``.

    Raises:
        ValueError: there is no such model; or weights are missing, damaged, of another model, or of another input
            scaling than asked for.
        TypeError: an unknown keyword argument.
    """
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}; ssd.list_models() has the names of all: {', '.join(MODELS)}")
    return MODELS[name](**config)


def build(
    backbone: Backbone,
    size: int,
    *,
    weights: str | None = None,
    num_classes: int | None = None,
    weights_backbone: str | None = "default",
    trainable_backbone_layers: int | None = None,
    input_scaling: str = "default",
    weight_init: str = "default",
    predictor: Callable[[int, int], nn.Module] = conv3x3,
    **kwargs,
) -> SSD:
    """A whole model.

    Args:
        backbone: an entry of ``BACKBONES``.
        size: side of the network input in pixels.
        weights: weights of the whole model: ``SSD300_VGG16_Weights.COCO_V1``, or a file (state dict or checkpoint).
            ``"none"`` means None, here and below.
        num_classes: number of classes, background included. By default as many as ``weights`` have, else 91 (COCO).
            Where ``weights`` have another number, the layers that it shapes begin anew; ``initialised_anew`` of the
            model names them.
        weights_backbone: weights of the backbone: the name of a torchvision enum, or a file; None for random weights,
            ``"default"`` for those that ``backbone`` names. Not read where ``weights`` are given.
        trainable_backbone_layers: how many of the backbone's blocks train, counted from the last. By default as
            ``backbone`` has it if there are weights (4 of 5 for a VGG), else all.
        input_scaling: a key of ``INPUT_SCALINGS``; by default the one that the weights were trained with, as far as
            they tell, else that of ``backbone``.
        weight_init: how the layers begin that SSD adds to a backbone, a key of ``WEIGHT_INITS``; by default that of
            ``backbone``.
        predictor: see ``SSDHead``.
        kwargs: keyword arguments of ``SSD``.

    Raises:
        ValueError: see ``get_model``.
    """
    if weights_backbone == "default":
        weights_backbone = backbone.weights
    weights, weights_backbone = (None if source == "none" else source for source in (weights, weights_backbone))
    if trainable_backbone_layers is None and (weights or weights_backbone):
        trainable_backbone_layers = backbone.trainable_layers
    content = None
    if weights is not None:
        content, weights_backbone = load_weights(weights), None
    init = WEIGHT_INITS[backbone.weight_init if weight_init == "default" else weight_init]
    features = backbone.make(weights_backbone, size=size, trainable_layers=trainable_backbone_layers, init=init)
    scaling = choose_scaling(input_scaling, backbone, weights_backbone, content, weights)
    if num_classes is None:
        num_classes = NUM_COCO_CLASSES if content is None else count_classes(content["model"], weights)
    model = SSD(
        features,
        backbone.default_boxes.get(size),
        size,
        num_classes,
        head=partial(SSDHead, predictor=predictor, init=init),
        input_scaling=scaling,
        **kwargs,
    )
    if content is not None:
        model.initialised_anew = load_fitting(model, content, weights)
    return model


def choose_scaling(
    asked: str, backbone: Backbone, weights_backbone: str | None, content: dict | None, weights: str | None
) -> str:
    """The input scaling that is asked for, else that of the weights, of either kind, else that of ``backbone``."""
    if content is None:
        told_by_weights = scaling_of_backbone(weights_backbone)
    else:
        told_by_weights = scaling_of_model(content, weights, backbone, asked)
    return asked if asked != "default" else told_by_weights or backbone.input_scaling


def scaling_of_model(content: dict, source: str, backbone: Backbone, asked: str) -> str | None:
    """The input scaling that weights of a whole model were trained with, if a checkpoint or torchvision tells.

    Raises:
        ValueError: it tells one that there is not, or another than was asked for.
    """
    scaling = backbone.input_scaling if is_enum_name(source) else told(content, "input_scaling")
    if scaling not in [None, *INPUT_SCALINGS]:
        raise ValueError(f"{source}: damaged: it was trained with an unknown input scaling, {scaling!r}")
    if scaling is not None and asked not in ("default", scaling):
        raise ValueError(
            f"{source}: was trained with another input scaling than {asked}; use --input-scaling {scaling}"
        )
    return scaling


def scaling_of_backbone(weights: str | None) -> str | None:
    """The input scaling that weights of a backbone were trained with, if they are torchvision's, which tells."""
    if weights is None or not is_enum_name(weights):
        return None
    transforms = get_weight(str(weights)).transforms()
    scaling = tuple(transforms.mean), tuple(transforms.std)
    return next((name for name, known in INPUT_SCALINGS.items() if known == scaling), None)


def count_classes(state_dict: dict[str, Tensor], source: str) -> int:
    """Number of classes, background included, that the weights of a whole model predict.

    Raises:
        ValueError: they are no such weights.
    """
    outputs = []
    for head in ("classification_head", "regression_head"):
        predictor = [name for name in state_dict if name.startswith(f"head.{head}.module_list.0.")]
        if not predictor:
            raise ValueError(f"{source}: not the weights of an SSD model (it has no {head.replace('_', ' ')})")
        outputs.append(state_dict[predictor[-1]].numel())  # biases: of each class, and of each coordinate of a box
    scores, coordinates = outputs
    if scores == 0 or coordinates == 0 or 4 * scores % coordinates:
        raise ValueError(f"{source}: damaged: its heads have {scores} scores for {coordinates} coordinates of boxes")
    return 4 * scores // coordinates


def load_fitting(model: SSD, content: dict, source: str) -> list[str]:
    """Loads everything, but for scores of another number of classes; returns the names of what stays as it was."""
    own, state_dict = model.state_dict(), content["model"]
    num_classes = count_classes(state_dict, source)
    anew = {}
    for name, value in own.items():
        saved = state_dict.get(name)
        if name.startswith(CLASSIFICATION_HEAD) and saved is not None and value.dim() and saved.shape != value.shape:
            of_other_classes = (len(value) // model.num_classes * num_classes, *value.shape[1:])
            if saved.shape == of_other_classes:  # else it is damaged, and will not load
                anew[name] = value
    model_name = told(content, "model")
    load_matching(model, state_dict | anew, f"{source} (of {model_name})" if model_name else source)
    return list(anew)


MODELS = {
    f"ssd{size}_{name}": partial(build, backbone, size) for size in (300, 512) for name, backbone in BACKBONES.items()
}
MODELS["ssdlite320_mobilenet_v3_large"] = partial(
    build, MOBILENET_V3_LARGE, 320, predictor=separable_conv3x3, **SSDLITE_SETTINGS
)
