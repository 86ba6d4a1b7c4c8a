"""COCO's annotation files: read once, checked, and kept as flat arrays that all processes share.

The arrays of a file are stored beside a run's output, in a folder that is an index of the file. Processes map it
instead of copying it, and the next start maps it instead of reading the json again.
"""

import contextlib
import json
import mmap
import os
import re
import reprlib
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy import ndarray

MAX_COCO_CATEGORY_ID = 90
INDEX_VERSION = 1
SINGULAR = {"images": "image", "categories": "category", "annotations": "annotation"}
DEFAULTS = {"area": "width x height is used, which may move scores by size", "iscrowd": "taken for no crowd"}
# a check of a field's value, and what it asks for in words
Rule = tuple[Callable[[object], bool], str]
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # control characters, line ends, surrogates
# masks are most of a file, and SSD needs none
POLYGONS = re.compile(rb'("segmentation"\s*:\s*)\[[-+.,\d\seE\[\]]*\]')


class DataError(ValueError):
    """A fault in the user's data, in one line that names the file, image or annotation and the remedy.

    A loader worker's exception is raised again in the main process with a traceback for message; only the line counts.
    """

    def __init__(self, message: str):
        if message.startswith("Caught DataError in "):
            message = message.rpartition("DataError: ")[2].strip()
        super().__init__(message)


@dataclass(frozen=True)
class CocoAnnotations:
    """A COCO annotation file as flat arrays; image ``i`` has the boxes ``offsets[i]`` to ``offsets[i + 1]``.

    Boxes are those of the file: xywh in pixels of the original image.
    """

    path: Path
    image_ids: ndarray  # int64 [images]
    file_names: ndarray  # UTF-8 bytes [images]
    sizes: ndarray  # int64 [images, 2], height and width
    offsets: ndarray  # int64 [images + 1]
    boxes: ndarray  # float64 [boxes, 4]
    areas: ndarray  # float64 [boxes]
    category_ids: ndarray  # int64 [boxes]
    is_crowd: ndarray  # bool [boxes]
    annotation_ids: ndarray  # int64 [boxes]
    categories: dict[int, str]  # category id -> name
    notes: list[str] = field(default_factory=list)  # what was assumed where the file says nothing
    index: Path | None = None  # the folder that the arrays are mapped from

    def __reduce__(self):
        """Mapped arrays reach another process as the name of their folder, not as a copy."""
        return (map_index, (self.index, self.path)) if self.index is not None else super().__reduce__()

    def file_name(self, row: int) -> str:
        return self.file_names[row].decode()

    def image_paths(self, images_dir: Path) -> list[Path]:
        return [images_dir / name.decode() for name in self.file_names]

    @cached_property
    def label_of(self) -> dict[int, int]:
        """Category id -> class label of the model.

        The id itself where all lie in 1 to 90, so that a model of COCO has torchvision's 91 outputs; else 1, 2, ...
        """
        if all(1 <= category_id <= MAX_COCO_CATEGORY_ID for category_id in self.categories):
            return {category_id: category_id for category_id in self.categories}
        return {category_id: label for label, category_id in enumerate(sorted(self.categories), start=1)}

    @property
    def num_classes(self) -> int:
        """Outputs that a model of these classes needs, background included."""
        return max(self.label_of.values()) + 1

    @property
    def classes(self) -> list[dict]:
        """Label, category id and name of each class, in order of the labels: what a checkpoint keeps."""
        return [{"label": self.label_of[i], "id": i, "name": self.categories[i]} for i in sorted(self.categories)]


ARRAYS = tuple(name for name, kind in CocoAnnotations.__annotations__.items() if kind is ndarray)


def read_annotations(path: str | Path, index_dir: str | Path | None = None) -> CocoAnnotations:
    """Reads and checks an annotation file, or maps its index from ``index_dir``, where one is made if there is none.

    Raises:
        DataError: the file is missing or not in COCO's format, or its content contradicts itself.
    """
    path = Path(path)
    index = None if index_dir is None else index_path(path, Path(index_dir))
    if index is not None and (annotations := open_index(index, path)) is not None:
        return annotations
    annotations, faults = parse_annotations(path)
    if faults:
        others = f" (and {len(faults) - 1} more faults; train.py --check-data lists them)" if len(faults) > 1 else ""
        raise DataError(faults[0] + others)
    return annotations if index is None else write_index(annotations, index)


