"""COCO's annotations as flat arrays, and the folder that keeps them: an index of annotation files.

Processes map the arrays of an index instead of copying them, and the next start maps them instead of reading the files
again. Indices lie beside a run's output.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy import ndarray

from .file_names import comparable
from .rules import DataError

MAX_COCO_CATEGORY_ID = 90
INDEX_VERSION = 2


@dataclass(frozen=True)
class CocoAnnotations:
    """The annotations of a data set as flat arrays; image ``i`` has the boxes ``offsets[i]`` to ``offsets[i + 1]``.

    Boxes are xywh in pixels of the original image.
    """

    path: Path  # that names them
    image_ids: ndarray  # int64 [images]
    file_names: ndarray  # UTF-8 bytes [images]
    sizes: ndarray  # int64 [images, 2], height and width; 0 where they were opened without images and do not tell
    offsets: ndarray  # int64 [images + 1]
    boxes: ndarray  # float64 [boxes, 4]
    areas: ndarray  # float64 [boxes]
    category_ids: ndarray  # int64 [boxes]
    is_crowd: ndarray  # bool [boxes]
    annotation_ids: ndarray  # int64 [boxes]
    categories: dict[int, str]  # category id -> name
    groups: dict[int, str] = field(default_factory=dict)  # categories that only stand for others; not among the above
    has_annotations: bool = True  # or it is a list of images to detect on
    is_upright: bool = False  # boxes are of images that are turned as their EXIF data say
    is_voc: bool = False  # Pascal VOC's way to score applies; crowds are what it calls difficult objects
    notes: list[str] = field(default_factory=list)  # what was assumed or mended
    files: list[str] = field(default_factory=list, repr=False)  # files and folders that all this depends on
    index: Path | None = None  # the folder that the arrays are mapped from

    def __reduce__(self):
        """Mapped arrays reach another process as the name of their folder, not as a copy."""
        return (map_index, (self.index, self.texts())) if self.index is not None else super().__reduce__()

    def texts(self) -> dict:
        """All but the arrays and where they are mapped from."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in (*ARRAYS, "index")}

    def file_name(self, row: int) -> str:
        return self.file_names[row].decode()

    def image_paths(self, images_dir: Path) -> list[Path]:
        return [images_dir / name.decode() for name in self.file_names]

    def with_classes(self, classes: list[dict]) -> "CocoAnnotations":
        """These annotations with the ``classes`` of a model, where it is not for them to tell what is a class.

        That is for their ``groups``, and for a list of images that names no categories.
        """
        if not self.categories and not self.has_annotations:
            return replace(self, categories={one["id"]: one["name"] for one in classes}, groups={})
        return self.with_categories(one["id"] for one in classes)

    def with_categories(self, ids: Iterable[int]) -> "CocoAnnotations":
        """These annotations, with those of ``groups`` as categories that are so elsewhere: of the given ids.

        Raises:
            DataError: one has the name of another category.
        """
        ids = set(ids)
        taken = {i: name for i, name in self.groups.items() if i in ids}
        if not taken:
            return self
        for i, name in taken.items():
            if name in self.categories.values():
                raise DataError(f"{self.path}: category {i} has the name {name!r} of another; give it one of its own")
        groups = {i: name for i, name in self.groups.items() if i not in taken}
        return replace(self, categories=dict(sorted((self.categories | taken).items())), groups=groups)

    @cached_property
    def label_of(self) -> dict[int, int]:
        """Category id -> class label of the model.

        The id itself where all lie in 1 to 90, so that a model of COCO has torchvision's 91 outputs; else 1, 2, ...
        """
        if all(1 <= category_id <= MAX_COCO_CATEGORY_ID for category_id in self.categories):
            return {category_id: category_id for category_id in self.categories}
        return {category_id: label for label, category_id in enumerate(sorted(self.categories), start=1)}

    @cached_property
    def category_id_of(self) -> dict[int, int]:
        """Class label of the model -> category id."""
        return {label: category_id for category_id, label in self.label_of.items()}

    @property
    def num_classes(self) -> int:
        """Outputs that a model of these classes needs, background included."""
        return max(self.label_of.values(), default=0) + 1

    @property
    def classes(self) -> list[dict]:
        """Label, category id and name of each class, in order of the labels: what a checkpoint keeps."""
        return [{"label": self.label_of[i], "id": i, "name": self.categories[i]} for i in sorted(self.categories)]


