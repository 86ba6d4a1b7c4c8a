"""Which files a data set consists of, and how its annotations come to all processes."""

from dataclasses import dataclass
from pathlib import Path

import utils

from . import shapes
from .annotations import read_annotations
from .index import CocoAnnotations

SHAPES_PATH = "data/shapes"


@dataclass(frozen=True)
class Split:
    """The part of a data set to train or to validate on: a folder of images, and their annotation file."""

    images_dir: Path
    annotations_file: Path

    def open(self, index_dir: Path, needs_images: bool = True) -> CocoAnnotations:
        """The annotations, whose index in ``index_dir`` all processes share; the main one prints their notes.

        Raises:
            ValueError: there is no such image folder, though it is needed, or the annotations have faults.
        """
        if needs_images and not self.images_dir.is_dir():
            raise ValueError(f"{self.images_dir}: no such image folder")
        with utils.main_first():  # so that the file is read once
            annotations = read_annotations(self.annotations_file, index_dir)
        for note in annotations.notes:
            utils.print_on_main(note)
        return annotations


def find_split(
    name: str, dataset: str, data_path: str | None, images: str | None = None, annotations: str | None = None
) -> Split:
    """The files of the split ``train`` or ``val``.

    Args:
        name: of the split.
        dataset: ``coco``, or ``shapes`` for the embedded data set, which is drawn where it is not there yet.
        data_path: the folder of a data set in COCO's layout; of shapes by default ``SHAPES_PATH``.
        images, annotations: folder and file, for another layout than COCO's.

    Raises:
        ValueError: neither a data path nor the files of the split are named.
    """
    if dataset == "shapes":
        data_path = data_path or SHAPES_PATH
        with utils.main_first():
            shapes.draw_data_set(data_path)
    if data_path is None and not (images and annotations):
        raise ValueError(
            f"--data-path is missing: give the folder of a COCO data set, or --{name}-images and "
            f"--{name}-annotations; --dataset shapes needs neither"
        )
    return Split(
        Path(images or f"{data_path}/{name}2017"),
        Path(annotations or f"{data_path}/annotations/instances_{name}2017.json"),
    )
