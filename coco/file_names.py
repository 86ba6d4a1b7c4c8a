"""Names of image files: those that annotations have, and those that the files have."""

import functools
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from .rules import is_file_name


def relative_name(name, images_dir: Path | None):
    """An absolute name of a file inside ``images_dir`` as relative to it; any other value as it is.

    Where nobody needs the images (None), their folder is taken to be the root.
    """
    if type(name) is str and os.path.isabs(name):
        for folder in (images_dir.absolute(), images_dir.resolve()) if images_dir else (Path("/"),):
            if name.startswith(f"{folder}/".replace("//", "/")):
                return name.removeprefix(str(folder)).lstrip("/")
    return name


def is_odd(name: str, images_dir: Path) -> bool:
    """Whether programs or systems may spell a name otherwise than the file system does, so that it is worth a look."""
    return "\\" in name or not name.isascii() or name.startswith(f"{images_dir.name}/")


def find_name(images_dir: Path, name: str) -> str:
    """The name, relative to ``images_dir``, that the file has; ``name`` itself where it is right, or none is."""
    if not os.path.exists(images_dir / name):
        for reading in readings(name, images_dir):
            if (found := as_spelled(images_dir, reading)) is not None:
                return found
    return name


def readings(name: str, images_dir: Path) -> Iterator[str]:
    """A name with the separators of Windows, then with the name of the image folder in front, as what they may mean."""
    slashed = name.replace("\\", "/")
    for reading in (slashed, slashed.removeprefix("./").removeprefix(f"{images_dir.name}/")):
        if is_file_name(reading):
            yield reading


def as_spelled(folder: Path, name: str) -> str | None:
    """A name as the file system spells it, whose letters may be composed where those of ``name`` are not; or None."""
    found = []
    for part in Path(name).parts:
        if not os.path.exists(folder / part):
            part = spellings(folder).get(comparable(part))
            if part is None:
                return None
        folder /= part
        found.append(part)
    return "/".join(found)


@functools.lru_cache(maxsize=16)
def spellings(folder: Path) -> dict[str, str]:
    """The names in a folder, by what they are compared by."""
    names = os.listdir(folder) if folder.is_dir() else []
    return {comparable(name): name for name in names}


def comparable(name: str) -> str:
    """What names are compared by: with the separators of this system, and composed letters (Unicode's form NFC)."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))
