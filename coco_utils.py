"""Data in COCO's format: annotation files, images, data sets, and the order of an epoch.

COCO's boxes are xywh, all others xyxy, in pixels of the original image.
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler, default_collate

MAX_COCO_CATEGORY_ID = 90
MIN_BOX_SIDE = 0.01  # pixels; the sides of smaller boxes may round to zero when they are cropped and resized


class DataError(ValueError):
    """A fault in the user's data, in one line that names the file, image or annotation and the remedy.

    A loader worker's exception is raised again in the main process with a traceback for message; only the line counts.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition("DataError: ")[2].strip())


@dataclass(frozen=True)
class CocoAnnotations:
    """A COCO annotation file as flat arrays; image ``i`` has the boxes ``offsets[i]`` to ``offsets[i + 1]``."""

    path: Path
    image_ids: ndarray  # int64 [images]
    file_names: list[str]
    sizes: ndarray  # int64 [images, 2], height and width
    offsets: ndarray  # int64 [images + 1]
    boxes: ndarray  # float64 [boxes, 4], xywh as in the file
    areas: ndarray  # float64 [boxes]
    category_ids: ndarray  # int64 [boxes]
    is_crowd: ndarray  # bool [boxes]
    annotation_ids: ndarray  # int64 [boxes]
    categories: dict[int, str]  # category id -> name

    @cached_property
    def label_of(self) -> dict[int, int]:
        """Category id -> class label of the model.

        The id itself where all lie in 1 to 90, so that a model of COCO has torchvision's 91 outputs; else 1, 2, ...
        """
        if all(1 <= category_id <= MAX_COCO_CATEGORY_ID for category_id in self.categories):
            return {category_id: category_id for category_id in self.categories}
        return {category_id: label for label, category_id in enumerate(sorted(self.categories), start=1)}

    @property
    def num_classes(self) -> int:
        """Outputs that a model of these classes needs, background included."""
        return max(self.label_of.values()) + 1

    @property
    def classes(self) -> list[dict]:
        """Label, category id and name of each class, in order of the labels: what a checkpoint keeps."""
        return [{"label": self.label_of[i], "id": i, "name": self.categories[i]} for i in sorted(self.categories)]


