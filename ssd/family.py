"""The family: every backbone at its input sizes, as a whole model that weights can be loaded into."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from torch import nn

from .backbones import BACKBONES, Backbone
from .default_boxes import CAFFE_DEFAULT_BOXES
from .head import SSDHead, conv3x3
from .initialisation import WEIGHT_INITS
from .model import INPUT_SCALINGS, SSD
from .ssdlite import MOBILENET_V3_LARGE, SSDLITE_SETTINGS, separable_conv3x3
from .vgg_weights import is_reduced
from .weights import Weights, describe_keys, load_matching, load_weights, told

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
        ValueError: there is no such model; or weights are missing, damaged, of another model, or trained with another
            input scaling or other default boxes than asked for.
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
    default_boxes: str = "default",
    weight_init: str = "default",
    subsample_fc: bool = False,
    ema: bool = True,
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
            they tell, else that of ``backbone``. Where that is assumed of weights, ``notes`` of the model say so.
        default_boxes: a key of ``CAFFE_DEFAULT_BOXES``, for a VGG; by default those that ``weights`` were trained with,
            as far as they tell, else those of ``backbone``, as above. ``default_boxes_name`` of the model has the
            name, ``"default"`` where they are not Caffe's.
        weight_init: how the layers begin that SSD adds to a backbone, a key of ``WEIGHT_INITS``; by default that of
            ``backbone``.
        subsample_fc: begin fc6 and fc7 with the classifier of ``weights_backbone``, those of a VGG (``load_vgg``).
        ema: take the moving average of weights, ``model_ema`` of a checkpoint, where ``weights`` or
            ``weights_backbone`` have it; ``notes`` of the model say so.
        predictor: see ``SSDHead``.
        kwargs: keyword arguments of ``SSD``.

    Raises:
        ValueError: see ``get_model``.
    """
    if weights_backbone == "default":
        weights_backbone = backbone.weights
    whole, of_backbone = None, None
    if weights not in (None, "none"):
        whole = load_weights(weights, ema)
    elif weights_backbone not in (None, "none"):
        of_backbone = load_weights(weights_backbone, ema)
    loaded = whole or of_backbone
    if trainable_backbone_layers is None and loaded:
        trainable_backbone_layers = backbone.trainable_layers
    init, head_init = WEIGHT_INITS[backbone.weight_init if weight_init == "default" else weight_init]
    make = partial(backbone.make, subsample_fc=True) if subsample_fc and backbone.has_fc else backbone.make
    features = make(of_backbone, size=size, trainable_layers=trainable_backbone_layers, init=init)
    scaling = choose_scaling(input_scaling, backbone, whole, of_backbone)
    boxes_name = choose_boxes(default_boxes, backbone, size, whole)
    if num_classes is None:
        num_classes = NUM_COCO_CLASSES if whole is None else count_classes(whole)
    model = SSD(
        features,
        backbone.default_boxes.get(boxes_name, {}).get(size),
        size,
        num_classes,
        head=partial(SSDHead, predictor=predictor, init=head_init),
        input_scaling=scaling,
        **kwargs,
    )
    model.default_boxes_name = boxes_name
    if whole is not None:
        model.initialised_anew = load_fitting(model, whole)
    if loaded is not None:
        model.notes = loaded.notes
    return model


def choose_scaling(asked: str, backbone: Backbone, whole: Weights | None, of_backbone: Weights | None) -> str:
    """The input scaling that is asked for, else that of the weights, of either kind, else that of ``backbone``.

    Raises:
        ValueError: see ``told_by_model``.
    """
    what, usual = "input scaling", backbone.input_scaling
    if whole is not None:
        told_by_weights = told_by_model(whole, what, asked, INPUT_SCALINGS, of_torchvision=usual)
    else:
        told_by_weights = of_backbone and scaling_of_backbone(of_backbone, backbone)
    return settle(what, asked, told_by_weights, usual, whole or of_backbone)


def choose_boxes(asked: str, backbone: Backbone, size: int, whole: Weights | None) -> str:
    """The name of the default boxes that are asked for, else of those that the weights tell, else of ``backbone``'s.

    Raises:
        ValueError: see ``told_by_model``; or ``backbone`` has none of this name.
    """
    what, names = "default boxes", [*backbone.default_boxes]
    usual = names[0] if names else "default"
    told_by_weights = None
    if whole is not None:
        known = ("default", *CAFFE_DEFAULT_BOXES)
        told_by_weights = told_by_model(whole, what, asked, known, of_torchvision=usual)
    if told_by_weights not in names:  # those of another model, which will not load
        told_by_weights = None
    name = settle(what, asked, told_by_weights, usual, whole if len(names) > 1 else None)
    if name != "default" and size not in backbone.default_boxes.get(name, {}):
        raise ValueError(f"the default boxes {name!r} are for a VGG; use --default-boxes default")
    return name


