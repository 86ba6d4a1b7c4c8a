"""Data in COCO's format: images, data sets, and the order of an epoch."""

from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler, default_collate

from coco_annotations import CocoAnnotations, DataError

MIN_BOX_SIDE = 0.01  # pixels; the sides of smaller boxes may round to zero when they are cropped and resized


def load_image(annotations: CocoAnnotations, images_dir: Path, row: int) -> ndarray:
    """Decodes an image to uint8 [H, W, 4]: RGB and a byte without meaning; pixels of four bytes are gathered fastest.

    EXIF rotation is ignored, since COCO's boxes are not rotated.

    Raises:
        DataError: the file is missing, damaged, outside ``images_dir``, or of another size than the annotations say.
    """
    path = images_dir / annotations.file_name(row)
    where = f"{path} (image id {annotations.image_ids[row]})"
    height, width = annotations.sizes[row].tolist()
    try:
        with Image.open(path, formats=["JPEG", "PNG"]) as image:
            if image.size == (width, height):
                rgb = image if image.mode == "RGB" else image.convert("RGB")
                return np.frombuffer(rgb.tobytes("raw", "RGBX"), np.uint8).reshape(height, width, 4)
            size = image.size
    except FileNotFoundError:
        raise DataError(f"{where}: no such file; check the image folder") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: cannot be decoded ({error}); replace the file or remove the image") from None
    raise DataError(f"{where}: is {size[0]}x{size[1]} pixels, but {annotations.path} says {width}x{height}")


def clip_boxes(boxes: ndarray, is_crowd: ndarray, sizes: ndarray) -> tuple[ndarray, ndarray]:
    """Boxes [G, 4] of the file, xywh, as training needs them.

    Returns:
        float32 [G, 4], xyxy, clipped to the image; and bool [G]: what is an object, no crowd and not without area.
    """
    limits = sizes[..., ::-1]  # width and height
    start, end = boxes[:, :2].clip(0, limits), (boxes[:, :2] + boxes[:, 2:]).clip(0, limits)
    clipped = np.concatenate((start, end), axis=1).astype(np.float32)
    return clipped, ~is_crowd & (clipped[:, 2:] - clipped[:, :2] >= MIN_BOX_SIDE).all(axis=1)


class CocoTrainDataset(Dataset):
    """Training samples by ``(epoch, index)``; all randomness of a sample comes from ``(seed, epoch, index)``.

    Crowd boxes and boxes without area are left out, boxes are clipped to the image, and images that have none left are
    not trained on. (torchvision also keeps images that have crowds only; SSD learns nothing from them.)

    Args:
        annotations: what to train on.
        images_dir: folder of the images.
        preset: ``(image, boxes, labels, rng) -> sample``.
        seed: seed of the run.

    Raises:
        DataError: no image has a box to train on.
    """

    def __init__(self, annotations: CocoAnnotations, images_dir: str | Path, preset, seed: int):
        self.annotations = annotations
        self.images_dir = Path(images_dir)
        self.preset = preset
        self.seed = seed
        num_images = len(annotations.image_ids)
        image_of_box = np.repeat(np.arange(num_images), np.diff(annotations.offsets))
        _, is_object = clip_boxes(annotations.boxes, annotations.is_crowd, annotations.sizes[image_of_box])
        self.num_boxes = int(is_object.sum())
        self.rows = np.flatnonzero(np.bincount(image_of_box, weights=is_object, minlength=num_images))
        if len(self.rows) == 0:
            raise DataError(f"{annotations.path}: no image has a box to train on")

    def __len__(self) -> int:
        return len(self.rows)

    def objects(self, row: int) -> tuple[ndarray, ndarray]:
        """What to find in an image: boxes float32 [G, 4], xyxy in its pixels, and labels int64 [G]."""
        a, span = self.annotations, slice(*self.annotations.offsets[row : row + 2])
        boxes, is_object = clip_boxes(a.boxes[span], a.is_crowd[span], a.sizes[row])
        labels = np.array([a.label_of[category_id] for category_id in a.category_ids[span].tolist()], dtype=np.int64)
        return boxes[is_object], labels[is_object]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        row = self.rows[index]
        image = load_image(self.annotations, self.images_dir, row)
        rng = np.random.default_rng((self.seed, epoch, 1 + index))  # with 0 it would be that of the epoch's order
        sample = self.preset(image, *self.objects(row), rng)
        return sample | {"image_id": int(self.annotations.image_ids[row])}


class CocoEvalDataset(Dataset):
    """Every image of the annotations, resized for the model, with its id and original size.

    Args:
        annotations: the images.
        images_dir: folder of the images.
        preset: ``image -> Tensor``.
        rows: which images to serve, as rows of the annotations; a rank's share of them.
    """

    def __init__(self, annotations: CocoAnnotations, images_dir: str | Path, preset, rows: range):
        self.annotations = annotations
        self.images_dir = Path(images_dir)
        self.preset = preset
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        return {
            "image": self.preset(load_image(self.annotations, self.images_dir, row)),
            "image_id": int(self.annotations.image_ids[row]),
            "size": torch.from_numpy(self.annotations.sizes[row]),
        }


class EpochBatchSampler(Sampler):
    """This rank's batches of ``(epoch, index)`` keys. Incomplete batches at the end of an epoch are dropped.

    The order of an epoch depends on the seed and the epoch alone, and a step's global batch on nothing else but its
    size. ``select`` says which epoch comes next, and which of its steps.

    Raises:
        DataError: the data set is smaller than one global batch.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.steps_per_epoch = num_images // (batch_size * world_size)
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{num_images} training images do not fill one batch of {batch_size} on {world_size} process(es): "
                "lower --batch-size"
            )
        self.select(epoch=0)

    def select(self, epoch: int, first_step: int = 0, last_step: int | None = None) -> None:
        """Lets the next iteration yield the steps ``first_step`` to ``last_step`` (exclusive) of ``epoch``."""
        self.epoch = epoch
        self.first_step = first_step
        self.last_step = self.steps_per_epoch if last_step is None else min(last_step, self.steps_per_epoch)

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_images)
        for step in range(self.first_step, self.last_step):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, int(index)) for index in order[start : start + self.batch_size]]


def collate(samples: list[dict]) -> dict:
    """Stacks samples; boxes and labels are padded to [B, G, 4] and [B, G], where label 0 marks an empty slot."""
    padded = {key: [sample.pop(key) for sample in samples] for key in ("boxes", "labels") if key in samples[0]}
    batch = default_collate(samples)
    return batch | {key: pad_sequence(tensors, batch_first=True) for key, tensors in padded.items()}
