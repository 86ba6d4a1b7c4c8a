"""Where weights come from: files, and torchvision's weight enums."""

import pickle
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_weights, get_weight, list_models

from .files import first_line, load_file

# what DistributedDataParallel or DataParallel, and torch.compile, put before all names
WRAPPERS = ("module.", "_orig_mod.")
COUNTER = "n_averaged"  # which AveragedModel, a wrapper too, keeps beside the weights


@dataclass
class Weights:
    """Weights that were read, of a backbone or of a whole model.

    Args:
        source: the name of a torchvision enum, or a file.
        state_dict: tensors by their names, without the prefixes of wrappers.
        content: all that a checkpoint has.
        published: torchvision's enum, if they are its weights.
        notes: what a user should know of how they are used, a line each; whoever uses them adds to it.
    """

    source: str | Path | WeightsEnum
    state_dict: dict[str, Tensor]
    content: dict = field(default_factory=dict)
    published: WeightsEnum | None = None
    notes: list[str] = field(default_factory=list)


def not_finite(state_dict: dict) -> Iterator[str]:
    """The names of tensors with a nan or an infinity."""
    for name, value in state_dict.items():
        if isinstance(value, Tensor) and not value.isfinite().all():
            yield name


def load_matching(module: nn.Module, weights: Weights, prefix: str = "") -> None:
    """``load_state_dict`` with a one-line error that names the source, for weights that are not finite too.

    Args:
        module: what is loaded into, all of it.
        weights: they must fit exactly.
        prefix: of the names that are meant; others are left aside.
    """
    try:
        module.load_state_dict({name: value for name, value in weights.state_dict.items() if name.startswith(prefix)})
    except RuntimeError as error:
        faults = [line.strip() for line in str(error).splitlines()[1:]]
        first = textwrap.shorten(faults[0], 160)
        raise ValueError(
            f"{weights.source}: not the weights of this model: {first} ({len(faults)} faults); "
            f"the file has {describe_keys(weights.state_dict)}"
        ) from None
    for name in not_finite(module.state_dict()):
        raise ValueError(f"{weights.source}: the weight {name} is not finite; the file is of no use")


def describe_keys(keys: Iterable) -> str:
    """Their number and the first three, such as ``30 keys: 0.weight, 0.bias, 2.weight, ...``."""
    names = [str(key) for key in keys]
    first = textwrap.shorten(", ".join(names[:3]), 100, placeholder="...")
    return f"{len(names)} key{'s' * (len(names) != 1)}: {first}{', ...' if len(names) > 3 else ''}"


def check_state_dict(state_dict, source: str | Path) -> None:
    """Raises ValueError unless it has tensors by names."""
    if not isinstance(state_dict, dict):
        raise ValueError(f"{source}: expected a state dict, found {type(state_dict).__name__}")
    for name, value in state_dict.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ValueError(
                f"{source}: expected a state dict, alone or as 'model', but {name!r} is no name of a tensor; "
                f"it has {describe_keys(state_dict)}"
            )


def unwrap(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what wrappers of a whole model, one around the other or not, add: a prefix of every name, a counter."""
    state_dict = {name: value for name, value in state_dict.items() if name != COUNTER}
    for prefix in WRAPPERS:
        if state_dict and all(name.startswith(prefix) for name in state_dict):
            return unwrap({name.removeprefix(prefix): value for name, value in state_dict.items()})
    return state_dict


def told(content: dict, flag: str):
    """What a checkpoint of train.py tells about a flag (its name in Python), else None."""
    arguments = content.get("args")  # torchvision's are no dict
    return arguments.get(flag) if isinstance(arguments, dict) else None


def choose_state_dict(content: dict, source: str | Path | WeightsEnum, ema: bool) -> tuple[dict, list[str]]:
    """The weights of a checkpoint, or with ``ema`` their moving average if it has that; and a note where it matters."""
    if content.get("model_ema") is None:
        return content["model"], [] if ema else [f"{source}: has no moving average of its weights (model_ema)"]
    if ema:
        return content["model_ema"], [f"{source}: the moving average of its weights is taken (model_ema)"]
    return content["model"], [f"{source}: its weights are taken as they are (model), not their moving average"]


def load_weights(source: str | Path | WeightsEnum, ema: bool = True) -> Weights:
    """Reads what ``source`` names.

    Args:
        source: a torchvision weight enum or its name, such as ``SSD300_VGG16_Weights.COCO_V1``, or the path of a
            state dict or of a training checkpoint (ours or torchvision's).
        ema: take the moving average of a checkpoint's weights, if it has that.

    Raises:
        ValueError: there is no such enum or file, or the download failed.
    """
    published = find_published(source)
    content = download(published, source) if is_enum_name(source) else load_file(source)
    if "model" not in content:
        content = {"model": content}
    state_dict, notes = choose_state_dict(content, source, ema)
    check_state_dict(state_dict, source)
    return Weights(source, unwrap(state_dict), content, published, notes)


def download(published: WeightsEnum, source: str | WeightsEnum) -> dict[str, Tensor]:
    """Downloads torchvision's weights, unless they lie where it puts them; ``source`` is what they were asked for as.

    Raises:
        ValueError: there is no network, or the file is damaged.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(published.url).name
    try:
        return published.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except OSError as error:
        raise ValueError(
            f"{source}: cannot download {published.url} ({error}); put that file at {file}, or name a local file "
            "instead; training can also start from random weights, with 'none'"
        ) from None
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{source}: {file} is damaged ({first_line(error)}); delete it") from None


def is_enum_name(source: str | Path | WeightsEnum) -> bool:
    return isinstance(source, WeightsEnum) or ("_Weights." in str(source) and not Path(source).is_file())


def find_published(source: str | Path | WeightsEnum) -> WeightsEnum | None:
    """torchvision's weights that ``source`` names, as an enum or by the name of the file that is downloaded.

    Raises:
        ValueError: it is the name of an enum that there is not.
    """
    if not is_enum_name(source):
        return published_files().get(Path(source).name)
    try:
        return get_weight(str(source))
    except (ValueError, AttributeError, KeyError):
        raise ValueError(f"{source}: torchvision has no weights of this name") from None


@cache
def published_files() -> dict[str, WeightsEnum]:
    """All of torchvision's weights by the names of their files."""
    return {Path(weights.url).name: weights for model in list_models() for weights in get_model_weights(model)}
