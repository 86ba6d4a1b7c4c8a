"""A part of a data set, and how its annotations come to all processes."""

from dataclasses import dataclass
from pathlib import Path

import utils

from .annotations import Source, agree_on_groups, check_same_classes, parse_annotations, read_annotations
from .index import CocoAnnotations, HeldOut
from .rules import DataError


@dataclass(frozen=True)
class Split:
    """What to train or to validate on: a folder of images, and annotations in some format.

    Args:
        images_dir: the folder; None where nobody needs images.
        source: the annotations.
        part: of the images; by default all.
    """

    images_dir: Path | None
    source: Source
    part: HeldOut | None = None

    def open(self, index_dir: Path, needs_images: bool = True, needs_annotations: bool = True) -> CocoAnnotations:
        """The annotations, whose index in ``index_dir`` all processes share; the main one prints their notes.

        Raises:
            ValueError: there is no such image folder, or only a list of images, where they are needed; or the
                annotations have faults.
        """
        if needs_images and not self.has_images():
            raise DataError(f"{self.images_dir}: no such image folder")
        with utils.main_first():  # so that the files are read once
            images_dir = self.images_dir if needs_images else None
            annotations = read_annotations(self.source, index_dir, images_dir, self.part)
        if needs_annotations:
            self.check_has_annotations(annotations)
        for note in annotations.notes:
            utils.print_on_main(note)
        return annotations

    def parse(self) -> tuple[CocoAnnotations, list[str]]:
        """The annotations without their faulty entries, and a line for each of those.

        Raises:
            DataError: a file cannot be read, or is of another format, or only a list of images.
        """
        annotations, faults = parse_annotations(self.source, self.images_dir if self.has_images() else None, self.part)
        self.check_has_annotations(annotations)
        return annotations, faults

    def has_images(self) -> bool:
        return self.images_dir is not None and self.images_dir.is_dir()

    def check_has_annotations(self, annotations: CocoAnnotations) -> None:
        if not annotations.has_annotations:
            raise DataError(
                f"{annotations.path}: has no list of annotations; evaluate.py --checkpoint can detect on its images"
            )


def open_splits(splits: dict[str, Split], index_dir: Path) -> tuple[CocoAnnotations, CocoAnnotations]:
    """The annotations of ``train`` and ``val``, see ``Split.open``.

    Raises:
        ValueError: as there, or they have different classes.
    """
    train, val = agree_on_groups(*(splits[name].open(index_dir) for name in ("train", "val")))
    check_same_classes(train.classes, train.path, val)
    return train, val
