"""What files say in the form of COCO's json: checked entry by entry, and turned into flat arrays.

What programs write otherwise than COCO does, and can be read without guessing, is taken, with a note.
"""

import reprlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
from numpy import ndarray

from . import rules
from .file_names import find_name, is_odd, readings, relative_name
from .images import read_sizes
from .index import CocoAnnotations
from .rules import DataError, Rule, as_integer

SINGULAR = {"images": "image", "categories": "category", "annotations": "annotation"}
DEFAULTS = {"area": "width x height is used, which may move scores by size", "iscrowd": "taken for no crowd"}
OTHER_NAME = "not as the files are named, such as {}: found all the same"
OTHER_TYPE = "a text or a float, such as {}: taken for the integer"


@dataclass
class Content:
    """What the files of a data set say, as lists of COCO's json.

    Args:
        images, categories, annotations: the lists; without annotations they are images to detect on.
        files: files and folders that it depends on, also such as are not there yet.
        notes, faults: what was odd or wrong with them.
        is_upright: boxes are of images that are turned as their EXIF data say.
        is_voc: Pascal VOC's way to score applies.
    """

    images: list
    categories: list
    annotations: list | None
    files: list[Path]
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    is_upright: bool = False
    is_voc: bool = False

    def add_image(self, file_name: str, width, height) -> int:
        """Adds an image with the next id, and returns that."""
        image_id = 1 + len(self.images)
        self.images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        return image_id

    def add_box(self, image_id: int, category_id: int, box: list[float], is_crowd: int = 0) -> None:
        """Adds an annotation, whose box is xywh in pixels, with the next id."""
        one = {"id": 1 + len(self.annotations), "image_id": image_id, "category_id": category_id, "bbox": box}
        self.annotations.append(one | {"area": box[2] * box[3], "iscrowd": is_crowd})


