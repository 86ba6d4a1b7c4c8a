"""Which of the annotations SSD is trained on, and how they look to it."""

import numpy as np
from numpy import ndarray

from .index import CocoAnnotations

MIN_BOX_SIDE = 0.01  # pixels; the sides of smaller boxes may round to zero when they are cropped and resized


def clip_boxes(boxes: ndarray, sizes: ndarray) -> ndarray:
    """Boxes [G, 4], xywh, to float32 xyxy within their images; ``sizes`` are height and width, [2] or [G, 2]."""
    limits = sizes[..., ::-1]  # width and height
    start, end = boxes[:, :2].clip(0, limits), (boxes[:, :2] + boxes[:, 2:]).clip(0, limits)
    return np.concatenate((start, end), axis=1).astype(np.float32)


def has_area(boxes: ndarray) -> ndarray:
    """Which boxes [G, 4], xyxy, SSD can learn: bool [G]."""
    return (boxes[:, 2:] - boxes[:, :2] >= MIN_BOX_SIDE).all(axis=1)


def is_object(annotations: CocoAnnotations) -> ndarray:
    """Which boxes are trained on: bool [boxes]."""
    sizes = np.repeat(annotations.sizes, np.diff(annotations.offsets), axis=0)
    return has_area(clip_boxes(annotations.boxes, sizes)) & ~annotations.is_crowd


def objects_of_image(annotations: CocoAnnotations, row: int) -> tuple[ndarray, ndarray]:
    """What SSD is to find in an image: boxes float32 [G, 4], xyxy in its pixels, and labels int64 [G]."""
    span = slice(*annotations.offsets[row : row + 2])
    boxes = clip_boxes(annotations.boxes[span], annotations.sizes[row])
    kept = has_area(boxes) & ~annotations.is_crowd[span]
    labels = [annotations.label_of[category_id] for category_id in annotations.category_ids[span].tolist()]
    return boxes[kept], np.array(labels, dtype=np.int64)[kept]
