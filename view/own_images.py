"""``evaluate.py --images``: detections on images without annotations, as pictures and as json."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.models.detection import SSD300_VGG16_Weights

from coco import SUFFIXES, DataError, is_image_name, load_or_skip, load_upright

from . import pictures

MAX_NAMED = 10


def find_images(path: str | Path, output_dir: Path) -> list[Path]:
    """The image that ``path`` names, or the images of that folder, frame_2 before frame_10; hidden files are none.

    Raises:
        DataError: there are none, or they are where the pictures for ``output_dir`` will be.
    """
    path = Path(path)
    if (output_dir / "pictures").resolve() in (path.resolve(), path.resolve().parent):
        raise DataError(f"{path}: pictures of detections would be written there; choose another --output-dir")
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such image or folder")
    try:
        found = [file for file in path.iterdir() if is_image_name(file.name) and file.is_file()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not found:
        raise DataError(f"{path}: has no image; looked for {', '.join(SUFFIXES)}")
    return sorted(found, key=lambda file: (split_numbers(file.name), file.name))


def split_numbers(name: str) -> list[str | int]:
    """The parts of a name, text and number in turn, to sort by: so that a number counts as such."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def class_names(classes: list[dict] | None, num_classes: int) -> dict[int, str]:
    """The name of each label: from a checkpoint's classes, else COCO's for 91 outputs, else ``class N``."""
    if classes is not None:
        return {one["label"]: one["name"] for one in classes}
    coco_names = SSD300_VGG16_Weights.COCO_V1.meta["categories"]
    if num_classes == len(coco_names):
        return {label: name for label, name in enumerate(coco_names) if name not in ("__background__", "N/A")}
    return {label: f"class {label}" for label in range(1, num_classes)}


class ImageFiles(Dataset):
    """Image files, resized for the model; the id of each is its place among ``paths``.

    Args:
        paths: the files.
        preset: ``(image, boxes) -> sample``.
        skip_bad_images: as of ``coco_utils.CocoEvalDataset``.
    """

    def __init__(self, paths: list[Path], preset, skip_bad_images: bool = False):
        self.paths = paths
        self.preset = preset
        self.skip_bad_images = skip_bad_images
        self.image_ids = np.arange(len(paths))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        image, fault = load_or_skip(partial(load_upright, self.paths[index]), self.skip_bad_images)
        sample = self.preset(image, np.zeros((0, 4), np.float32))
        no_labels = torch.zeros(0, dtype=torch.int64)
        return sample | {
            "labels": no_labels,
            "fault": fault,
            "image_id": index,
            "size": torch.tensor(image.shape[:2]),
        }


def at_least(detections: ndarray, min_score: float) -> ndarray:
    """Those of detections [N, 7] with such a score, surest first."""
    detections = detections[detections[:, 5] >= min_score]
    return detections[np.argsort(-detections[:, 5], kind="stable")]


def describe(path: Path, file: str, fault: str, detections: ndarray, names: dict[int, str]) -> dict:
    """What is known of an image: detections [N, 7] of labels, or why there are none; plain data.

    Args:
        path: the image.
        file: what tells it from another of its name.
        fault: an empty text if there is none.
        detections: surest first.
        names: of the labels.
    """
    found = [{"category": names[label], "bbox": box, "score": score} for _, *box, score, label in detections.tolist()]
    return {"file_name": path.name, "file": file, "fault": fault, "detections": found}


def as_line(described: dict) -> str:
    """For the console: what is on an image, the surest first."""
    if described["fault"]:
        return f"Skipped {described['fault']}"
    texts = [f"{one['category']} {one['score']:.2f}" for one in described["detections"]]
    shown = ", ".join(texts[:MAX_NAMED]) or "nothing"
    return f"{described['file_name']}: {shown}{', ...' if len(texts) > MAX_NAMED else ''}"


def to_png(image: ndarray, detections: ndarray, names: dict[int, str], min_score: float) -> bytes:
    """The file of ``draw``; compressed little, since that takes longer than to detect."""
    picture = draw(image, detections, names, min_score)
    return pictures.encode(pictures.to_image(picture), format="PNG", compress_level=1)


def draw(image: ndarray, detections: ndarray, names: dict[int, str], min_score: float) -> Tensor:
    """An image with its detections [N, 7], surest first, all of ``min_score`` or more: uint8 [3, H, W]."""
    image, scale = pictures.fit_for_viewing(image)
    boxes = detections[::-1, 1:5] * scale  # the surest is drawn last
    labels = detections[::-1, 6].astype(int).tolist()
    texts = [f"{names[label]} {score:.2f}" for label, score in zip(labels, detections[::-1, 5], strict=True)]
    caption = f"{len(detections)} detections, score >= {min_score:g}"
    return pictures.draw_boxes(image, pictures.to_corners(boxes), labels, texts, caption)