class Check:
    """What is found in ``content``, which it changes: ``notes`` of what was odd, ``faults`` of what is wrong.

    Args:
        content: what to check.
        path: how messages name it.
        images_dir: folder of the images; None where nobody needs them.
    """

    def __init__(self, content: Content, path: Path, images_dir: Path | None):
        self.content = content
        self.path = path
        self.images_dir = images_dir
        self.files = list(content.files)
        self.notes = list(content.notes)
        self.faults = list(content.faults)
        self.mended = defaultdict(list)  # (list, field, note) -> the values that were not as COCO has them

    def run(self) -> CocoAnnotations:
        """The annotations without their faulty entries.

        Raises:
            DataError: there are no images or no categories at all.
        """
        content, entries = self.content, self.content.annotations or []
        classes, groups = split_groups(content.categories, entries)
        if not content.images or not (classes or content.annotations is None):
            raise DataError(f"{self.path}: lists no images or no categories")
        table_rules = make_rules(integer_ids(content.images), integer_ids(classes), self.images_dir)
        images = self.valid_entries("images", content.images, table_rules)
        categories = self.valid_entries("categories", classes, table_rules)
        annotations = self.valid_entries("annotations", entries, table_rules)
        if self.images_dir is not None:
            self.find_files(images)
        images = self.with_sizes(images)
        if self.faults:  # what belongs to a faulty image or category goes with it
            image_ids, category_ids = integer_ids(images), integer_ids(categories)
            annotations = [
                one for one in annotations if one["image_id"] in image_ids and one["category_id"] in category_ids
            ]
        self.number(annotations)
        arrays, missing = to_arrays(images, annotations)
        self.note_what_was_odd(missing, groups)
        return CocoAnnotations(
            path=self.path,
            **arrays,
            categories=names_by_id(categories),
            groups=names_by_id(groups),
            has_annotations=content.annotations is not None,
            is_upright=content.is_upright,
            is_voc=content.is_voc,
            notes=self.notes,
            files=[str(file) for file in dict.fromkeys(self.files)],
        )

    def note_what_was_odd(self, missing: dict[str, int], groups: list[dict]) -> None:
        for key, number in missing.items():
            self.note(f"{number} annotations have no {key}: {DEFAULTS[key]}")
        for (table, name, note), values in self.mended.items():
            self.note(f"the {name} of {len(values)} {table} is {note.format(reprlib.repr(values[0]))}")
        if groups:
            names = ", ".join(repr(group["name"]) for group in groups)
            self.note(f"categories that only group others, without annotations: {names}; no classes, unless elsewhere")

    def note(self, text: str) -> None:
        self.notes.append(f"{self.path}: {text}")

    def valid_entries(self, table: str, entries: list, table_rules: dict[str, dict[str, Rule]]) -> list[dict]:
        """The entries that keep all rules; says what is wrong with the others."""
        valid = []
        for position, entry in enumerate(entries, start=1):
            fault = self.broken_rule(table, entry, table_rules[table])
            if fault is None:
                valid.append(entry)
            else:
                has_id = type(entry) is dict and type(entry.get("id")) in (int, str)
                which = reprlib.repr(entry["id"]) if has_id else f"number {position} of the list"
                self.faults.append(f"{self.path}: {SINGULAR[table]} {which} {fault}")
        return valid

    def broken_rule(self, table: str, entry, entry_rules: dict[str, Rule]) -> str | None:
        """The first that cannot be mended; what can be is mended in the entry."""
        if type(entry) is not dict:
            return f"is {reprlib.repr(entry)}, not an object"
        for name, (is_valid, expected, mend, note) in entry_rules.items():
            value = entry.get(name)
            if is_valid(value):
                continue
            mended = mend(value)
            if mended is value or not is_valid(mended):
                found = f"{name} {reprlib.repr(value)}" if name in entry else f"no {name}"
                return f"has {found}; it must be {expected}"
            self.mended[table, name, note].append(value)
            entry[name] = mended
        return None

    def find_files(self, images: list[dict]) -> None:
        """Puts the names that files have in the place of those that are spelled otherwise."""
        folder = self.images_dir.absolute()  # of which a name may have the last part in front
        for image in images:
            written = image["file_name"]
            if not is_odd(written, folder):
                continue
            image["file_name"] = find_name(folder, written)
            # where it is, or may come to be
            self.files += {(folder / name).parent for name in (written, image["file_name"], *readings(written, folder))}
            if image["file_name"] != written:
                self.mended["images", "file_name", OTHER_NAME].append(written)

    def with_sizes(self, images: list[dict]) -> list[dict]:
        """The images with sizes, which their files tell where nothing else does; without those where they do not."""
        unknown = [image for image in images if not self.tells_size(image)]
        if not unknown or self.images_dir is None:
            return images
        paths = [self.images_dir / image["file_name"] for image in unknown]
        unreadable = set()
        for image, size in zip(unknown, read_sizes(paths), strict=True):
            if isinstance(size, str):
                unreadable.add(image["id"])
                self.faults.append(f"{self.path}: image {image['id']} tells no size, nor does its file: {size}")
            else:
                image["width"], image["height"] = size
        self.files += paths
        self.note(f"{len(unknown)} images have no width and height that can be: read from their files")
        return [image for image in images if image["id"] not in unreadable]

    def tells_size(self, image: dict) -> bool:
        """Whether it does; a side that cannot be becomes 0."""
        for side in ("width", "height"):
            value = image.get(side)
            if not rules.is_side(value):
                image[side] = as_integer(value)
                if rules.is_side(image[side]):
                    self.mended["images", side, OTHER_TYPE].append(value)
                else:
                    image[side] = 0
        return image["width"] > 0 and image["height"] > 0

    def number(self, annotations: list[dict]) -> None:
        """Gives ids to the annotations that have none that the scorers can use."""
        seen, without = set(), []
        for one in annotations:
            written = one.get("id")
            one["id"] = annotation_id = as_integer(written)
            if rules.is_annotation_id(annotation_id) and annotation_id not in seen:
                seen.add(annotation_id)
                if annotation_id is not written:
                    self.mended["annotations", "id", OTHER_TYPE].append(written)
            else:
                without.append(one)
        new_ids = count(1 + max(seen, default=0))
        for one in without:
            one["id"] = next(new_ids)
        if without:
            unusable = "ids that are missing, doubled or no positive integers"
            self.note(f"{len(without)} annotations have {unusable}: numbered anew")


