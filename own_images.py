"""``evaluate.py --images``: detections on images without annotations, as pictures and as json."""

import json
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.models.detection import SSD300_VGG16_Weights

import coco_utils
import pictures
import reports
from coco_annotations import DataError

SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_PICTURED_SIDE = 1280  # pixels: on larger pictures nobody could read the names
MAX_NAMED = 10


def find_images(path: str | Path) -> list[Path]:
    """The image that ``path`` names, or the JPEG and PNG files of that folder, by name.

    Raises:
        DataError: there are none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such image or folder")
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
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


def load_upright(path: Path) -> ndarray:
    """Decodes an image file to uint8 [H, W, 4] as a viewer shows it, turned as its EXIF data say.

    Raises:
        DataError: it cannot be decoded.
    """
    with coco_utils.open_image(path, str(path)) as image:
        return coco_utils.to_pixels(ImageOps.exif_transpose(image), str(path))


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
        fault = ""
        try:
            image = load_upright(self.paths[index])
        except DataError as error:
            if not self.skip_bad_images:
                raise
            image, fault = np.zeros((1, 1, 4), np.uint8), str(error)
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
        detections: [N, 7] as ``coco_eval.detections_to_array`` makes them, with labels for category ids.
        faults: of images that were skipped.
        names: of the labels.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    results = [
        {"file_name": dataset.paths[int(i)].name, "category": names[label], "bbox": box, "score": score}
        for i, *box, score, label in detections.tolist()
    ]
    (output_dir / "detections.json").write_text(json.dumps(results))
    for fault in faults:
        print(f"Skipped {fault}")
    drawn = {}
    for index, path in enumerate(dataset.paths):
        shown = detections[(detections[:, 0] == index) & (detections[:, 5] >= reports.MIN_SHOWN_SCORE)]
        try:
            drawn[f"{index:04d}_{path.name}"] = draw(load_upright(path), shown, names)
        except DataError:  # one of the faults
            continue
        found = [f"{names[label]} {score:.2f}" for score, label in shown[:MAX_NAMED, 5:].tolist()]
        print(f"{path.name}: {', '.join(found) or 'nothing'}{', ...' if len(shown) > MAX_NAMED else ''}")
    reports.write_pictures(output_dir, drawn)


def draw(image: ndarray, detections: ndarray, names: dict[int, str]) -> torch.Tensor:
    """An image of at most ``MAX_PICTURED_SIDE`` with its detections [N, 7], the surest on top: uint8 [3, H, W]."""
    small = Image.fromarray(image[..., :3])
    small.thumbnail((MAX_PICTURED_SIDE, MAX_PICTURED_SIDE))
    detections = detections[np.argsort(detections[:, 5])]
    boxes = detections[:, 1:5] * (small.width / image.shape[1])
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)
    labels = detections[:, 6].astype(int).tolist()
    texts = [f"{names[label]} {score:.2f}" for label, score in zip(labels, detections[:, 5], strict=True)]
    caption = f"{len(detections)} detections, score >= {reports.MIN_SHOWN_SCORE}"
    return pictures.draw_boxes(np.asarray(small), corners, labels, texts, caption)
