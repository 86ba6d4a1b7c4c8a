"""``train.py --check-data``: everything that is wrong with a data set, before a run finds out."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

import utils
from coco import (
    CocoAnnotations,
    DataError,
    Split,
    agree_on_groups,
    check_same_classes,
    fault_of_image,
    is_object,
    is_turned,
)

from . import loading
from .progress import LiveLine, bar

IMAGES_AT_A_TIME = 8


class ImageFaults(Dataset):
    """Of each image of the annotations what is wrong, an empty text if it is good, and whether it must be turned."""

    def __init__(self, annotations: CocoAnnotations, images_dir: Path):
        self.annotations = annotations
        self.images_dir = images_dir

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    def __getitem__(self, row: int) -> tuple[str, bool]:
        image = self.annotations, self.images_dir, row
        fault = fault_of_image(*image)
        return fault, not fault and is_turned(*image)


def check_data(splits: dict[str, Split], workers: int, loader_timeout: float) -> None:
    """Prints a line for each fault of the training and of the validation set.

    Args:
        splits: ``train`` and ``val``.
        workers: processes that decode the images.
        loader_timeout: seconds to wait for them.

    Raises:
        DataError: there are faults.
    """
    num_faults = 0
    if utils.started_by_torchrun():
        raise ValueError("--check-data runs in one process: start it with python, and use --workers")
    for fault in find_faults(splits, workers, loader_timeout):
        print(fault, flush=True)
        num_faults += 1
    if num_faults:
        raise DataError(f"--check-data found {num_faults} faults, listed above")
    print("No faults")


def find_faults(splits: dict[str, Split], workers: int, loader_timeout: float) -> Iterator[str]:
    """One line for each fault, as they are found; prints what was looked at."""
    checked, listed = [], set()
    for name, split in splits.items():
        try:
            annotations, faults = split.parse()
        except DataError as error:
            yield str(error)
            continue
        yield from (fault for fault in faults if fault not in listed)  # both splits may be of one file
        listed |= {*faults}
        if split.has_images():
            yield from faults_of_images(annotations, split.images_dir, workers, loader_timeout)
        else:
            yield f"{split.images_dir}: no such image folder"
        for line in describe(annotations):
            print(line)
        checked.append(annotations)
        if name == "train" and not is_object(annotations).any():
            yield f"{annotations.path}: no image has a box to train on"
    if len(checked) == 2:
        try:
            train_annotations, val_annotations = agree_on_groups(*checked)
            check_same_classes(train_annotations.classes, train_annotations.path, val_annotations)
        except DataError as error:
            yield str(error)


def faults_of_images(
    annotations: CocoAnnotations, images_dir: Path, workers: int, loader_timeout: float
) -> Iterator[str]:
    """Decodes every image, with a progress bar; notes how many are turned."""
    dataset = ImageFaults(annotations, images_dir)
    settings = {"batch_size": IMAGES_AT_A_TIME, "collate_fn": list}
    loader = loading.make_loader(dataset, workers, loader_timeout, **settings)
    line, done, num_turned = LiveLine(), 0, 0
    for found in loader:
        done += len(found)
        num_turned += sum(turned for _, turned in found)
        line.clear()
        yield from (fault for fault, _ in found if fault)
        line.show(f"{images_dir} {bar(done, len(dataset))}")
    line.clear()
    if num_turned:
        print(f"note: {annotations.path}: {num_turned} images have their size when turned as EXIF data say: turned")


def describe(annotations: CocoAnnotations) -> Iterator[str]:
    """What was checked, and what training will leave out, which is no fault."""
    is_trained_on = is_object(annotations)
    image_of_box = np.repeat(annotations.image_ids, np.diff(annotations.offsets))
    yield (
        f"{annotations.path}: {len(annotations.image_ids)} images with {len(annotations.boxes)} boxes of "
        f"{len(annotations.categories)} classes; of these, training uses {len(np.unique(image_of_box[is_trained_on]))} "
        f"images with {is_trained_on.sum()} boxes"
    )
    for note in annotations.notes:
        yield f"note: {note}"
    for i in np.flatnonzero(~is_trained_on & ~annotations.is_crowd):
        yield (
            f"note: {annotations.path}: annotation {annotations.annotation_ids[i]} of image {image_of_box[i]} has no "
            f"area inside its image: {annotations.boxes[i].tolist()}; it is not trained on"
        )
    for image_id in np.setdiff1d(image_of_box[annotations.is_crowd], image_of_box[~annotations.is_crowd]):
        yield f"note: {annotations.path}: image {image_id} has crowds only; it is not trained on"
