"""What a person looks at: inputs of training, and after an evaluation images, chosen by their mistakes, and charts."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray
from torch import Tensor

from coco import CocoAnnotations, DataError, load_image, scoring
from coco_utils import collate, split_objects

from . import charts, pictures

ORDERS = ("first", "worst", "random")
MIN_SHOWN_SCORE = 0.3
NUM_INPUTS = 8
NUM_WORST = 12
CURVE_THRESHOLDS = 101
# of a learning curve: kind and key of a line of metrics.jsonl, and what it is called
CURVES = (("train", "loss", "loss"), ("val", "loss", "validation loss"), ("val", "AP", "AP"), ("val", "AP50", "AP50"))


@dataclass(frozen=True)
class Example:
    """An image that was evaluated, and by class names the mistakes on it at ``MIN_SHOWN_SCORE``."""

    name: str  # of its file
    missed: Counter[str]
    false: Counter[str]
    pictures: tuple[Tensor, Tensor] | None  # ground truth and detections, uint8 [3, H, W]
    fault: str = ""  # why there are none


def choose_images(annotations: CocoAnnotations, diagnosis: scoring.Diagnosis, number: int, by: str) -> list[int]:
    """Rows of ``number`` images: the ``first``, the ``worst`` (most mistakes), or always the same ``random`` ones."""
    num_images = len(annotations.image_ids)
    if by == "worst":
        order = np.argsort(-sum(count_mistakes(annotations, diagnosis)), kind="stable")
    else:
        order = np.random.default_rng(0).permutation(num_images) if by == "random" else np.arange(num_images)
    return order[:number].tolist()


def which_are_missed(
    annotations: CocoAnnotations, diagnosis: scoring.Diagnosis, chosen: slice = slice(None)
) -> ndarray:
    """Of all objects, or those ``chosen``, which no detection of ``MIN_SHOWN_SCORE`` has found, but no crowds: bool."""
    found = diagnosis.found[diagnosis.detections[:, 5] >= MIN_SHOWN_SCORE]
    return ~annotations.is_crowd[chosen] & ~np.isin(annotations.annotation_ids[chosen], found)


def count_mistakes(annotations: CocoAnnotations, diagnosis: scoring.Diagnosis) -> tuple[ndarray, ndarray]:
    """How many objects were missed and how many detections are false, at ``MIN_SHOWN_SCORE``: int64 [images] each."""
    missed_until = np.concatenate(([0], which_are_missed(annotations, diagnosis).cumsum()))[annotations.offsets]
    is_shown = diagnosis.detections[:, 5] >= MIN_SHOWN_SCORE
    false_in = diagnosis.detections[is_shown & diagnosis.is_false, 0]
    order = np.argsort(annotations.image_ids)
    false = np.bincount(
        order[np.searchsorted(annotations.image_ids, false_in, sorter=order)], minlength=len(annotations.image_ids)
    )
    return np.diff(missed_until), false


def draw_worst(
    annotations: CocoAnnotations, images_dir: Path | None, diagnosis: scoring.Diagnosis
) -> dict[int, Example]:
    """By row the ``NUM_WORST`` images with most mistakes, the worst first; fewer where fewer have any."""
    num_mistakes = sum(count_mistakes(annotations, diagnosis))
    rows = [row for row in choose_images(annotations, diagnosis, NUM_WORST, "worst") if num_mistakes[row]]
    return {row: draw_example(annotations, images_dir, diagnosis, row) for row in rows}


def draw_images(
    annotations: CocoAnnotations,
    images_dir: Path,
    diagnosis: scoring.Diagnosis,
    rows: Iterable[int],
    drawn: Mapping[int, Example],
) -> Iterator[tuple[str, Tensor]]:
    """Images with ground truth (left) and detections over ``MIN_SHOWN_SCORE`` (right): a name and uint8 [3, H, W].

    What is ``drawn`` already, by row, is not drawn again. Images that cannot be read are left out.
    """
    for number, row in enumerate(rows):
        example = drawn.get(row) or draw_example(annotations, images_dir, diagnosis, row)
        if example.pictures is not None:
            yield f"{number:04d}_{Path(example.name).stem}", pictures.side_by_side(*example.pictures)


def draw_example(
    annotations: CocoAnnotations, images_dir: Path | None, diagnosis: scoring.Diagnosis, row: int
) -> Example:
    span = slice(*annotations.offsets[row : row + 2])
    is_missed = which_are_missed(annotations, diagnosis, span)
    detections = diagnosis.detections
    shown = np.flatnonzero((detections[:, 0] == annotations.image_ids[row]) & (detections[:, 5] >= MIN_SHOWN_SCORE))
    missed = count_by_class(annotations, annotations.category_ids[span][is_missed])
    false = count_by_class(annotations, detections[shown[diagnosis.is_false[shown]], 6])
    caption = f"detections, score >= {MIN_SHOWN_SCORE}: {missed.total()} missed, {false.total()} false"
    drawn, fault = None, "its folder is not known"
    if images_dir is not None:
        try:
            image, scale = pictures.fit_for_viewing(load_image(annotations, images_dir, row)[..., :3])
        except DataError as error:
            fault = str(error)
        else:
            objects = draw_objects(annotations, span, is_missed, image, scale)
            drawn, fault = (objects, draw_detections(annotations, diagnosis, shown, image, scale, caption)), ""
    return Example(annotations.file_name(row), missed, false, drawn, fault)


def count_by_class(annotations: CocoAnnotations, category_ids: ndarray) -> Counter[str]:
    return Counter(annotations.categories[i] for i in category_ids.tolist())


def draw_objects(annotations: CocoAnnotations, span: slice, is_missed: ndarray, image: ndarray, scale: float) -> Tensor:
    """The ground truth of an image, the objects of ``span``; those that no detection found are marked."""
    notes = [
        " (crowd)" if is_crowd else " (missed)" if was_missed else ""
        for is_crowd, was_missed in zip(annotations.is_crowd[span], is_missed, strict=True)
    ]
    boxes = annotations.boxes[span] * scale
    return draw(annotations, image, boxes, annotations.category_ids[span], notes, "ground truth")


def draw_detections(
    annotations: CocoAnnotations,
    diagnosis: scoring.Diagnosis,
    shown: ndarray,
    image: ndarray,
    scale: float,
    caption: str,
) -> Tensor:
    """The detections of the rows ``shown`` in their image, the surest on top; the false ones are marked."""
    detections = diagnosis.detections
    shown = shown[np.argsort(detections[shown, 5])]
    notes = [f" {detections[i, 5]:.2f}" + (" (false)" if diagnosis.is_false[i] else "") for i in shown]
    return draw(annotations, image, detections[shown, 1:5] * scale, detections[shown, 6], notes, caption)


def draw(annotations: CocoAnnotations, image: ndarray, boxes, category_ids, notes: list[str], caption: str) -> Tensor:
    """An image with boxes [N, 4], xywh, each with the name of its class and a note."""
    texts = [annotations.categories[i] + note for i, note in zip(category_ids, notes, strict=True)]
    labels = [annotations.label_of[i] for i in category_ids]
    return pictures.draw_boxes(image, pictures.to_corners(boxes), labels, texts, caption)


def draw_inputs(samples: list[dict], preset, annotations: CocoAnnotations) -> Tensor:
    """Training images, augmented as the network sees them, with their objects: uint8 [3, H, W].

    Args:
        samples: of the training set.
        preset: whose ``on_device`` finishes a batch of them.
        annotations: what names the classes.
    """
    names = {one["label"]: one["name"] for one in annotations.classes}
    batch = collate(samples)
    pixels = preset.on_device(batch).round().byte().permute(0, 2, 3, 1).numpy()
    drawn = []
    for image, boxes, labels in zip(pixels, *split_objects(batch["objects"]), strict=True):
        is_object = labels > 0
        labels = labels[is_object].tolist()
        texts = [names[label] for label in labels]
        drawn.append(pictures.draw_boxes(image, boxes[is_object].numpy(), labels, texts, "input"))
    return pictures.grid(drawn, columns=4)


def draw_charts(
    annotations: CocoAnnotations, scores: scoring.Scores, diagnosis: scoring.Diagnosis
) -> dict[str, Tensor]:
    """The charts of an evaluation by name: uint8 [3, H, W]."""
    confusion = scoring.confusion_matrix(annotations, diagnosis, MIN_SHOWN_SCORE)
    return {
        "precision_recall": charts.precision_recall(scores.precision, scoring.RECALLS, scoring.IOU_THRESHOLDS),
        "confusion_matrix": charts.confusion_matrix(confusion, list(annotations.categories.values()), MIN_SHOWN_SCORE),
    }


def write_pictures(output_dir: Path, drawn: Iterable[tuple[str, Tensor]]) -> None:
    """Writes pictures by name, each as it is drawn, in the place of an earlier evaluation's."""
    folder = make_folder(output_dir)
    for outdated in folder.glob("[0-9][0-9][0-9][0-9]_*.png"):
        outdated.unlink()
    for name, picture in drawn:
        pictures.save_png(picture, folder / f"{name}.png")