def make_rules(image_ids: set[int], category_ids: set[int], images_dir: Path | None) -> dict[str, dict[str, Rule]]:
    """For each list what its entries must have, with ids of images and categories that the lists have."""
    integer = partial(Rule, mend=as_integer, note=OTHER_TYPE)
    return {
        "images": {
            "id": integer(
                rules.unseen(rules.is_integer), "a non-negative integer of at most 15 digits that no earlier image has"
            ),
            "file_name": Rule(
                rules.is_file_name,
                "a path inside the image folder, in one line",
                mend=partial(relative_name, images_dir=images_dir),
                note="absolute, such as {}: taken as inside the image folder",
            ),
        },
        "categories": {
            "id": integer(
                rules.unseen(rules.is_integer),
                "a non-negative integer of at most 15 digits that no earlier category has",
            ),
            "name": Rule(rules.unseen(rules.is_text), "a text in one line that no earlier category has"),
        },
        "annotations": {
            "id": Rule(rules.is_any_id, "a positive integer"),
            "image_id": integer(lambda value: rules.is_integer(value) and value in image_ids, "the id of an image"),
            "category_id": integer(
                lambda value: rules.is_integer(value) and value in category_ids, "the id of a category"
            ),
            "bbox": Rule(rules.is_box, "x, y, width and height: four finite numbers, and no negative size"),
            "area": Rule(rules.is_area_or_missing, "a finite number that is not negative"),
            "iscrowd": integer(rules.is_flag_or_missing, "0 or 1"),
        },
    }


def split_groups(categories: list, annotations: list) -> tuple[list, list[dict]]:
    """Categories, and those that others name as their supercategory and that have no annotations of their own.

    Roboflow and others write such a row, which would be a class that nothing is ever of.
    """
    rows = [one for one in categories if type(one) is dict and rules.is_text(one.get("name"))]
    named = defaultdict(set)  # supercategory -> the places of those that name it
    for one in rows:
        if type(one.get("supercategory")) is str:
            named[one["supercategory"]].add(id(one))
    candidates = [one for one in rows if named[one["name"]] - {id(one)}]
    if not candidates:
        return categories, []
    uses = Counter(integers(categories, "id"))
    used = set(integers(annotations, "category_id"))
    groups = [one for one in candidates if (number := as_integer(one.get("id"))) not in used and uses.get(number) == 1]
    left_out = {id(one) for one in groups}
    return [one for one in categories if id(one) not in left_out], groups


def integers(entries: list, key: str) -> list[int]:
    """The values that are integers, or stand for one."""
    values = (as_integer(one.get(key)) for one in entries if type(one) is dict)
    return [value for value in values if rules.is_integer(value)]


def integer_ids(entries: list) -> set[int]:
    return set(integers(entries, "id"))


def names_by_id(categories: list[dict]) -> dict[int, str]:
    return {as_integer(category["id"]): category["name"] for category in categories}


def to_arrays(images: list[dict], annotations: list[dict]) -> tuple[dict[str, ndarray], dict[str, int]]:
    """Takes entries without faults.

    Returns:
        The arrays of ``CocoAnnotations``, and how many annotations lack a field that has a default.
    """
    row_of = {image["id"]: row for row, image in enumerate(images)}
    rows = np.array([row_of[one["image_id"]] for one in annotations], dtype=np.int64)
    order = np.argsort(rows, kind="stable")

    def column(key: str, dtype: type) -> ndarray:
        return np.array([one.get(key) for one in annotations], dtype=dtype)[order]

    boxes = column("bbox", np.float64).reshape(-1, 4)
    areas, is_crowd = column("area", np.float64), column("iscrowd", np.float64)  # nan where missing
    missing = {"area": int(np.isnan(areas).sum()), "iscrowd": int(np.isnan(is_crowd).sum())}
    arrays = {
        "image_ids": np.array(list(row_of), dtype=np.int64),
        "file_names": np.array([image["file_name"].encode() for image in images], dtype=np.bytes_),
        "sizes": np.array([(image["height"], image["width"]) for image in images], dtype=np.int64).reshape(-1, 2),
        "offsets": np.concatenate(([0], np.bincount(rows, minlength=len(images)).cumsum())),
        "boxes": boxes,
        "areas": np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas),
        "category_ids": column("category_id", np.int64),
        "is_crowd": is_crowd == 1,
        "annotation_ids": column("id", np.int64),
    }
    return arrays, {key: number for key, number in missing.items() if number}
