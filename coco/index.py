"""COCO's annotations as flat arrays, and the folder that keeps them: an index of an annotation file.

Processes map the arrays of an index instead of copying them, and the next start maps them instead of reading the json
again. Indices lie beside a run's output.
"""

import contextlib
import json
import shutil
import tempfile
import zlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy import ndarray

MAX_COCO_CATEGORY_ID = 90
INDEX_VERSION = 1


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

    @cached_property
    def category_id_of(self) -> dict[int, int]:
        """Class label of the model -> category id."""
        return {label: category_id for category_id, label in self.label_of.items()}

    @property
    def num_classes(self) -> int:
        """Outputs that a model of these classes needs, background included."""
        return max(self.label_of.values()) + 1

    @property
    def classes(self) -> list[dict]:
        """Label, category id and name of each class, in order of the labels: what a checkpoint keeps."""
        return [{"label": self.label_of[i], "id": i, "name": self.categories[i]} for i in sorted(self.categories)]


ARRAYS = tuple(name for name, kind in CocoAnnotations.__annotations__.items() if kind is ndarray)


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
