"""Weights of a VGG as SSD begins with them: its convolutions and, for fc6 and fc7, its fully connected layers."""

from dataclasses import replace

from torch import Tensor, nn

from .weights import Weights, load_matching

# vgg16_reducedfc.pth, with which SSD has been trained since Caffe: VGG16's convolutions at torchvision's indices, then
# fc6 and fc7, as convolutions already
REDUCED_FC = {"31": "fc6", "33": "fc7"}
REDUCED_LAYERS = ("0", "2", "5", "7", "10", "12", "14", "17", "19", "21", "24", "26", "28", *REDUCED_FC)
REDUCED_KEYS = {f"{layer}.{part}" for layer in REDUCED_LAYERS for part in ("weight", "bias")}


def load_vgg(name: str, features: nn.Sequential, fc: nn.ModuleDict, weights: Weights, subsample_fc: bool) -> None:
    """Loads the weights of a VGG.

    Args:
        name: of the VGG, in torchvision.
        features: its convolutions.
        fc: the convolutions ``fc6`` and ``fc7``.
        weights: torchvision's, whose classifier may be missing, or ``vgg16_reducedfc.pth``, which has ``fc`` too.
        subsample_fc: make those of ``fc`` from the classifier of torchvision's; where it cannot be used, a note says
            so.

    Raises:
        ValueError: they are of another network, or not finite.
    """
    if is_reduced(weights):
        if name != "vgg16":
            raise ValueError(f"{weights.source}: is a VGG16 (its keys are 0 to 28, 31 and 33), not a {name.upper()}")
        weights = replace(weights, state_dict={full_name(key): value for key, value in weights.state_dict.items()})
        load_matching(fc, weights, prefix="fc")
    elif subsample_fc:
        subsampled = subsample_classifier(weights.state_dict)
        if subsampled is None:
            weights.notes.append(f"{weights.source}: has no classifier to subsample; fc6 and fc7 begin anew")
        else:
            load_matching(fc, replace(weights, state_dict=subsampled))
    load_matching(nn.ModuleDict({"features": features}), weights, prefix="features.")


def is_reduced(weights: Weights) -> bool:
    """Whether they are ``vgg16_reducedfc.pth``, whatever the file is called."""
    return weights.state_dict.keys() == REDUCED_KEYS


def full_name(key: str) -> str:
    """torchvision's name for a key of ``vgg16_reducedfc.pth``, such as ``features.28.bias``, or ``fc6.bias``."""
    layer, _, part = key.partition(".")
    return f"{REDUCED_FC.get(layer, f'features.{layer}')}.{part}"


def subsample_classifier(state_dict: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """fc6 and fc7 as convolutions of a quarter of the channels (paper section 3), 3x3 dilated by 6 and 1x1.

    Of 4096 outputs every fourth is kept, and of the 7x7 cells every third row and column, as in Caffe's model.

    Returns:
        ``fc6.weight`` [1024, 512, 3, 3], ``fc7.weight`` [1024, 1024, 1, 1] and their biases [1024]; None if the
        classifier is missing, of another shape, or not finite, as torchvision fills it where it has none.
    """
    parts = [state_dict.get(f"classifier.{layer}.{part}") for layer in (0, 3) for part in ("weight", "bias")]
    if [part is not None and tuple(part.shape) for part in parts] != [
        (4096, 512 * 7 * 7),
        (4096,),
        (4096, 4096),
        (4096,),
    ]:
        return None
    fc6, fc6_bias, fc7, fc7_bias = parts
    subsampled = {
        "fc6.weight": fc6.reshape(4096, 512, 7, 7)[::4, :, ::3, ::3],
        "fc6.bias": fc6_bias[::4],
        "fc7.weight": fc7[::4, ::4, None, None],
        "fc7.bias": fc7_bias[::4],
    }
    return subsampled if all(value.isfinite().all() for value in subsampled.values()) else None
