"""``evaluate.py --images``: detections on images without annotations, as pictures and as json."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.models.detection import SSD300_VGG16_Weights

from coco import SUFFIXES, DataError, is_image_name, load_or_skip, load_upright

from . import pictures, reports

MAX_NAMED = 10


def find_images(path: str | Path, output_dir: Path) -> list[Path]:
    """The image that ``path`` names, or the images of that folder, by name; hidden files are none.

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
        found = sorted(file for file in path.iterdir() if is_image_name(file.name) and file.is_file())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not found:
        raise DataError(f"{path}: has no image; looked for {', '.join(SUFFIXES)}")
    return found


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


def report(
    output_dir: Path, dataset: ImageFiles, detections: ndarray, faults: list[str], names: dict[int, str]
) -> None:
    """Writes detections.json and a picture of each image, and prints a line for each.

    Args:
        output_dir: where to.
        dataset: the images.
        detections: [N, 7], image by image, as ``scoring.detections_to_array`` makes them, of labels not categories.
        faults: of images that were skipped.
        names: of the labels.
    """
    results = [
        {"file_name": dataset.paths[int(i)].name, "category": names[label], "bbox": box, "score": score}
        for i, *box, score, label in detections.tolist()
    ]
    (output_dir / "detections.json").write_text(json.dumps(results))
    for fault in faults:
        print(f"Skipped {fault}")
    reports.write_pictures(output_dir, draw_images(dataset, detections, names))


def draw_images(dataset: ImageFiles, detections: ndarray, names: dict[int, str]) -> Iterator[tuple[str, Tensor]]:
    """A name and a picture of each image, and a printed line of what is on it."""
    bounds = np.searchsorted(detections[:, 0], np.arange(len(dataset) + 1))
    for index, path in enumerate(dataset.paths):
        found = detections[bounds[index] : bounds[index + 1]]
        found = found[found[:, 5] >= reports.MIN_SHOWN_SCORE]
        found = found[np.argsort(-found[:, 5], kind="stable")]
        try:
            picture = draw(load_upright(path)[..., :3], found, names)
        except DataError:  # one of the faults
            continue
        texts = [f"{names[label]} {score:.2f}" for score, label in found[:MAX_NAMED, 5:].tolist()]
        print(f"{path.name}: {', '.join(texts) or 'nothing'}{', ...' if len(found) > MAX_NAMED else ''}")
        yield f"{index:04d}_{path.name}", picture


def draw(image: ndarray, detections: ndarray, names: dict[int, str]) -> Tensor:
    """An image with its detections [N, 7], surest first: uint8 [3, H, W]."""
    image, scale = pictures.fit_for_viewing(image)
    boxes = detections[::-1, 1:5] * scale  # the surest is drawn last
    labels = detections[::-1, 6].astype(int).tolist()
    texts = [f"{names[label]} {score:.2f}" for label, score in zip(labels, detections[::-1, 5], strict=True)]
    caption = f"{len(detections)} detections, score >= {reports.MIN_SHOWN_SCORE}"
    return pictures.draw_boxes(image, pictures.to_corners(boxes), labels, texts, caption)
