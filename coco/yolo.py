"""YOLO's data sets: a data.yaml that says where images are, and a text file of boxes beside each of them.

A line of such a file has a class, and the centre, width and height of a box as fractions of the image; with more
numbers it is a polygon, of which the box around it is taken. An image without such a file has no objects.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from .checks import Content
from .file_names import find_name
from .images import is_image_name, read_sizes
from .rules import DataError, as_integer, is_integer, is_text
from .sources import Split

VALIDATION_KEYS = ("val", "valid", "validation")
LARGEST_FRACTION = 1.01  # rounding may go over 1; more is in pixels


@dataclass(frozen=True)
class YoloLabels:
    """The images that a data.yaml lists under ``key``, with their labels."""

    path: Path
    key: str

    def load(self) -> Content:
        settings = read_settings(self.path)
        names = class_names(settings, self.path)
        paths, places = list_images(self.path, settings, self.key)
        folder = common_folder(paths)
        labels = [label_file(path) for path in paths]
        depends_on = {self.path, *places, *paths, *labels, *(label.parent for label in labels)}
        categories = [{"id": number, "name": name} for number, name in names.items()]
        content = Content([], categories, [], sorted(depends_on), is_upright=True)  # as YOLO's programs see images
        has_keypoints, without = "kpt_shape" in settings, 0
        for path, size, label in zip(paths, read_sizes(paths, is_upright=True), labels, strict=True):
            if isinstance(size, str):
                content.faults.append(size)
                continue
            image_id = content.add_image(path.relative_to(folder).as_posix(), *size)
            if os.path.exists(label):
                add_labels(content, image_id, size, label, names, has_keypoints)
            else:
                without += 1
        if without:
            content.notes.append(f"{self.path}: {without} images have no label file: taken as images without objects")
        return content


def find_splits(path: Path) -> dict[str, Split]:
    """The splits that a data.yaml lists; one alone is the whole data set.

    Raises:
        DataError: it cannot be read, or its images are not found.
    """
    settings = read_settings(path)
    keys = {"train": "train", "val": next((key for key in VALIDATION_KEYS if settings.get(key)), None)}
    found = {
        name: Split(common_folder(list_images(path, settings, key)[0]), YoloLabels(path, key))
        for name, key in keys.items()
        if settings.get(key)
    }
    return {"train": found["val"]} if found.keys() == {"val"} else found


def read_settings(path: Path) -> dict:
    import yaml  # only who has such a data set needs it

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if type(settings) is not dict:
        raise DataError(f"{path}: is no data.yaml: it has no keys such as train, val and names")
    return settings


def class_names(settings: dict, path: Path) -> dict[int, str]:
    """The names of the classes by number, which YOLO's files give as a list or by number."""
    names = settings.get("names")
    if type(names) is list:
        names = dict(enumerate(names))
    if type(names) is not dict or not names:
        raise DataError(f"{path}: has no list of names of the classes")
    found = {}
    for written, name in names.items():
        number, name = as_integer(written), str(name) if type(name) is int else name
        if not is_integer(number) or number in found or not is_text(name):
            raise DataError(
                f"{path}: names has {written!r}: {name!r}; it must give each class number once a text in one line"
            )
        found[number] = name
    return found


def list_images(path: Path, settings: dict, key: str) -> tuple[list[Path], set[Path]]:
    """The images that a data.yaml lists under ``key``: of folders, and of text files with a name in each line.

    Returns:
        The image files, and the folders and text files that tell of them.

    Raises:
        DataError: a place is missing, or there are no images.
    """
    images, places = [], set()
    for place in settings[key] if type(settings[key]) is list else [settings[key]]:
        where = find_place(path, settings.get("path"), str(place))
        if where.is_dir():
            for folder, subfolders, names in os.walk(where, onerror=raise_error):
                subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
                images += [Path(folder, name) for name in sorted(names) if is_image_name(name)]
                places.add(Path(folder))
        else:
            images += images_listed(where)
            places.add(where)
    if not images:
        raise DataError(f"{path}: {key} {settings[key]!r} holds no images")
    return list(dict.fromkeys(images)), places


def raise_error(error: OSError) -> None:
    raise error


def find_place(path: Path, base, place: str) -> Path:
    """Where a place of a data.yaml is: from its ``path``, from its folder, or as what of its end is in that folder.

    It may have been written on another machine, and Roboflow writes ``../train/images`` for ``train/images``.

    Raises:
        DataError: it is not there, or both in the folder and outside.
    """
    root = path.parent
    literal = next((one for one in (root / str(base or "") / place, root / place) if os.path.exists(one)), None)
    if literal is not None and not place.startswith(".."):
        return Path(os.path.abspath(literal))
    parts = [part for part in Path(place.replace("\\", "/")).parts if part not in ("..", "/")]
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    inside = next((one for end in ends if os.path.exists(one := root / find_name(root, end))), None)
    if literal is None and inside is None:
        raise DataError(f"{path}: {place!r} is not there, neither from its path nor from {root}")
    if literal and inside and not literal.samefile(inside):
        raise DataError(f"{path}: {place!r} may be {inside} or {literal.resolve()}; write one of them there")
    return Path(os.path.abspath(literal or inside))


def images_listed(file: Path) -> list[Path]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as a list of images: {error}") from None
    return [find_place(file, None, line.strip()) for line in lines if line.strip()]


def common_folder(paths: list[Path]) -> Path:
    return Path(os.path.commonpath([path.parent for path in paths]))


def label_file(image: Path) -> Path:
    """In the folder ``labels`` that stands beside the last ``images`` of the path, or beside the image."""
    beside = image.with_suffix(".txt")
    parts = list(beside.parts)
    if "images" in parts[:-1] and not os.path.exists(beside):
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    file = Path(*parts)
    return file.parent / find_name(file.parent, file.name)


def add_labels(
    content: Content, image_id: int, size: tuple[int, int], label: Path, names: dict[int, str], has_keypoints: bool
) -> None:
    try:
        lines = label.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        content.faults.append(f"{label}: cannot be read: {error}")
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            class_number, box = parse_line(line, names, has_keypoints)
        except ValueError as error:
            content.faults.append(f"{label}: line {number}: {error}")
        else:
            content.add_box(image_id, class_number, [part * side for part, side in zip(box, size * 2, strict=True)])


def parse_line(line: str, names: dict[int, str], has_keypoints: bool) -> tuple[int, tuple[float, float, float, float]]:
    """The class of a line, and its box xywh as fractions of the image; ``has_keypoints`` if such follow the box.

    Raises:
        ValueError: it is of another form; the text says how.
    """
    try:
        values = [float(text) for text in line.split()]
    except ValueError:
        raise ValueError("has something that is no number") from None
    class_number, fractions = as_integer(values[0]), values[1:5] if has_keypoints else values[1:]
    if class_number not in names:
        raise ValueError(f"is of class {values[0]:g}, which names does not have")
    if not all(0 <= value <= LARGEST_FRACTION for value in fractions):
        raise ValueError("has numbers that are no fractions of the image, 0 to 1")
    if len(fractions) == 4:
        x, y, width, height = fractions
        return class_number, (x - width / 2, y - height / 2, width, height)
    if len(fractions) < 6 or len(fractions) % 2:
        raise ValueError(f"has {len(values)} numbers; expected a class and 4, or a class and the corners of a polygon")
    left, top, right, bottom = min(fractions[::2]), min(fractions[1::2]), max(fractions[::2]), max(fractions[1::2])
    return class_number, (left, top, right - left, bottom - top)