def settle(what: str, asked: str, told_by_weights: str | None, usual: str, weights: Weights | None) -> str:
    """What is asked for, else what the weights tell, else the usual, which is noted if it is assumed of ``weights``."""
    if asked != "default":
        return asked
    if told_by_weights is None and weights is not None:
        flag = what.replace(" ", "-")
        weights.notes.append(f"{weights.source}: does not tell its {what}; {usual} is assumed (--{flag})")
    return told_by_weights or usual


def told_by_model(weights: Weights, what: str, asked: str, known: Iterable[str], of_torchvision: str) -> str | None:
    """What weights of a whole model were trained with, if a checkpoint or torchvision tells.

    Args:
        weights: those.
        what: the name of a flag of train.py, in words.
        asked: the value that is asked for.
        known: the values that there are.
        of_torchvision: the value of torchvision's weights.

    Raises:
        ValueError: they tell one that there is not, or another than was asked for.
    """
    value = told(weights.content, what.replace(" ", "_"))
    if value is None and weights.published is not None:
        value = of_torchvision
    if value not in [None, *known]:
        raise ValueError(f"{weights.source}: damaged: it was trained with unknown {what}, {value!r}")
    if value is not None and asked not in ("default", value):
        flag = what.replace(" ", "-")
        raise ValueError(f"{weights.source}: was trained with {what} {value}, not {asked}; use --{flag} {value}")
    return value


def scaling_of_backbone(weights: Weights, backbone: Backbone) -> str | None:
    """The input scaling that weights of a backbone were trained with, if it is known."""
    if weights.source == backbone.weights:
        return backbone.input_scaling
    if is_reduced(weights):
        return "caffe"
    transforms = weights.published and weights.published.transforms()
    scaling = tuple(getattr(transforms, "mean", ())), tuple(getattr(transforms, "std", ()))
    return next((name for name, known in INPUT_SCALINGS.items() if known == scaling), None)


def count_classes(weights: Weights) -> int:
    """Number of classes, background included, that the weights of a whole model predict.

    Raises:
        ValueError: they are no such weights.
    """
    state_dict, outputs = weights.state_dict, []
    for head in ("classification_head", "regression_head"):
        predictor = [name for name in state_dict if name.startswith(f"head.{head}.module_list.0.")]
        if not predictor:
            raise ValueError(
                f"{weights.source}: not the weights of an SSD model (it has no {head.replace('_', ' ')}); "
                f"the file has {describe_keys(state_dict)}"
            )
        outputs.append(state_dict[predictor[-1]].numel())  # biases: of each class, and of each coordinate of a box
    scores, coordinates = outputs
    if scores == 0 or coordinates == 0 or 4 * scores % coordinates:
        raise ValueError(
            f"{weights.source}: damaged: its heads have {scores} scores for {coordinates} coordinates of boxes"
        )
    return 4 * scores // coordinates


def load_fitting(model: SSD, weights: Weights) -> list[str]:
    """Loads everything, but for scores of another number of classes; returns the names of what stays as it was."""
    own, state_dict = model.state_dict(), weights.state_dict
    num_classes = count_classes(weights)
    anew = {}
    for name, value in own.items():
        saved = state_dict.get(name)
        if name.startswith(CLASSIFICATION_HEAD) and saved is not None and value.dim() and saved.shape != value.shape:
            of_other_classes = (len(value) // model.num_classes * num_classes, *value.shape[1:])
            if saved.shape == of_other_classes:  # else it is damaged, and will not load
                anew[name] = value
    model_name = told(weights.content, "model")
    source = f"{weights.source} (of {model_name})" if model_name else weights.source
    load_matching(model, replace(weights, source=source, state_dict=state_dict | anew))
    return list(anew)


MODELS = {
    f"ssd{size}_{name}": partial(build, backbone, size) for size in (300, 512) for name, backbone in BACKBONES.items()
}
MODELS["ssdlite320_mobilenet_v3_large"] = partial(
    build, MOBILENET_V3_LARGE, 320, predictor=separable_conv3x3, **SSDLITE_SETTINGS
)
