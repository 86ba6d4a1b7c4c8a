"""Data sets and the order of an epoch: what a DataLoader is made of."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler, default_collate

from coco import CocoAnnotations, DataError, SharedFiles, is_object, load_image, load_or_skip, objects_of_image


class CocoTrainDataset(Dataset):
    """Training samples by ``(pass, index)``; all randomness of a sample comes from ``(seed, pass, index)``.

    Crowd boxes and boxes without area are left out, boxes are clipped to the image, and images that have none left are
    not trained on. (torchvision also keeps images that have crowds only; SSD learns nothing from them.)

    Args:
        annotations: what to train on.
        images_dir: folder of the images.
        preset: ``(image, boxes, labels, rng) -> sample``.
        seed: seed of the run.
        skip_bad_images: in place of an image that cannot be read, serve a black one without objects, which adds nothing
            to SSD's loss, and the reason as ``fault`` of the sample (else an empty text). By default a DataError.
        files: the content of all images of the annotations, in their order. By default they are read from the folder.

    Raises:
        DataError: no image has a box to train on.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        images_dir: str | Path,
        preset,
        seed: int,
        skip_bad_images: bool = False,
        files: SharedFiles | None = None,
    ):
        self.annotations = annotations
        self.images_dir = Path(images_dir)
        self.preset = preset
        self.seed = seed
        self.skip_bad_images = skip_bad_images
        self.files = files
        objects_until = np.concatenate(([0], is_object(annotations).cumsum()))[annotations.offsets]
        self.num_boxes = int(objects_until[-1])
        boxes_per_image = np.diff(objects_until)
        self.max_boxes = int(boxes_per_image.max(initial=0))
        self.rows = np.flatnonzero(boxes_per_image)
        if len(self.rows) == 0:
            raise DataError(f"{annotations.path}: no image has a box to train on")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        pass_number, index = key
        row = self.rows[index]
        boxes, labels = objects_of_image(self.annotations, row)
        content = self.files[row] if self.files else None
        load = partial(load_image, self.annotations, self.images_dir, row, content)
        image, fault = load_or_skip(load, self.skip_bad_images)
        if fault:
            boxes, labels = boxes[:0], labels[:0]
        rng = np.random.default_rng((self.seed, pass_number, 1 + index))  # with 0 it would be that of an epoch's order
        sample = self.preset(image, boxes, labels, rng)
        return sample | {"image_id": int(self.annotations.image_ids[row]), "fault": fault}


class CocoEvalDataset(Dataset):
    """Every image of the annotations, resized for the model, with its objects, id and original size.

    Args:
        annotations: the images, and what is in them.
        images_dir: folder of the images.
        preset: ``(image, boxes) -> sample``.
        skip_bad_images: as for training.
    """

    def __init__(self, annotations: CocoAnnotations, images_dir: str | Path, preset, skip_bad_images: bool = False):
        self.annotations = annotations
        self.images_dir = Path(images_dir)
        self.preset = preset
        self.skip_bad_images = skip_bad_images

    @property
    def image_ids(self) -> ndarray:
        return self.annotations.image_ids

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, row: int) -> dict:
        boxes, labels = objects_of_image(self.annotations, row)
        load = partial(load_image, self.annotations, self.images_dir, row)
        image, fault = load_or_skip(load, self.skip_bad_images)
        if fault:
            boxes, labels = boxes[:0], labels[:0]
        return self.preset(image, boxes) | {
            "labels": torch.from_numpy(labels),
            "fault": fault,
            "image_id": int(self.image_ids[row]),
            "size": torch.tensor(self.annotations.sizes[row]),
        }


class EpochBatchSampler(Sampler):
    """This rank's batches of ``(pass, index)`` keys. Incomplete batches at the end of an epoch are dropped.

    The order of an epoch depends on the seed and the epoch alone, and a step's global batch on nothing else but its
    size: it is ``world_size`` times ``accumulate`` batches, of which each rank has ``accumulate`` in a row. ``select``
    says which epoch comes next, and which of its steps.

    An epoch passes over all images once, or again until it has ``min_samples``; each pass has an order of its own, and
    passes are counted through all epochs.

    Raises:
        DataError: an epoch is smaller than one global batch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        min_samples: int = 0,
    ):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.accumulate = accumulate
        self.images_per_step = batch_size * world_size * accumulate  # of all ranks together
        num_samples = max(num_images, min_samples)
        self.passes = math.ceil(num_samples / num_images)
        self.steps_per_epoch = num_samples // self.images_per_step
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{num_images} training images do not fill {accumulate} batch(es) of {batch_size} on {world_size} "
                "process(es): lower --batch-size or --accumulate, or raise --epoch-samples"
            )
        self.select(epoch=0)

    def select(self, epoch: int, first_step: int = 0, last_step: int | None = None) -> None:
        """Lets the next iteration yield the steps ``first_step`` to ``last_step`` (exclusive) of ``epoch``."""
        self.epoch = epoch
        self.first_step = first_step
        self.last_step = self.steps_per_epoch if last_step is None else min(last_step, self.steps_per_epoch)

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulate

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        first_pass = self.epoch * self.passes
        order = np.concatenate([rng.permutation(self.num_images) for _ in range(self.passes)])
        for step in range(self.first_step, self.last_step):
            for part in range(self.accumulate):
                start = ((step * self.world_size + self.rank) * self.accumulate + part) * self.batch_size
                places = range(start, start + self.batch_size)
                yield [(first_pass + place // self.num_images, int(order[place])) for place in places]


def collate(samples: list[dict], num_slots: int = 0) -> dict:
    """Stacks samples; ``objects``, float32 [B, G, 5], holds their boxes and labels, where label 0 marks an empty slot.

    G is the largest number of boxes, or ``num_slots`` if that is more: a constant number lets every batch have the
    same shapes, so that a step is compiled once. Image ids, which no device needs, stay a list.

    To take over a tensor from a worker costs a process more time than what is in it (``benchmarks/handover.py``), so a
    batch has few of them.
    """
    objects = [torch.column_stack((sample.pop("boxes"), sample.pop("labels"))) for sample in samples]
    image_ids = [sample.pop("image_id") for sample in samples]
    slots = pad_sequence(objects, batch_first=True)
    missing = max(num_slots - slots.shape[1], 0)
    return default_collate(samples) | {"objects": F.pad(slots, (0, 0, 0, missing)), "image_id": image_ids}


def split_objects(objects: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes, float32 [B, G, 4], and labels, int64 [B, G], of ``objects`` [B, G, 5] as ``collate`` makes them."""
    return objects[..., :4], objects[..., 4].long()