def draw_learning_curve(records: Iterable[dict], steps_per_epoch: int) -> Tensor:
    """What the lines of metrics.jsonl say of losses and AP: uint8 [3, H, W]."""
    known = {}
    for kind, name, label in CURVES:
        found = [one for one in records if one["kind"] == kind and one.get(name) is not None]
        if found:
            known[label] = [one["step"] / steps_per_epoch for one in found], [one[name] for one in found]
    losses = {label: curve for label, curve in known.items() if "loss" in label}
    metrics = {label: curve for label, curve in known.items() if label not in losses}
    return charts.learning_curve(losses, metrics)


def write_learning_curve(output_dir: Path, records: Iterable[dict], steps_per_epoch: int) -> None:
    """Draws what the lines of metrics.jsonl say to pictures/learning_curve.png."""
    pictures.save_png(draw_learning_curve(records, steps_per_epoch), make_folder(output_dir) / "learning_curve.png")


def make_folder(output_dir: Path) -> Path:
    """Where the pictures of a run or an evaluation are."""
    folder = output_dir / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def count_by_threshold(annotations: CocoAnnotations, diagnosis: scoring.Diagnosis) -> dict[str, ndarray]:
    """Right and false detections and missed objects at IoU 0.5, for score thresholds from 0 to 1: int64 [101] each.

    Below ``scoring.MIN_DIAGNOSED_SCORE`` the counts are those of that score.
    """
    thresholds = np.linspace(0, 1, CURVE_THRESHOLDS)
    is_right = diagnosis.found > 0

    def count(which: ndarray) -> ndarray:
        scores = np.sort(diagnosis.detections[which, 5])
        return len(scores) - np.searchsorted(scores, thresholds)

    right = count(is_right)
    return {"right": right, "false": count(diagnosis.is_false), "missed": int((~annotations.is_crowd).sum()) - right}
