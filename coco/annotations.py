"""COCO's annotation files: parsed, checked entry by entry, and turned into flat arrays."""

import json
import mmap
import os
import re
import reprlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy import ndarray

from .index import CocoAnnotations, index_path, open_index, write_index

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
    rules = make_rules(integer_ids(content["images"]), integer_ids(content["categories"]))
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


def make_rules(image_ids: set[int], category_ids: set[int]) -> dict[str, dict[str, Rule]]:
    """For each list of a file what its entries must have, with ids of images and categories that the file lists."""
    return {
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
            "image_id": (lambda value: is_integer(value) and value in image_ids, "the id of one of the images"),
            "category_id": (lambda value: is_integer(value) and value in category_ids, "the id of a category"),
            "bbox": (is_box, "x, y, width and height: four finite numbers, and no negative size"),
            "area": (is_area_or_missing, "a finite number that is not negative"),
            "iscrowd": (is_flag_or_missing, "0 or 1"),
        },
    }


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
