"""Annotation files: COCO's json, and what files of other formats say in its form."""

import json
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .checks import Check, Content
from .file_names import spellings
from .index import CocoAnnotations, HeldOut, index_path, open_index, write_index
from .rules import DataError

# masks are most of a file, and SSD needs none
POLYGONS = re.compile(rb'("segmentation"\s*:\s*)\[[-+.,\d\seE\[\]]*\]')


class Source(Protocol):
    """Annotations in some format; ``path`` is how messages name them."""

    path: Path

    def load(self) -> Content:
        """Reads them.

        Raises:
            DataError: they cannot be read, or are of another format.
        """


@dataclass(frozen=True)
class JsonFile:
    """A file in COCO's format."""

    path: Path

    def load(self) -> Content:
        content = load_json(self.path)
        return Content(content["images"], content["categories"], content.get("annotations"), files=[self.path])


def read_annotations(
    source: str | Path | Source,
    index_dir: str | Path | None = None,
    images_dir: str | Path | None = None,
    part: HeldOut | None = None,
) -> CocoAnnotations:
    """Reads and checks annotations, or maps their index from ``index_dir``, where one is made if there is none.

    Args:
        source: a file in COCO's format, or annotations in another.
        index_dir: folder for the index; without it there is none.
        images_dir: folder of the images, in which their files are looked up where the annotations do not tell enough;
            None where nobody needs images.
        part: which images to take; by default all.

    Raises:
        DataError: a file is missing or not in its format, or its content contradicts itself.
    """
    source = as_source(source)
    index = None if index_dir is None else index_path(source.path, Path(index_dir), f"{source} {images_dir} {part}")
    if index is not None and (annotations := open_index(index, source.path)) is not None:
        return annotations
    if part is not None:  # whose other part reads the same files
        annotations = part.of(read_annotations(source, index_dir, images_dir))
    else:
        annotations, faults = parse_annotations(source, images_dir)
        if faults:
            more = f" (and {len(faults) - 1} more faults; train.py --check-data lists them)" if len(faults) > 1 else ""
            raise DataError(faults[0] + more)
    return annotations if index is None else write_index(annotations, index)


def parse_annotations(
    source: str | Path | Source, images_dir: str | Path | None = None, part: HeldOut | None = None
) -> tuple[CocoAnnotations, list[str]]:
    """Turns annotations into arrays, sorted by image; the arguments are those of ``read_annotations``.

    Returns:
        The annotations without their faulty entries, and a line for each of those.

    Raises:
        DataError: a file cannot be read, or is of another format.
    """
    source = as_source(source)
    spellings.cache_clear()  # files may have been renamed since
    try:
        content = source.load()
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    check = Check(content, source.path, None if images_dir is None else Path(images_dir))
    annotations = check.run()
    return annotations if part is None else part.of(annotations), check.faults


def as_source(source: str | Path | Source) -> Source:
    return JsonFile(Path(source)) if isinstance(source, (str, Path)) else source


def load_json(path: Path) -> dict:
    """The content of an annotation file without its polygons. A list of images to detect on has no ``annotations``.

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
    is_object = type(content) is dict
    is_list_of_images = is_object and "annotations" not in content and bool(content.get("images"))
    if is_list_of_images:
        content.setdefault("categories", [])
    for name in ("images", "categories", "annotations"):
        is_needed = name != "annotations" or not is_list_of_images
        if not is_object or (is_needed and type(content.get(name)) is not list):
            raise DataError(f"{path}: not a COCO annotation file: it has no list of {name}")
    return content


def agree_on_groups(*sets: CocoAnnotations) -> list[CocoAnnotations]:
    """The same sets, in which a category only groups others (``CocoAnnotations.groups``) if it does so in all of them.

    Raises:
        DataError: two categories of a set have the same name.
    """
    ids = {category_id for annotations in sets for category_id in annotations.categories}
    return [annotations.with_categories(ids) for annotations in sets]


def check_same_classes(classes: list[dict], owner: str | Path, annotations: CocoAnnotations) -> None:
    """Raises DataError unless ``classes``, which belong to the file ``owner``, are those of the annotations."""
    for one in [*classes, *annotations.classes]:
        if (one in classes) != (one in annotations.classes):
            holder = owner if one in classes else annotations.path
            raise DataError(
                f"{owner} and {annotations.path} have different classes: "
                f"only {holder} has {one['name']!r} as category {one['id']}"
            )
