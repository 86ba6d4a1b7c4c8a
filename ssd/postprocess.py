"""From predictions to detections, for a whole batch at once: threshold, best per class, suppression, best per image.

Dimension key: B images, A default boxes, C classes including the background, K = C - 1, N detections.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import nms

from .boxes import BoxCoder

# Suppression takes the square of its input, and the best 200 detections are mostly found among far fewer candidates.
FIRST_CANDIDATES = 1000
# Where they are not, as in a model that has collapsed, it goes in parts. At batch 24 all candidates of 90 classes would
# be more than its kernel for GPUs can count.
MAX_BOXES_AT_A_TIME = 16_000


class NotFiniteError(FloatingPointError):
    """Predictions that are no numbers, for the images of a batch at ``rows``."""

    def __init__(self, rows: list[int]):
        super().__init__(f"the predictions for the images {rows} of the batch are not finite: the weights are broken")
        self.rows = rows


@dataclass
class Detections:
    """Of a whole batch, best first: boxes float [N, 4]; scores float [N]; labels (0 to K - 1) and images int64 [N]."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    images: Tensor

    def __getitem__(self, index: Tensor) -> "Detections":
        return Detections(self.boxes[index], self.scores[index], self.labels[index], self.images[index])


@torch.no_grad()
def find_detections(
    outputs: dict[str, Tensor],
    default_boxes: Tensor,
    size: int,
    *,
    score_thresh: float,
    nms_thresh: float,
    detections_per_img: int,
    topk_candidates: int,
) -> list[dict[str, Tensor]]:
    """Scores, decodes and suppresses.

    Args:
        outputs: ``cls_logits`` [B, A, C] and ``bbox_regression`` [B, A, 4], as ``SSD.forward`` returns them.
        default_boxes: [A, 4].
        size: side of the network input in pixels.
        score_thresh, nms_thresh, detections_per_img, topk_candidates: as of ``SSD``.

    Returns:
        Per image ``boxes`` [N, 4] (xyxy, pixels of the network input), ``scores`` [N] and ``labels`` [N] (1 to K), best
        first, N <= ``detections_per_img``.

    Raises:
        NotFiniteError: a prediction is nan or infinite.
    """
    check_finite(outputs)
    boxes = BoxCoder().decode(outputs["bbox_regression"].float(), default_boxes).clamp(0, size)
    # As in ``SSD.match``: one image at a time stays in the cache of a CPU. A GPU gets as many as it can use, and not so
    # many that its memory could not hold all scores of an untrained model, most of which are candidates.
    images_at_a_time = 1 if boxes.device.type == "cpu" else 16
    found = []
    parts = zip(outputs["cls_logits"].split(images_at_a_time), boxes.split(images_at_a_time), strict=True)
    for logits, part_boxes in parts:
        scores = logits.float().softmax(dim=-1)[..., 1:]  # [images, A, K]
        candidates = select_candidates(scores, part_boxes, score_thresh, topk_candidates)
        kept = suppress(candidates, nms_thresh, detections_per_img)
        found += split_by_image(kept, len(part_boxes))
    return [{"boxes": one.boxes, "scores": one.scores, "labels": one.labels + 1} for one in found]


def check_finite(outputs: dict[str, Tensor]) -> None:
    """Raises NotFiniteError for predictions, the images first, that are nan or infinite."""
    # far faster than to look at each number: a nan is both extremes
    extremes = [
        extreme(output.flatten(1), dim=1) for output in outputs.values() for extreme in (torch.amin, torch.amax)
    ]
    is_finite = torch.stack(extremes).isfinite().all(dim=0)
    if not is_finite.all():
        raise NotFiniteError((~is_finite).nonzero().flatten().tolist())


def resize_boxes(found: list[dict[str, Tensor]], size: int, sizes: Tensor) -> list[dict[str, Tensor]]:
    """Detections with boxes in pixels of the original images, whose heights and widths are ``sizes`` [B, 2]."""
    height, width = (sizes.double() / size).unbind(1)
    scale = torch.stack((width, height, width, height), dim=1)  # [B, 4]
    return [one | {"boxes": one["boxes"] * scale[i].to(one["boxes"])} for i, one in enumerate(found)]


