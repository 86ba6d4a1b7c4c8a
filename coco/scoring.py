"""COCO's way to score: detections as COCO results, the twelve metrics of pycocotools or hotcoco, and the mistakes.

The only room that knows their API.
"""

import contextlib
import io
import json
import math
import reprlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray
from torch import Tensor

from .index import CocoAnnotations
from .rules import DataError, as_integer, is_box, is_number

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
# what a diagnosis looks at: less sure detections are many, and nobody would call them mistakes
MIN_DIAGNOSED_SCORE = 0.05
MATCHING_IOU = 0.5


@dataclass(frozen=True)
class Scores:
    """COCO's scores of a set of detections."""

    metrics: dict  # see ``score_detections``
    precision: ndarray  # at IOU_THRESHOLDS x RECALLS, mean over classes; nan where there is no ground truth


@dataclass(frozen=True)
class Diagnosis:
    """Which detections are right, matched as COCO does: within a class, the surest first, from an IoU of 0.5."""

    detections: ndarray  # float64 [N, 7], those of MIN_DIAGNOSED_SCORE or more, as ``detections_to_array`` makes them
    found: ndarray  # int64 [N], the id of the annotation that each one found; 0 for none
    is_false: ndarray  # bool [N], it found none, nor does it lie in a crowd of its class


def detections_to_array(image_id: int, detections: dict[str, Tensor], category_id_of: dict[int, int]) -> ndarray:
    """One image's detections as COCO's array format: float64 [N, 7] of image id, x, y, w, h, score, category id.

    Detections of labels without category (11 of the 90 of a COCO model) are left out; COCO's API would ignore them.
    """
    labels = detections["labels"].tolist()
    kept = [i for i, label in enumerate(labels) if label in category_id_of]
    boxes, scores = (detections[key].cpu().double().numpy()[kept] for key in ("boxes", "scores"))
    category_ids = [category_id_of[labels[i]] for i in kept]
    return np.column_stack(
        [np.full(len(kept), image_id), boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores, category_ids]
    )


def write_results(path: str | Path, detections: ndarray) -> None:
    """Writes an array of detections [N, 7] in COCO's results format."""
    results = [
        {"image_id": int(image_id), "category_id": int(category_id), "bbox": box, "score": score}
        for image_id, *box, score, category_id in detections.tolist()
    ]
    Path(path).write_text(json.dumps(results))


def read_results(path: str | Path, annotations: CocoAnnotations) -> tuple[ndarray, list[str]]:
    """Reads a file in COCO's results format.

    Returns:
        An array of detections [N, 7], as ``detections_to_array`` makes it, and notes of what was odd.

    Raises:
        DataError: the file is missing, not in the format, or has detections that cannot be of ``annotations``.
    """
    try:
        results = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot read the results file: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a COCO results file: {error}") from None
    if type(results) is not list:
        raise DataError(f"{path}: not a COCO results file, which is a list of detections")
    image_ids, category_ids = set(annotations.image_ids.tolist()), {*annotations.categories, *annotations.groups}
    num_mended = 0
    for position, result in enumerate(results):
        num_mended += mend_ids(result)
        if fault := fault_of_result(result, image_ids, category_ids, annotations.path):
            raise DataError(f"{path}: the detection at position {position} of the list {fault}")
    notes = (
        [f"{path}: the ids of {num_mended} detections are texts or floats: taken for integers"] if num_mended else []
    )
    of_classes = [one for one in results if one["category_id"] in annotations.categories]
    if len(of_classes) < len(results):
        notes.append(
            f"{path}: {len(results) - len(of_classes)} detections are of categories that only group others: not scored"
        )
    rows = [[one["image_id"], *one["bbox"], one["score"], one["category_id"]] for one in of_classes]
    return np.array(rows, dtype=np.float64).reshape(-1, 7), notes


def mend_ids(result) -> bool:
    """Puts integers in the place of ids that stand for one; tells whether there were such."""
    is_mended = False
    for key in ("image_id", "category_id"):
        if type(result) is dict and type(result.get(key)) in (str, float):
            written, result[key] = result[key], as_integer(result[key])
            is_mended |= result[key] is not written
    return is_mended