ARRAYS = tuple(name for name, kind in CocoAnnotations.__annotations__.items() if kind is ndarray)


@dataclass(frozen=True)
class HeldOut:
    """A part of a data set that comes in one: the images that are held out of training, or the others.

    A hash of the name of an image's file, without folders, decides, so that it is the same part in every run and place,
    and a set that grows keeps what it has held out. If it decides for none or for all, the image next to the limit
    changes sides.

    Args:
        fraction: how many are held out, about.
        is_held_out: it is these, or the others.
    """

    fraction: float
    is_held_out: bool

    def of(self, annotations: CocoAnnotations) -> CocoAnnotations:
        """The annotations of its images.

        Raises:
            DataError: all files have the same name, or there is but one.
        """
        places = np.array([place_of(name.decode()) for name in annotations.file_names])
        if len(set(places)) < 2:
            raise DataError(f"{annotations.path}: has too few images, or names of their files, to hold some out")
        limit = max(self.fraction, places.min())
        is_held_out = places <= limit if limit < places.max() else places < places.max()
        return select_images(annotations, np.flatnonzero(is_held_out == self.is_held_out))


def place_of(file_name: str) -> float:
    """Where a hash of its name puts an image between 0 and 1, however a system spells the name."""
    name = comparable(file_name).rpartition("/")[2]
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48


def select_images(annotations: CocoAnnotations, rows: ndarray) -> CocoAnnotations:
    """Some of the images, with their annotations."""
    counts = np.diff(annotations.offsets)
    chosen = np.zeros(len(counts), dtype=bool)
    chosen[rows] = True
    of_image = {name: getattr(annotations, name)[chosen] for name in ("image_ids", "file_names", "sizes")}
    of_box = ("boxes", "areas", "category_ids", "is_crowd", "annotation_ids")
    of_box = {name: getattr(annotations, name)[np.repeat(chosen, counts)] for name in of_box}
    offsets = np.concatenate(([0], counts[chosen].cumsum()))
    return replace(annotations, **of_image, **of_box, offsets=offsets, index=None)


def describe(index: Path, files: list[str]) -> dict:
    """What tells whether an index is whole, and of the files as they are now: among it a hash of sizes and times."""
    digest = hashlib.sha256(repr([state_of(file) for file in files]).encode()).hexdigest()
    return {"version": INDEX_VERSION, "files": digest, "checksums": checksums(index)}


def state_of(file: str) -> tuple:
    try:
        status = os.stat(file)
    except OSError:  # it may come
        return (file,)
    return file, status.st_size, status.st_mtime_ns


def index_path(path: Path, index_dir: Path, settings: str) -> Path:
    """The folder for the index of a file: its name, and a mark of where it is and how it is read."""
    return index_dir / f"{path.stem}-{zlib.crc32(f'{path.resolve()} {settings}'.encode()):08x}"


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
        note = f"{index}: cannot be written ({error.strerror}), so that every start reads the annotations again"
        annotations = replace(annotations, notes=[*annotations.notes, note])
    return open_index(index, annotations.path) or annotations


def write_files(annotations: CocoAnnotations, folder: Path) -> None:
    folder.mkdir()
    for name in ARRAYS:
        np.save(folder / f"{name}.npy", getattr(annotations, name))
    texts = annotations.texts() | {"path": None}
    texts |= {name: list(texts[name].items()) for name in ("categories", "groups")}
    (folder / "texts.json").write_text(json.dumps(texts))
    (folder / "about.json").write_text(json.dumps(describe(folder, annotations.files)))


def open_index(index: Path, path: Path) -> CocoAnnotations | None:
    """The annotations that the folder ``index`` stores; None if it is missing, damaged, or the files have changed."""
    try:
        about, texts = (json.loads((index / name).read_text()) for name in ("about.json", "texts.json"))
        if about == describe(index, texts["files"]):
            texts |= {name: dict(texts[name]) for name in ("categories", "groups")}
            return map_index(index, texts | {"path": path})
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def map_index(index: Path, texts: dict) -> CocoAnnotations:
    # asarray: the same memory, without the slowness of NumPy's class for mapped files
    arrays = {name: np.asarray(np.load(index / f"{name}.npy", mmap_mode="r")) for name in ARRAYS}
    return CocoAnnotations(**arrays, **texts, index=index)


def checksums(folder: Path) -> dict[str, int]:
    return {name: zlib.crc32((folder / name).read_bytes()) for name in [*(f"{a}.npy" for a in ARRAYS), "texts.json"]}