def load_json(path: Path) -> dict:
    """The content of an annotation file without its polygons.

    Raises:
        DataError: the file cannot be read, or is no annotation file.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            content = json.loads(POLYGONS.sub(rb"\g<1>0", text))
    except OSError as error:
        raise DataError(f"{path}: cannot read the annotation file: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError of an empty file, too
        raise DataError(f"{path}: not a COCO annotation file: {error}") from None
    for name in SINGULAR:
        if type(content) is not dict or type(content.get(name)) is not list:
            raise DataError(f"{path}: not a COCO annotation file: it has no list of {name}")
    if not content["images"] or not content["categories"]:
        raise DataError(f"{path}: lists no images or no categories")
    return content


def parse_annotations(path: Path) -> tuple[CocoAnnotations, list[str]]:
    """Turns an annotation file into arrays, sorted by image.

    Returns:
        The annotations without their faulty entries, and a line for each of those.

    Raises:
        DataError: the file cannot be read, or is no annotation file at all.
    """
    content = load_json(path)
    listed_images, listed_categories = integer_ids(content["images"]), integer_ids(content["categories"])
    rules = {
        "images": {
            "id": (unseen(is_integer), "a non-negative integer of at most 15 digits that no earlier image has"),
            "file_name": (is_file_name, "a path inside the image folder, in one line"),
            "width": (is_side, "a positive integer"),
            "height": (is_side, "a positive integer"),
        },
        "categories": {
            "id": (unseen(is_integer), "a non-negative integer of at most 15 digits that no earlier category has"),
            "name": (unseen(is_text), "a text in one line that no earlier category has"),
        },
        "annotations": {
            "id": (
                unseen(is_annotation_id),
                "a positive integer that no earlier one has; 0 is COCO's mark for no match",
            ),
            "image_id": (lambda value: is_integer(value) and value in listed_images, "the id of one of the images"),
            "category_id": (lambda value: is_integer(value) and value in listed_categories, "the id of a category"),
            "bbox": (is_box, "x, y, width and height: four finite numbers, and no negative size"),
            "area": (is_area_or_missing, "a finite number that is not negative"),
            "iscrowd": (is_flag_or_missing, "0 or 1"),
        },
    }
    valid, faults = {}, []
    for table in rules:
        valid[table], found = valid_entries(content[table], rules[table])
        faults += [f"{path}: {SINGULAR[table]} {fault}" for fault in found]
    if faults:  # what belongs to a faulty image or category goes with it
        image_ids, category_ids = integer_ids(valid["images"]), integer_ids(valid["categories"])
        valid["annotations"] = [
            one for one in valid["annotations"] if one["image_id"] in image_ids and one["category_id"] in category_ids
        ]
    return to_arrays(path, **valid), faults


def to_arrays(path: Path, images: list[dict], categories: list[dict], annotations: list[dict]) -> CocoAnnotations:
    """Takes entries without faults."""
    row_of = {image["id"]: row for row, image in enumerate(images)}
    rows = np.array([row_of[one["image_id"]] for one in annotations], dtype=np.int64)
    order = np.argsort(rows, kind="stable")

    def column(key: str, dtype: type) -> ndarray:
        return np.array([one.get(key) for one in annotations], dtype=dtype)[order]

    boxes = column("bbox", np.float64).reshape(-1, 4)
    areas, is_crowd = column("area", np.float64), column("iscrowd", np.float64)  # nan where missing
    missing = {"area": np.isnan(areas).sum(), "iscrowd": np.isnan(is_crowd).sum()}
    return CocoAnnotations(
        path=path,
        image_ids=np.array(list(row_of), dtype=np.int64),
        file_names=np.array([image["file_name"].encode() for image in images], dtype=np.bytes_),
        sizes=np.array([(image["height"], image["width"]) for image in images], dtype=np.int64).reshape(-1, 2),
        offsets=np.concatenate(([0], np.bincount(rows, minlength=len(images)).cumsum())),
        boxes=boxes,
        areas=np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas),
        category_ids=column("category_id", np.int64),
        is_crowd=is_crowd == 1,
        annotation_ids=column("id", np.int64),
        categories={category["id"]: category["name"] for category in categories},
        notes=[
            f"{path}: {count} annotations have no {key}: {DEFAULTS[key]}" for key, count in missing.items() if count
        ],
    )


def valid_entries(entries: list, rules: dict[str, Rule]) -> tuple[list[dict], list[str]]:
    """The entries of a list that keep all rules, and what is wrong with the others."""
    valid, faults = [], []
    for position, entry in enumerate(entries, start=1):
        fault = broken_rule(entry, rules)
        if fault is None:
            valid.append(entry)
        else:
            has_id = type(entry) is dict and type(entry.get("id")) in (int, str)
            which = reprlib.repr(entry["id"]) if has_id else f"number {position} of the list"
            faults.append(f"{which} {fault}")
    return valid, faults


def integer_ids(entries: list) -> set[int]:
    return {one["id"] for one in entries if type(one) is dict and is_integer(one.get("id"))}


def broken_rule(entry, rules: dict[str, Rule]) -> str | None:
    if type(entry) is not dict:
        return f"is {reprlib.repr(entry)}, not an object"
    for name, (is_valid, expected) in rules.items():
        if not is_valid(entry.get(name)):
            found = f"{name} {reprlib.repr(entry[name])}" if name in entry else f"no {name}"
            return f"has {found}; it must be {expected}"
    return None


def unseen(is_valid: Callable[[object], bool]) -> Callable[[object], bool]:
    """A rule that holds for valid values, for each the first time."""
    seen = set()

    def is_first(value) -> bool:
        is_new = is_valid(value) and value not in seen
        if is_new:
            seen.add(value)
        return is_new

    return is_first


def is_integer(value) -> bool:
    return type(value) is int and 0 <= value < 10**15  # float64 holds it, and so do the scorers


def is_annotation_id(value) -> bool:
    return is_integer(value) and value != 0


def is_side(value) -> bool:
    return is_integer(value) and value > 0


def is_text(value) -> bool:
    return type(value) is str and value != "" and not UNPRINTABLE.search(value)


def is_file_name(value) -> bool:
    return is_text(value) and not os.path.isabs(value) and Path(os.path.normpath(value)).parts[:1] != ("..",)


def is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e100  # so that areas are finite as well


def is_box(value) -> bool:
    return type(value) is list and len(value) == 4 and all(map(is_number, value)) and value[2] >= 0 and value[3] >= 0


def is_area_or_missing(value) -> bool:
    return value is None or (is_number(value) and value >= 0)


def is_flag_or_missing(value) -> bool:
    return value is None or (type(value) in (int, bool) and value in (0, 1))


def check_same_classes(classes: list[dict], owner: str | Path, annotations: CocoAnnotations) -> None:
    """Raises DataError unless ``classes``, which belong to the file ``owner``, are those of the annotations."""
    for one in [*classes, *annotations.classes]:
        if (one in classes) != (one in annotations.classes):
            holder = owner if one in classes else annotations.path
            raise DataError(
                f"{owner} and {annotations.path} have different classes: "
                f"only {holder} has {one['name']!r} as category {one['id']}"
            )


def describe_file(path: Path) -> dict:
    """What tells whether a file is still the one that was indexed."""
    status = path.stat()
    return {"version": INDEX_VERSION, "path": str(path.resolve()), "size": status.st_size, "mtime": status.st_mtime_ns}


def index_path(path: Path, index_dir: Path) -> Path:
    """The folder for the index of a file: its name, and a mark of where it is."""
    return index_dir / f"{path.stem}-{zlib.crc32(str(path.resolve()).encode()):08x}"


def write_index(annotations: CocoAnnotations, index: Path) -> CocoAnnotations:
    """Stores annotations in the folder ``index``, which appears whole or not at all, and maps them from there.

    Where another machine was faster, its folder is taken. Where nothing can be written, the annotations stay as they
    are, with a note.
    """
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=index.parent))
        try:
            write_files(annotations, temporary / "new")
            if (others := open_index(index, annotations.path)) is not None:
                return others
            with contextlib.suppress(FileNotFoundError):
                index.rename(temporary / "old")  # stale or damaged
            (temporary / "new").rename(index)
        finally:
            shutil.rmtree(temporary)
    except OSError as error:
        note = f"{index}: cannot be written ({error.strerror}), so that every start reads the json again"
        annotations = replace(annotations, notes=[*annotations.notes, note])
    return open_index(index, annotations.path) or annotations


def write_files(annotations: CocoAnnotations, folder: Path) -> None:
    folder.mkdir()
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", getattr(annotations, name))
    texts = {"categories": list(annotations.categories.items()), "notes": annotations.notes}
    (folder / "texts.json").write_text(json.dumps(texts))
    about = {"file": describe_file(annotations.path), "checksums": checksums(folder)}
    (folder / "about.json").write_text(json.dumps(about))


def open_index(index: Path, path: Path) -> CocoAnnotations | None:
    """The annotations that the folder ``index`` stores; None if it is missing, damaged, or not of the file ``path``."""
    try:
        about = json.loads((index / "about.json").read_text())
        if about == {"file": describe_file(path), "checksums": checksums(index)}:
            return map_index(index, path)
    except (OSError, ValueError):
        pass
    return None


def map_index(index: Path, path: Path) -> CocoAnnotations:
    texts = json.loads((index / "texts.json").read_text())
    # asarray: the same memory, without the slowness of NumPy's class for mapped files
    arrays = {name: np.asarray(np.load(index / f"{name}.npy", mmap_mode="r")) for name in ARRAYS}
    return CocoAnnotations(path, **arrays, categories=dict(texts["categories"]), notes=texts["notes"], index=index)


def checksums(folder: Path) -> dict[str, int]:
    return {name: zlib.crc32((folder / name).read_bytes()) for name in [*(f"{a}.npy" for a in ARRAYS), "texts.json"]}
