"""``train.py --check-data``: everything that is wrong with a data set, before a run finds out."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

import coco_annotations
import coco_utils
import flags
import loading
import run_log
import utils
from coco_annotations import CocoAnnotations, DataError

IMAGES_AT_A_TIME = 8


class ImageFaults(Dataset):
    """What is wrong with each image of the annotations; an empty text if it is good."""

    def __init__(self, annotations: CocoAnnotations, images_dir: Path):
        self.annotations = annotations
        self.images_dir = images_dir

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    def __getitem__(self, row: int) -> str:
        return coco_utils.fault_of_image(self.annotations, self.images_dir, row)


def check_data(args: argparse.Namespace) -> None:
    """Prints a line for each fault of the training and of the validation set.

    Raises:
        DataError: there are faults.
    """
    num_faults = 0
    if utils.started_by_torchrun():
        raise ValueError("--check-data runs in one process: start it with python, and use --workers")
    for fault in find_faults(args):
        print(fault, flush=True)
        num_faults += 1
    if num_faults:
        raise DataError(f"--check-data found {num_faults} faults, listed above")
    print("No faults")


def find_faults(args: argparse.Namespace) -> Iterator[str]:
    """One line for each fault, as they are found; prints what was looked at."""
    checked = []
    for split in ("train", "val"):
        images_dir, path = flags.name_data(args, split)
        try:
            annotations, faults = coco_annotations.parse_annotations(path)
        except DataError as error:
            yield str(error)
            continue
        yield from faults
        if images_dir.is_dir():
            yield from faults_of_images(annotations, images_dir, args)
        else:
            yield f"{images_dir}: no such image folder"
        for line in describe(annotations):
            print(line)
        checked.append(annotations)
        if split == "train" and not coco_utils.is_object(annotations).any():
            yield f"{path}: no image has a box to train on"
    if len(checked) == 2:
        train, val = checked
        try:
            coco_annotations.check_same_classes(train.classes, train.path, val)
        except DataError as error:
            yield str(error)


def faults_of_images(annotations: CocoAnnotations, images_dir: Path, args: argparse.Namespace) -> Iterator[str]:
    """Decodes every image, with a progress bar."""
    dataset = ImageFaults(annotations, images_dir)
    settings = {"batch_size": IMAGES_AT_A_TIME, "collate_fn": list}
    loader = loading.make_loader(dataset, args.workers, args.loader_timeout, **settings)
    line, done = run_log.LiveLine(), 0
    for faults in loader:
        done += len(faults)
        line.clear()
        yield from filter(None, faults)
        line.show(f"{images_dir} {run_log.bar(done, len(dataset))}")
    line.clear()


def describe(annotations: CocoAnnotations) -> Iterator[str]:
    """What was checked, and what training will leave out, which is no fault."""
    is_object = coco_utils.is_object(annotations)
    image_of_box = np.repeat(annotations.image_ids, np.diff(annotations.offsets))
    yield (
        f"{annotations.path}: {len(annotations.image_ids)} images with {len(annotations.boxes)} boxes of "
        f"{len(annotations.categories)} classes; of these, training uses {len(np.unique(image_of_box[is_object]))} "
        f"images with {is_object.sum()} boxes"
    )
    for note in annotations.notes:
        yield f"note: {note}"
    for i in np.flatnonzero(~is_object & ~annotations.is_crowd):
        yield (
            f"note: {annotations.path}: annotation {annotations.annotation_ids[i]} of image {image_of_box[i]} has no "
            f"area inside its image: {annotations.boxes[i].tolist()}; it is not trained on"
        )
    for image_id in np.setdiff1d(image_of_box[annotations.is_crowd], image_of_box[~annotations.is_crowd]):
        yield f"note: {annotations.path}: image {image_id} has crowds only; it is not trained on"
