"""Files of tensors and plain data: whole or not there, sealed with a hash, and read without running what they hold."""

import argparse
import contextlib
import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

VERSION = 1  # of checkpoints; one that tells its version must be sealed
HASH_NAME = b"sha256:"
SEAL_LENGTH = 2 + len(HASH_NAME) + 64


def save_file(content: dict, path: str | Path) -> None:
    """Writes tensors and plain data so that ``path`` is the old file or the whole new one, even if the machine dies.

    The file ends with a hash of all before it, as the comment of the zip archive that PyTorch's files are.

    Raises:
        OSError: there is no space, no right to write, ...; the old file is as it was.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    stored = buffer.getbuffer()[:-2]  # without the length of the comment, which is none
    write_file([stored, seal(stored)], path)


def write_file(parts: Iterable[bytes | memoryview], path: str | Path) -> None:
    """Writes ``parts``, one after the other, so that ``path`` is the old file or the whole new one.

    Raises:
        OSError: there is no space, no right to write, ...; the old file is as it was.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
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
    is_sealed = stored[-SEAL_LENGTH + 2 :].startswith(HASH_NAME)
    if is_sealed and seal(stored[:-SEAL_LENGTH]) != stored[-SEAL_LENGTH:]:
        raise ValueError(f"{path}: damaged (its content does not have the hash that it was saved with)")
    content = decode(stored, path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a checkpoint or a state dict, found {type(content).__name__}")
    for state_dict in (content.get("model", content), content.get("model_ema")):
        if isinstance(state_dict, dict) and any(map(is_larger_than_its_memory, state_dict.values())):
            raise ValueError(f"{path}: refused, because a tensor in it is larger than what the file holds")
    if not is_sealed and "version" in content:
        raise ValueError(f"{path}: damaged (the hash that it was saved with is missing)")
    return content


def decode(stored: bytes, path: str | Path):
    """What PyTorch has stored as the bytes of the file ``path``, or a ValueError that says why it cannot be had."""
    try:
        refuse_compressed(stored)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: refused, because it holds more than tensors and plain data, or is no checkpoint; "
            "save a state_dict() instead"
        ) from None
    except Exception as error:  # of damaged content PyTorch makes all kinds
        raise ValueError(f"{path}: damaged or no checkpoint ({first_line(error)})") from None


def refuse_compressed(stored: bytes) -> None:
    """Raises RuntimeError for a zip archive with compressed parts: PyTorch writes none, and they may be bombs."""
    if zipfile.is_zipfile(io.BytesIO(stored)):
        with zipfile.ZipFile(io.BytesIO(stored)) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise RuntimeError("it is compressed")


def is_larger_than_its_memory(value) -> bool:
    """Whether a tensor repeats its content, as a few bytes that claim to be terabytes do."""
    return isinstance(value, Tensor) and value.numel() * value.element_size() > value.untyped_storage().nbytes()


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
