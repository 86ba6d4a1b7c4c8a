"""Where weights come from, and how they reach the disk: files, and torchvision's weight enums."""

import argparse
import contextlib
import hashlib
import io
import os
import pickle
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_weight

# Of checkpoints, where they tell it. From 2 on they end with a hash; from 3 on ssd300_resnet18 has other default boxes.
VERSION = 3
HASH_NAME = b"sha256:"
SEAL_LENGTH = 2 + len(HASH_NAME) + 64


def save_file(content: dict, path: str | Path) -> None:
    """Writes tensors and plain data so that ``path`` is the old file or the whole new one, even if the machine dies.

    The file ends with a hash of all before it, as the comment of the zip archive that PyTorch's files are.

    Raises:
        OSError: there is no space, no right to write, ...; the old file is as it was.
    """
    path = Path(path)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    stored = buffer.getbuffer()[:-2]  # without the length of the comment, which is none
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(stored)
            file.write(seal(stored))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def seal(content: bytes | memoryview) -> bytes:
    """The last bytes of a file: a hash of those before, as the comment of a zip archive, after its length."""
    comment = HASH_NAME + hashlib.sha256(content).hexdigest().encode()
    return len(comment).to_bytes(2, "little") + comment


def sync_folder(folder: Path) -> None:
    """Brings the names in ``folder`` to the disk, where the file system has a way to."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        stored = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    is_hashed = stored[-SEAL_LENGTH + 2 :].startswith(HASH_NAME)
    if is_hashed and seal(stored[:-SEAL_LENGTH]) != stored[-SEAL_LENGTH:]:
        raise ValueError(f"{path}: damaged (its content does not have the hash that it was saved with)")
    try:
        refuse_compressed(stored)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: refused, because it holds more than tensors and plain data, or is no checkpoint; "
            "save a state_dict() instead"
        ) from None
    except Exception as error:  # of damaged content PyTorch makes all kinds
        raise ValueError(f"{path}: damaged or no checkpoint ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a checkpoint or a state dict, found {type(content).__name__}")
    state_dict = content.get("model", content)
    if isinstance(state_dict, dict) and any(map(is_larger_than_its_memory, state_dict.values())):
        raise ValueError(f"{path}: refused, because a tensor in it is larger than what the file holds")
    if not is_hashed and content.get("version", 1) != 1:
        raise ValueError(f"{path}: damaged (the hash that it was saved with is missing)")
    if has_other_default_boxes(content):
        raise ValueError(
            f"{path}: made by an older version, whose ssd300_resnet18 had other default boxes; train it anew"
        )
    return content


def has_other_default_boxes(checkpoint: dict) -> bool:
    """Whether its model was trained on default boxes that the model of this name no longer has."""
    return told(checkpoint, "model") == "ssd300_resnet18" and checkpoint.get("version", 1) in (1, 2)


def refuse_compressed(stored: bytes) -> None:
    """Raises RuntimeError for a zip archive with compressed parts: PyTorch writes none, and they may be bombs."""
    if zipfile.is_zipfile(io.BytesIO(stored)):
        with zipfile.ZipFile(io.BytesIO(stored)) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise RuntimeError("it is compressed")


def is_larger_than_its_memory(value) -> bool:
    """Whether a tensor repeats its content, as a few bytes that claim to be terabytes do."""
    return isinstance(value, Tensor) and value.numel() * value.element_size() > value.untyped_storage().nbytes()


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


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def is_enum_name(source: str | Path | WeightsEnum) -> bool:
    return isinstance(source, WeightsEnum) or ("_Weights." in str(source) and not Path(source).is_file())