def rank_within(groups: Tensor) -> Tensor:
    """How many earlier elements are of the same group as an element: int64 [N], for ``groups`` int64 [N]."""
    order = groups.argsort(stable=True)
    in_order = groups[order]
    position = torch.arange(len(groups), device=groups.device)
    is_first = torch.ones_like(in_order, dtype=torch.bool)
    is_first[1:] = in_order[1:] != in_order[:-1]
    rank_in_order = position - torch.where(is_first, position, 0).cummax(0).values
    return torch.empty_like(groups).scatter_(0, order, rank_in_order)


def split_by_image(detections: Detections, num_images: int) -> list[Detections]:
    """Those of each image of the batch."""
    counts = detections.images.bincount(minlength=num_images).tolist()
    return [detections[part] for part in detections.images.argsort(stable=True).split(counts)]


def select_candidates(scores: Tensor, boxes: Tensor, score_thresh: float, topk_per_class: int) -> Detections:
    """The best of each class and image, if their score is over the threshold.

    Args:
        scores: [B, A, K].
        boxes: [B, A, 4].
        score_thresh: scores up to this are dropped.
        topk_per_class: how many are kept of a class and image.
    """
    is_candidate = scores > score_thresh
    images, default_boxes, labels = is_candidate.nonzero(as_tuple=True)
    if len(images) > scores.shape[0] * scores.shape[2] * topk_per_class:
        # as in a model without training: to find the best of a class is less work than to sort all
        best = scores.topk(topk_per_class, dim=1).values
        is_candidate &= scores >= best[:, -1:]
        images, default_boxes, labels = is_candidate.nonzero(as_tuple=True)
    order = labels.argsort(stable=True)  # of equal scores the lower label comes first, as in torchvision
    order = order[scores[images, default_boxes, labels][order].argsort(descending=True, stable=True)]
    images, default_boxes, labels = images[order], default_boxes[order], labels[order]
    candidates = Detections(boxes[images, default_boxes], scores[images, default_boxes, labels], labels, images)
    return candidates[rank_within(images * scores.shape[2] + labels) < topk_per_class]


def suppress(candidates: Detections, iou_thresh: float, detections_per_img: int) -> Detections:
    """The best detections of each image that no better one of the same class and image overlaps too much.

    Boxes, whose coordinates must not be negative, are moved to where those of other classes and images cannot overlap
    them, in float64, so that the IoUs stay exact. Suppression goes from the best down, so what it finds among the best
    candidates of an image is final; only where that is not enough it is repeated with more of them.
    """
    if len(candidates.images) == 0:
        return candidates
    num_candidates = candidates.images.bincount()
    rank_in_image = rank_within(candidates.images)
    group = candidates.images * (candidates.labels.max() + 1) + candidates.labels
    shifted = candidates.boxes.double() + ((candidates.boxes.max().double() + 1) * group)[:, None]
    scores = candidates.scores.double()
    is_kept = torch.zeros_like(group, dtype=torch.bool)
    needs_more = torch.ones_like(num_candidates, dtype=torch.bool)
    limit = FIRST_CANDIDATES
    while needs_more.any():
        tried = (needs_more[candidates.images] & (rank_in_image < limit)).nonzero().squeeze(1)
        for part in split_between_groups(group[tried], MAX_BOXES_AT_A_TIME):
            part = tried[part]
            is_kept[part[nms(shifted[part], scores[part], iou_thresh)]] = True
        num_kept = candidates.images[is_kept].bincount(minlength=len(num_candidates))
        needs_more &= (num_kept < detections_per_img) & (num_candidates > limit)
        limit *= 4
    kept = is_kept.nonzero().squeeze(1)
    return candidates[kept[rank_within(candidates.images[kept]) < detections_per_img]]


def split_between_groups(groups: Tensor, max_size: int) -> Iterator[Tensor]:
    """Indices of all elements, in parts of whole groups; larger than ``max_size`` is only a part of one group."""
    if len(groups) <= max_size:
        yield torch.arange(len(groups), device=groups.device)
        return
    part_sizes = [0]
    for size in groups.unique(return_counts=True)[1].tolist():
        if part_sizes[-1] > 0 and part_sizes[-1] + size > max_size:
            part_sizes.append(0)
        part_sizes[-1] += size
    yield from groups.argsort(stable=True).split(part_sizes)