def fault_of_result(result, image_ids: set[int], category_ids: set[int], truth: Path) -> str:
    """What is wrong with an entry of a results file; an empty text if nothing is."""
    if type(result) is not dict:
        return "is no object with image_id, category_id, bbox and score"
    for key in ("image_id", "category_id", "bbox", "score"):
        if key not in result:
            return f"has no {key}"
    image_id, category_id, box, score = (result[key] for key in ("image_id", "category_id", "bbox", "score"))
    if type(image_id) is not int or image_id not in image_ids:
        return f"is of image id {reprlib.repr(image_id)}, which {truth} does not list"
    if type(category_id) is not int or category_id not in category_ids:
        return f"is of category id {reprlib.repr(category_id)}, which {truth} does not list"
    if not is_box(box):
        expected = "x, y, width, height, all finite, no negative size"
        return f"(image id {image_id}) has the bbox {reprlib.repr(box)}; expected {expected}"
    if not is_number(score):
        return f"(image id {image_id}) has the score {reprlib.repr(score)}; expected a finite number"
    return ""


def ground_truth(annotations: CocoAnnotations, chosen: ndarray | slice = slice(None)) -> dict:
    """The annotations, or those ``chosen`` of them, as COCO's API wants them for scoring boxes."""
    image_of_box = np.repeat(annotations.image_ids, np.diff(annotations.offsets))
    columns = (annotations.annotation_ids, image_of_box, annotations.category_ids, annotations.boxes)
    columns = (*columns, annotations.areas, annotations.is_crowd.astype(int))
    columns = [column[chosen].tolist() for column in columns]
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    return {
        "images": [{"id": image_id} for image_id in annotations.image_ids.tolist()],
        "annotations": [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)],
        "categories": [{"id": category_id, "name": name} for category_id, name in annotations.categories.items()],
    }


def score_detections(annotations: CocoAnnotations, detections: ndarray, scorer: str) -> Scores:
    """Scores an array of detections [N, 7] as COCO does.

    Args:
        annotations: the ground truth, crowds and images without boxes included.
        detections: what ``detections_to_array`` made, for all images.
        scorer: ``pycocotools``, which gives the published figure, or ``hotcoco``, which gives the same much faster.

    Returns:
        As ``metrics`` the twelve COCO metrics by name (None where there is no ground truth to measure); ``per_class``
        by category name AP, AP50 and the numbers of boxes (without crowds) and detections; and ``counts`` of images,
        boxes (crowds included) and detections.
    """
    # In training, hotcoco works beside a thread that prints: there, sys.stdout must stay. Nor does hotcoco print.
    with contextlib.redirect_stdout(io.StringIO()) if scorer == "pycocotools" else contextlib.nullcontext():
        evaluator = make_evaluator(annotations, detections, scorer)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize() if scorer == "pycocotools" else evaluator.summary_lines()
    precision = evaluator.eval["precision"][:, :, :, 0, -1]  # IoUs, recalls, categories; all areas, 100 detections
    objects = annotations.category_ids[~annotations.is_crowd]
    per_class = {
        annotations.categories[category_id]: {
            "AP": known_or_none(precision[:, :, k].mean()),
            "AP50": known_or_none(precision[0, :, k].mean()),
            "boxes": int((objects == category_id).sum()),
            "detections": int((detections[:, 6] == category_id).sum()),
        }
        for k, category_id in enumerate(evaluator.params.catIds)
    }
    metrics = {name: known_or_none(value) for name, value in zip(METRICS, evaluator.stats, strict=True)}
    counts = {"images": len(annotations.image_ids), "boxes": len(annotations.boxes), "detections": len(detections)}
    has_objects = (precision > -1).all(axis=(0, 1))
    mean = precision[:, :, has_objects].mean(axis=2) if has_objects.any() else np.full(precision.shape[:2], np.nan)
    return Scores(metrics | {"per_class": per_class, "counts": counts}, mean)


def make_evaluator(
    annotations: CocoAnnotations, detections: ndarray, scorer: str, chosen: ndarray | slice = slice(None)
):
    """COCO's evaluator of either library, with all annotations or those ``chosen``."""
    if scorer == "hotcoco":
        from hotcoco import COCO, COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    truth = ground_truth(annotations, chosen)
    coco = coco_of(COCO, truth)
    results = coco.loadRes(detections) if len(detections) else coco_of(COCO, truth | {"annotations": []})
    return COCOeval(coco, results, "bbox")


