"""Where weights come from: files, and torchvision's weight enums."""

import pickle
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_weight

from .files import first_line, load_file


def not_finite(state_dict: dict) -> Iterator[str]:
    """The names of tensors with a nan or an infinity."""
    for name, value in state_dict.items():
        if isinstance(value, Tensor) and not value.isfinite().all():
            yield name


def load_matching(module: nn.Module, state_dict: dict[str, Tensor], source: str) -> None:
    """``load_state_dict`` with a one-line error that names the source, for weights that are not finite too."""
    try:
        module.load_state_dict(state_dict)
    except RuntimeError as error:
        faults = [line.strip() for line in str(error).splitlines()[1:]]
        first = textwrap.shorten(faults[0], 160)
        raise ValueError(f"{source}: not the weights of this model: {first} ({len(faults)} faults)") from None
    for name in not_finite(module.state_dict()):
        raise ValueError(f"{source}: the weight {name} is not finite; the file is of no use")


def check_state_dict(state_dict, source: str | Path) -> None:
    """Raises ValueError unless it has tensors by names."""
    if not isinstance(state_dict, dict):
        raise ValueError(f"{source}: expected a state dict, found {type(state_dict).__name__}")
    for name, value in state_dict.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ValueError(f"{source}: expected a state dict, but {name!r} is no name of a tensor")


def told(content: dict, flag: str):
    """What a checkpoint of train.py tells about a flag (its name in Python), else None."""
    arguments = content.get("args")  # torchvision's are no dict
    return arguments.get(flag) if isinstance(arguments, dict) else None


def load_state_dict(source: str | Path | WeightsEnum) -> dict[str, Tensor]:
    """The state dict that ``source`` names, as ``load_weights``."""
    return load_weights(source)["model"]


def load_weights(source: str | Path | WeightsEnum) -> dict:
    """What ``source`` names: the state dict, ``model``, and all else that a checkpoint has.

    Args:
        source: a torchvision weight enum or its name, such as ``SSD300_VGG16_Weights.COCO_V1``, or the path of a
            state dict or of a training checkpoint (ours or torchvision's).

    Raises:
        ValueError: there is no such enum or file, or the download failed.
    """
    if not is_enum_name(source):
        content = load_file(source)
        if "model" not in content:
            content = {"model": content}
        check_state_dict(content["model"], source)
        return content
    try:
        weights = get_weight(str(source))
    except (ValueError, AttributeError, KeyError):
        raise ValueError(f"{source}: torchvision has no weights of this name") from None
    cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        return {"model": weights.get_state_dict(progress=True, check_hash=True, weights_only=True)}
    except OSError as error:
        raise ValueError(
            f"{source}: cannot download {weights.url} ({error}); put that file at {cache}, or name a local file "
            "instead; training can also start from random weights, with 'none'"
        ) from None
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{source}: {cache} is damaged ({first_line(error)}); delete it") from None


def is_enum_name(source: str | Path | WeightsEnum) -> bool:
    return isinstance(source, WeightsEnum) or ("_Weights." in str(source) and not Path(source).is_file())