def read_annotations(path: str | Path) -> CocoAnnotations:
    """Reads and checks an annotation file. Masks are neither needed nor read.

    Raises:
        DataError: the file is missing or not in COCO's format, or its content contradicts itself.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
        return parse_annotations(path, content["images"], content["annotations"], content["categories"])
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot read the annotation file: {error.strerror}") from None
    except KeyError as error:
        raise DataError(f"{path}: not a COCO annotation file: {error} is missing somewhere") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a COCO annotation file: {error}") from None


def parse_annotations(
    path: Path, images: list[dict], annotations: list[dict], categories: list[dict]
) -> CocoAnnotations:
    """Turns the three lists of an annotation file into arrays, sorted by image."""
    row_of = {int(image["id"]): row for row, image in enumerate(images)}
    names = {int(category["id"]): str(category["name"]) for category in categories}
    if not row_of or not names:
        raise DataError(f"{path}: lists no images or no categories")
    if len(row_of) != len(images):
        raise DataError(f"{path}: several images have the same id; give each its own")
    ids, image_ids, category_ids = (
        np.array([a[key] for a in annotations], dtype=np.int64) for key in ("id", "image_id", "category_id")
    )
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(len(annotations), 4)
    areas = np.array([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in annotations], dtype=np.float64)

    refuse(path, ids, ~np.isin(image_ids, list(row_of)), "belongs to an image that the file does not list")
    refuse(path, ids, ~np.isin(category_ids, list(names)), "has a category_id that is not in categories")
    refuse(path, ids, ~np.isfinite(boxes).all(axis=1), "has a box that is not finite")
    refuse(path, ids, (boxes[:, 2:] < 0).any(axis=1), "has a box of negative size; COCO boxes are x, y, width, height")
    repeated = np.ones(len(ids), dtype=bool)
    repeated[np.unique(ids, return_index=True)[1]] = False
    refuse(path, ids, repeated, "has an id that an earlier annotation has; pycocotools would score it wrongly")
    refuse(path, ids, ids == 0, "has id 0, which pycocotools takes for no match; start at 1")

    rows = np.array([row_of[image_id] for image_id in image_ids.tolist()], dtype=np.int64)
    order = np.argsort(rows, kind="stable")
    return CocoAnnotations(
        path=path,
        image_ids=np.array(list(row_of), dtype=np.int64),
        file_names=[str(image["file_name"]) for image in images],
        sizes=np.array([(image["height"], image["width"]) for image in images], dtype=np.int64),
        offsets=np.concatenate(([0], np.bincount(rows, minlength=len(images)).cumsum())),
        boxes=boxes[order],
        areas=areas[order],
        category_ids=category_ids[order],
        is_crowd=np.array([a.get("iscrowd", 0) for a in annotations], dtype=bool)[order],
        annotation_ids=ids[order],
        categories=names,
    )


def check_same_classes(classes: list[dict], owner: str | Path, annotations: CocoAnnotations) -> None:
    """Raises DataError unless ``classes``, which belong to the file ``owner``, are those of the annotations."""
    for one in [*classes, *annotations.classes]:
        if (one in classes) != (one in annotations.classes):
            holder = owner if one in classes else annotations.path
            raise DataError(
                f"{owner} and {annotations.path} have different classes: "
                f"only {holder} has {one['name']!r} as category {one['id']}"
            )


def refuse(path: Path, annotation_ids: ndarray, is_bad: ndarray, fault: str) -> None:
    """Raises a DataError that names the first bad annotation, if there is one."""
    if is_bad.any():
        others = f" (and {is_bad.sum() - 1} more)" if is_bad.sum() > 1 else ""
        raise DataError(f"{path}: annotation {annotation_ids[is_bad][0]}{others} {fault}")


def load_image(annotations: CocoAnnotations, images_dir: Path, row: int) -> ndarray:
    """Decodes an image to uint8 [H, W, 4]: RGB and a byte without meaning; pixels of four bytes are gathered fastest.

    EXIF rotation is ignored, since COCO's boxes are not rotated.

    Raises:
        DataError: the file is missing, damaged, outside ``images_dir``, or of another size than the annotations say.
    """
    where = f"{images_dir / annotations.file_names[row]} (image id {annotations.image_ids[row]})"
    path = images_dir / annotations.file_names[row]
    if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(images_dir)):
        raise DataError(f"{where}: lies outside the image folder; correct file_name in {annotations.path}")
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
        size = annotations.sizes[:, ::-1][image_of_box]  # width and height
        corners = annotations.boxes[:, :2], annotations.boxes[:, :2] + annotations.boxes[:, 2:]
        boxes = np.concatenate([corner.clip(0, size) for corner in corners], axis=1).astype(np.float32)
        self.boxes = boxes
        self.labels = np.array([annotations.label_of[c] for c in annotations.category_ids.tolist()], dtype=np.int64)
        self.is_object = ~annotations.is_crowd & (boxes[:, 2:] - boxes[:, :2] >= MIN_BOX_SIDE).all(axis=1)
        self.rows = np.flatnonzero(np.bincount(image_of_box, weights=self.is_object, minlength=num_images))
        if len(self.rows) == 0:
            raise DataError(f"{annotations.path}: no image has a box to train on")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_boxes(self) -> int:
        return int(self.is_object.sum())

    def objects(self, row: int) -> tuple[ndarray, ndarray]:
        """What to find in an image: boxes float32 [G, 4], xyxy in its pixels, and labels int64 [G]."""
        boxes = np.arange(*self.annotations.offsets[row : row + 2])
        boxes = boxes[self.is_object[boxes]]
        return self.boxes[boxes], self.labels[boxes]

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
