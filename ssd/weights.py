"""Where weights come from: a file, or one of torchvision's weight enums."""

import argparse
import pickle
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import WeightsEnum, get_weight


def load_file(path: str | Path) -> dict:
    """Reads a checkpoint into CPU memory without running any code that it may contain.

    The one place that reads checkpoints: ``weights_only=True`` always, with ``argparse.Namespace`` (plain data) allowed
    because torchvision's scripts store their arguments as one.

    Raises:
        ValueError: the file is missing, damaged, or holds more than tensors and plain data.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: refused, because it holds more than tensors and plain data, or is no checkpoint; "
            "save a state_dict() instead"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: damaged or no checkpoint ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a checkpoint or a state dict, found {type(content).__name__}")
    return content


def load_state_dict(source: str | Path | WeightsEnum) -> dict[str, Tensor]:
    """The state dict that ``source`` names.

    Args:
        source: a torchvision weight enum or its name, such as ``SSD300_VGG16_Weights.COCO_V1``, or the path of a
            state dict or of a training checkpoint (ours or torchvision's).

    Raises:
        ValueError: there is no such enum or file, or the download failed.
    """
    if not is_enum_name(source):
        content = load_file(source)
        return content.get("model", content)
    try:
        weights = get_weight(str(source))
    except (ValueError, AttributeError, KeyError):
        raise ValueError(f"{source}: torchvision has no weights of this name") from None
    cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except OSError as error:
        raise ValueError(
            f"{source}: cannot download {weights.url} ({error}); put that file at {cache}, or name a local file "
            "instead; training can also start from random weights, with 'none'"
        ) from None
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{source}: {cache} is damaged ({first_line(error)}); delete it") from None


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def is_enum_name(source: str | Path | WeightsEnum) -> bool:
    return isinstance(source, WeightsEnum) or ("_Weights." in str(source) and not Path(source).is_file())
