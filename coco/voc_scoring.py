"""Pascal VOC's way to score: AP at an IoU of 0.5, over 11 points of recall (to 2009) and over all of them (from 2010).

As its development kit has it (https://host.robots.ox.ac.uk/pascal/VOC/voc2012/devkit_doc.pdf, VOCevaldet.m). Objects
that are marked as difficult, crowds here, need not be found, and a detection of one is neither right nor wrong.
"""

import numpy as np
from numpy import ndarray

from .index import CocoAnnotations

MIN_IOU = 0.5
RIGHT, WRONG, NEITHER = 1, 0, -1


def score_detections(annotations: CocoAnnotations, detections: ndarray) -> dict:
    """Scores an array of detections [N, 7], as ``scoring.detections_to_array`` makes them.

    Returns:
        ``AP11`` and ``AP``, over 11 and over all points: means over the classes that have objects (None if none has);
        and ``per_class`` the same by category name, None for a class without objects.
    """
    per_class = {}
    for category_id, name in annotations.categories.items():
        chosen = detections[detections[:, 6] == category_id]
        chosen = chosen[np.argsort(-chosen[:, 5], kind="stable")]
        num_objects = int((~annotations.is_crowd[annotations.category_ids == category_id]).sum())
        ap11, ap = average_precisions(judge(annotations, chosen, category_id), num_objects)
        per_class[name] = {"AP11": ap11, "AP": ap}
    known = {key: [one[key] for one in per_class.values() if one[key] is not None] for key in ("AP11", "AP")}
    means = {key: float(np.mean(values)) if values else None for key, values in known.items()}
    return means | {"per_class": per_class}


def judge(annotations: CocoAnnotations, detections: ndarray, category_id: int) -> ndarray:
    """Which detections [N, 7] of a class, the surest first, are ``RIGHT``, ``WRONG`` or ``NEITHER``: int64 [N].

    Each belongs to the object that it overlaps most, of which the first is right and all others are wrong.
    """
    verdicts = np.full(len(detections), WRONG)
    row_of = {image_id: row for row, image_id in enumerate(annotations.image_ids.tolist())}
    order = np.argsort(detections[:, 0], kind="stable")
    image_ids, starts = np.unique(detections[order, 0], return_index=True)
    for image_id, members in zip(image_ids, np.split(order, starts[1:]), strict=False):
        start, end = annotations.offsets[row_of[int(image_id)] :][:2]
        objects = start + np.flatnonzero(annotations.category_ids[start:end] == category_id)
        if len(objects) == 0:
            continue
        ious = pairwise_iou(detections[members, 1:5], annotations.boxes[objects])
        nearest = objects[ious.argmax(axis=1)]
        overlaps = ious.max(axis=1) >= MIN_IOU
        is_difficult = annotations.is_crowd[nearest]
        verdicts[members[overlaps & is_difficult]] = NEITHER
        candidates = np.flatnonzero(overlaps & ~is_difficult)
        _, first = np.unique(nearest[candidates], return_index=True)
        verdicts[members[candidates[first]]] = RIGHT
    return verdicts


def average_precisions(verdicts: ndarray, num_objects: int) -> tuple[float, float] | tuple[None, None]:
    """AP over 11 points and over all, from verdicts [N] on detections, the surest first; None without objects."""
    if num_objects == 0:
        return None, None
    counted = verdicts[verdicts != NEITHER]
    right = (counted == RIGHT).cumsum()
    recall = right / num_objects
    precision = right / np.arange(1, 1 + len(counted))
    best_from = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or a higher one
    # in whole numbers, because 3 / 10 is less than 3 * 0.1
    eleven = [best_from[10 * right >= tenth * num_objects].max(initial=0) for tenth in range(11)]
    steps = np.diff(recall, prepend=0)
    return float(np.mean(eleven)), float((steps * best_from).sum())


def pairwise_iou(boxes: ndarray, others: ndarray) -> ndarray:
    """IoU of boxes [N, 4] and [M, 4], xywh: float64 [N, M]."""
    start = np.maximum(boxes[:, None, :2], others[:, :2])
    end = np.minimum(boxes[:, None, :2] + boxes[:, None, 2:], others[:, :2] + others[:, 2:])
    shared = (end - start).clip(0).prod(axis=2)
    total = boxes[:, None, 2:].prod(axis=2) + others[:, 2:].prod(axis=1) - shared
    return np.divide(shared, total, out=np.zeros_like(shared), where=total > 0)


def format_lines(scores: dict) -> str:
    """Both means, in the form of COCO's table."""
    texts = {key: "n/a" if scores[key] is None else f"{scores[key]:.3f}" for key in ("AP11", "AP")}
    return "\n".join(
        f" {'Pascal VOC         (AP)':23} @[ IoU=0.50      | {points:>25} ] = {texts[key]}"
        for key, points in (("AP11", "11 points of recall"), ("AP", "all points of recall"))
    )