def diagnose(annotations: CocoAnnotations, detections: ndarray) -> Diagnosis:
    """Tells right from false among an array of detections [N, 7]."""
    detections = detections[detections[:, 5] >= MIN_DIAGNOSED_SCORE]
    evaluator = make_evaluator(annotations, detections, "hotcoco")
    evaluator.params.maxDets = [1, 10, max(len(detections), 1)]  # all; COCO's metrics end at 100 per image and class
    evaluator.evaluate()
    matches = evaluator.image_diagnostics(iou_thr=MATCHING_IOU)
    numbers = range(1, len(detections) + 1)  # which hotcoco knows the detections by; it leaves out those in crowds
    return Diagnosis(
        detections,
        found=np.array([matches["dt_match"].get(number, 0) for number in numbers], dtype=np.int64),
        is_false=np.array([matches["dt_status"].get(number) == "fp" for number in numbers], dtype=bool),
    )


def confusion_matrix(annotations: CocoAnnotations, diagnosis: Diagnosis, min_score: float) -> ndarray:
    """Counts of true class (rows) by detected class (columns) at an IoU of 0.5: int64 [K + 1, K + 1].

    Classes are in the order of ``annotations.categories``. The diagonal has the right detections. A false one is taken
    for the object that it overlaps most of those that no right one found; the last row has the false ones that are
    left, the last column the objects that are left.
    """
    is_shown = diagnosis.detections[:, 5] >= min_score
    found = diagnosis.found[is_shown & (diagnosis.found > 0)]
    is_found = np.isin(annotations.annotation_ids, found)
    is_left = ~annotations.is_crowd & ~is_found
    false = diagnosis.detections[is_shown & diagnosis.is_false]
    evaluator = make_evaluator(annotations, false, "hotcoco", is_left)
    confused = evaluator.confusion_matrix(iou_thr=MATCHING_IOU, max_det=max(len(false), 1))
    category_ids = list(annotations.categories)
    order = [*(confused["cat_ids"].index(category_id) for category_id in category_ids), -1]
    matrix = confused["matrix"][np.ix_(order, order)].astype(np.int64)
    for k, category_id in enumerate(category_ids):
        matrix[k, k] = (annotations.category_ids[is_found] == category_id).sum()
    return matrix


def format_table(metrics: dict) -> str:
    """The twelve metrics as COCO's own code prints them."""
    lines = []
    for name in METRICS:
        kind, iou, area, max_detections = meaning(name)
        value = "n/a" if metrics[name] is None else f"{metrics[name]:.3f}"
        kind = f"Average {kind.capitalize():10} ({name[:2]})"
        lines.append(f" {kind} @[ IoU={iou:9} | area={area:>6} | maxDets={max_detections:>3} ] = {value}")
    return "\n".join(lines)


def meaning(name: str) -> tuple[str, str, str, str]:
    """Of one of ``METRICS`` what it is the mean of, the IoU, the areas of objects, and how many detections count."""
    kind, detail = {"AP": "precision", "AR": "recall"}[name[:2]], name[2:]
    iou = f"0.{detail}" if detail in ("50", "75") else "0.50:0.95"
    area = {"s": "small", "m": "medium", "l": "large"}.get(detail, "all")
    return kind, iou, area, detail if detail in ("1", "10") else "100"


def best_first(metrics: dict) -> list[tuple[str, dict]]:
    """The classes and what is known of each, by AP; last those that have none."""

    def ap(row: tuple[str, dict]) -> float:
        return -1 if row[1]["AP"] is None else row[1]["AP"]

    return sorted(metrics["per_class"].items(), key=ap, reverse=True)


def format_class_table(metrics: dict, at_most: int = 20) -> str:
    """AP, AP50 and counts of each class, best first; of more than ``at_most`` classes the best and the worst half."""
    rows = best_first(metrics)
    width = max(len(name) for name, _ in rows)
    lines = [f"{'class':{width}}     AP   AP50    boxes  detections"]
    for name, row in rows:
        values = "".join("    n/a" if row[key] is None else f"{row[key]:7.3f}" for key in ("AP", "AP50"))
        lines.append(f"{name:{width}}{values}{row['boxes']:9}{row['detections']:12}")
    if len(rows) > at_most:
        half = at_most // 2
        lines[1 + half : -half] = [f"... {len(rows) - 2 * half} more in metrics.json ..."]
    return "\n".join(lines)


def coco_of(coco_class, content: dict):
    """A COCO object of either library from a dict; ``pycocotools`` takes only a file in its constructor."""
    coco = coco_class()
    coco.dataset = content
    coco.createIndex()
    return coco


def known_or_none(value: float) -> float | None:
    """COCO says -1 where there is nothing to measure; no average should ever include it."""
    return None if value == -1 or math.isnan(value) else float(value)
