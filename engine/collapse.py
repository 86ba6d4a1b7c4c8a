"""Whether a model has collapsed: whether layers of it predict the same of every image."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

WATCHED_IMAGES = 16
LEAST_DIFFERENCE = 5.0  # levels of 255: below it images are too much alike to judge by
LEAST_DEPENDENCE = 0.02
MAX_NAMES = 10


class Watched:
    """Up to ``WATCHED_IMAGES``, at even distances among ``num_images``, and what a model predicts of them."""

    def __init__(self, num_images: int):
        self.stride = max(1, math.ceil(num_images / WATCHED_IMAGES))
        self.num_seen = 0
        self.images: list[Tensor] = []
        self.logits: list[Tensor] = []

    def add(self, images: Tensor, logits: Tensor, faults: Sequence[str]) -> None:
        """Takes of a batch what is to be watched, but no image that could not be read."""
        numbers = range(self.num_seen, self.num_seen + len(faults))
        rows = [
            row
            for row, (number, fault) in enumerate(zip(numbers, faults, strict=True))
            if number % self.stride == 0 and not fault
        ]
        self.num_seen += len(faults)
        if rows:
            self.images.append(images[rows].float())
            self.logits.append(logits[rows].float())

    def dependence(self, boxes_per_map: list[int]) -> list[float] | None:
        """``image_dependence``; None too where the images are alike."""
        if not self.images or torch.cat(self.images).std(dim=0, correction=0).mean() < LEAST_DIFFERENCE:
            return None
        return image_dependence(torch.cat(self.logits), boxes_per_map)


def image_dependence(logits: Tensor, boxes_per_map: list[int]) -> list[float] | None:
    """How much the predictions from each feature map depend on the image: from 0, not at all, to about 1.

    It is the deviation over the images of a default box's logits, the largest of a map, as a fraction of the map's
    logits' root mean square: new layers predict little, but not the same of every image. All are less their mean over
    the classes, which changes no score.

    Args:
        logits: [B, A, C].
        boxes_per_map: default boxes of each feature map.

    Returns:
        A number for each map; None of fewer than two images.
    """
    if len(logits) < 2:
        return None
    logits = logits - logits.mean(dim=-1, keepdim=True)
    smallest = torch.finfo(logits.dtype).tiny
    return [
        (part.var(dim=0).mean(dim=-1).max() / part.square().mean().clamp(min=smallest)).sqrt().item()
        for part in logits.split(boxes_per_map, dim=1)
    ]


def describe(dependence: list[float] | None, per_class: dict[str, dict]) -> Iterator[str]:
    """A line if at least half of the model has collapsed, and one if it never detects some of the classes.

    Args:
        dependence: of ``image_dependence``, if known.
        per_class: by name, ``boxes`` and ``detections``.
    """
    collapsed = sum(one < LEAST_DEPENDENCE for one in dependence or ())
    if dependence and 2 * collapsed >= len(dependence):
        yield (
            f"Collapsed: what {collapsed} of {len(dependence)} feature maps predict is the same for every image. "
            "Begin anew with --recipe small, or with a lower --lr (docs/troubleshooting.md)"
        )
    missing = [f"{name} ({row['boxes']})" for name, row in per_class.items() if row["boxes"] and not row["detections"]]
    if missing:
        names = ", ".join(missing[:MAX_NAMES]) + (", ..." if len(missing) > MAX_NAMES else "")
        yield f"Never detected: {len(missing)} of {len(per_class)} classes, here with their boxes: {names}"
