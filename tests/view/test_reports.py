"""What evaluation tells a person: right and false detections, the images that show them, the charts' numbers."""

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.cocoeval import COCOeval

import coco
from coco import scoring
from tests.conftest import annotation, image
from view import charts, pictures, reports

CIRCLE, STAR = 1, 2


@pytest.fixture
def truth(write) -> coco.CocoAnnotations:
    """Image 1: a circle and a star. Image 2: a crowd of stars. Image 3: two circles. Image 9: nothing."""
    objects = [
        annotation(11, image_id=1, category_id=CIRCLE, bbox=[0, 0, 20, 20]),
        annotation(12, image_id=1, category_id=STAR, bbox=[40, 40, 20, 20]),
        annotation(13, image_id=2, category_id=STAR, bbox=[0, 0, 60, 60], iscrowd=1),
        annotation(14, image_id=3, category_id=CIRCLE, bbox=[0, 0, 20, 20]),
        annotation(15, image_id=3, category_id=CIRCLE, bbox=[50, 50, 20, 20]),
    ]
    images = [image(3), image(9), image(1), image(2)]
    categories = [{"id": STAR, "name": "star"}, {"id": CIRCLE, "name": "circle"}]
    return coco.read_annotations(write(objects, images, categories))


DETECTIONS = np.array(
    [
        [1, 0, 0, 20, 20, 0.9, CIRCLE],  # right
        [1, 0, 0, 20, 19, 0.8, CIRCLE],  # false: the circle is taken
        [1, 40, 40, 20, 20, 0.7, CIRCLE],  # false: it is a star
        [2, 10, 10, 20, 20, 0.9, STAR],  # in the crowd
        [2, 10, 10, 20, 20, 0.6, CIRCLE],  # false: the crowd is of stars
        [3, 0, 0, 20, 20, 0.2, CIRCLE],  # right, but not shown
        [3, 50, 50, 20, 20, 0.04, CIRCLE],  # right, but of too low a score to be looked at
        [9, 0, 0, 20, 20, 0.5, STAR],  # false
    ]
)


def test_right_and_false_detections(truth):
    diagnosis = scoring.diagnose(truth, DETECTIONS)
    assert diagnosis.detections.tolist() == np.delete(DETECTIONS, 6, axis=0).tolist()
    assert diagnosis.found.tolist() == [11, 0, 0, 0, 0, 14, 0]
    assert diagnosis.is_false.tolist() == [False, True, True, False, True, False, True]


def test_mistakes_of_each_image(truth):
    missed, false = reports.count_mistakes(truth, scoring.diagnose(truth, DETECTIONS))
    by_id = dict(zip(truth.image_ids.tolist(), zip(missed.tolist(), false.tolist(), strict=True), strict=True))
    assert by_id == {1: (1, 2), 2: (0, 1), 3: (2, 0), 9: (0, 1)}


def test_confusion_matrix(truth):
    """Rows star, circle, nothing; columns star, circle, missed. What lies in a crowd is left out."""
    matrix = scoring.confusion_matrix(truth, scoring.diagnose(truth, DETECTIONS), min_score=0.3)
    assert list(truth.categories.values()) == ["star", "circle"]
    assert matrix.tolist() == [[0, 1, 0], [0, 1, 2], [1, 2, 0]]


def test_a_surer_detection_of_another_class_takes_no_object_from_a_right_one(truth):
    detections = np.array([[1, 0, 0, 20, 20, 0.9, STAR], [1, 0, 0, 20, 20, 0.8, CIRCLE]])
    matrix = scoring.confusion_matrix(truth, scoring.diagnose(truth, detections), min_score=0.3)
    assert matrix.tolist() == [[0, 0, 1], [0, 1, 2], [1, 0, 0]]


def test_images_with_very_many_objects(write):
    """COCO's metrics look at 100 detections of an image and class, which says nothing about the others."""
    boxes = [[10 * (i % 15), 10 * (i // 15), 9, 9] for i in range(150)]
    objects = [annotation(i + 1, category_id=3, bbox=box) for i, box in enumerate(boxes[:120])]
    a = coco.read_annotations(write(objects, [image(1, 200, 200)]))
    detections = np.array([[1, *box, 0.9 - 0.001 * i, 3] for i, box in enumerate(boxes)])
    diagnosis = scoring.diagnose(a, detections)
    assert ((diagnosis.found > 0).sum(), diagnosis.is_false.sum()) == (120, 30)
    assert scoring.confusion_matrix(a, diagnosis, 0.3).tolist() == [[120, 0, 0], [0, 0, 0], [30, 0, 0]]


def test_nothing_detected_and_nothing_to_detect(truth, write):
    nothing = scoring.diagnose(truth, np.zeros((0, 7)))
    assert reports.count_mistakes(truth, nothing)[0].sum() == 4
    assert scoring.confusion_matrix(truth, nothing, 0.3).tolist() == [[0, 0, 1], [0, 0, 3], [0, 0, 0]]
    empty = coco.read_annotations(write([]))
    diagnosis = scoring.diagnose(empty, np.zeros((0, 7)))
    scores = scoring.score_detections(empty, np.zeros((0, 7)), "hotcoco")
    assert np.isnan(scores.precision).all()
    assert {name: chart.dtype for name, chart in reports.draw_charts(empty, scores, diagnosis).items()} == {
        "precision_recall": torch.uint8,
        "confusion_matrix": torch.uint8,
    }


def test_which_images_are_drawn(truth):
    diagnosis = scoring.diagnose(truth, DETECTIONS)

    def ids(number: int, by: str) -> list[int]:
        return truth.image_ids[reports.choose_images(truth, diagnosis, number, by)].tolist()

    assert ids(3, "first") == truth.image_ids[:3].tolist()
    assert ids(2, "worst") == [1, 3]
    assert sorted(ids(10, "random")) == [1, 2, 3, 9]
    assert ids(10, "random") != ids(10, "first")
    assert ids(2, "random") == ids(2, "random")


def test_pictures_name_mistakes(truth, tmp_path, monkeypatch):
    for image_id in (1, 2, 3):
        Image.new("RGB", (100, 80)).save(tmp_path / f"{image_id}.png")
    written = []
    draw_boxes = pictures.draw_boxes

    def spy(image, boxes, labels, texts, caption):
        written.append((caption, texts))
        return draw_boxes(image, boxes, labels, texts, caption)

    monkeypatch.setattr(pictures, "draw_boxes", spy)
    diagnosis = scoring.diagnose(truth, DETECTIONS)
    rows = [truth.image_ids.tolist().index(image_id) for image_id in (1, 2, 9)]
    drawn = dict(reports.draw_images(truth, tmp_path, diagnosis, rows, drawn={}))
    assert list(drawn) == ["0000_1", "0001_2"]  # the third cannot be read
    assert written == [
        ("ground truth", ["circle", "star (missed)"]),
        ("detections, score >= 0.3: 1 missed, 2 false", ["circle 0.70 (false)", "circle 0.80 (false)", "circle 0.90"]),
        ("ground truth", ["star (crowd)"]),
        ("detections, score >= 0.3: 0 missed, 1 false", ["circle 0.60 (false)", "star 0.90"]),
    ]


def test_pictures_replace_those_of_an_earlier_evaluation_and_nothing_else(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("0003_old.png", "12.png", "holiday.png"):
        (folder / name).touch()
    reports.write_pictures(tmp_path, [("0000_new", torch.zeros(3, 5, 5, dtype=torch.uint8))])
    assert {path.name for path in folder.iterdir()} == {"0000_new.png", "12.png", "holiday.png"}


def test_counts_by_threshold(truth):
    counts = reports.count_by_threshold(truth, scoring.diagnose(truth, DETECTIONS))
    at = {name: dict(zip(range(101), values.tolist(), strict=True)) for name, values in counts.items()}
    assert [at["right"][i] for i in (0, 10, 19, 21, 89, 91, 100)] == [2, 2, 2, 1, 1, 0, 0]
    assert [at["false"][i] for i in (0, 49, 59, 69, 79, 81)] == [4, 4, 3, 2, 1, 0]
    assert all(at["right"][i] + at["missed"][i] == 4 for i in range(101))


def random_set(write, seed: int) -> tuple[coco.CocoAnnotations, np.ndarray]:
    """Objects of three classes, and detections near them and elsewhere."""
    rng = np.random.default_rng(seed)
    objects = [
        annotation(i + 1, image_id=int(rng.integers(1, 9)), category_id=int(rng.integers(1, 4)))
        | {"bbox": [*rng.uniform(0, 50, 2).tolist(), *rng.uniform(10, 40, 2).tolist()]}
        for i in range(40)
    ]
    rows = []
    for one in objects * 3:
        category_id = one["category_id"] if rng.random() < 0.7 else rng.integers(1, 4)
        rows.append(
            [one["image_id"], *(np.array(one["bbox"]) + rng.normal(0, 4, 4)).clip(1), rng.random(), category_id]
        )
    images = [image(i) for i in range(1, 9)]
    categories = [{"id": i, "name": str(i)} for i in (1, 2, 3)]
    return coco.read_annotations(write(objects, images, categories)), np.array(rows)


def naive_diagnosis(a: coco.CocoAnnotations, detections: np.ndarray) -> tuple[list[int], list[list[int]]]:
    """Found annotations, and confusions, by plain loops; knows no crowds."""

    def iou(one, other) -> float:
        width, height = (min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
        both = max(width, 0) * max(height, 0)
        return both / (one[2] * one[3] + other[2] * other[3] - both)

    image_of_box = np.repeat(a.image_ids, np.diff(a.offsets))
    found, matrix = [0] * len(detections), np.zeros((4, 4), dtype=int)
    order = np.argsort(-detections[:, 5], kind="stable")

    def best_of(i: int, candidates) -> int | None:
        image_id, *box = detections[i, :5]
        near = [g for g in candidates if image_of_box[g] == image_id and iou(box, a.boxes[g]) >= 0.5]
        return max(near, key=lambda g: iou(box, a.boxes[g]), default=None)

    free = set(range(len(a.boxes)))
    for i in order:
        best = best_of(i, [g for g in free if a.category_ids[g] == detections[i, 6]])
        if best is not None:
            free.remove(best)
            found[i] = int(a.annotation_ids[best])
    shown = [i for i in order if detections[i, 5] >= 0.3]
    right = {found[i] for i in shown} - {0}
    free = {g for g in range(len(a.boxes)) if a.annotation_ids[g] not in right}
    for i in shown:
        column = int(detections[i, 6]) - 1
        if found[i]:
            matrix[column, column] += 1
            continue
        best = best_of(i, free)
        free.discard(best)
        matrix[3 if best is None else a.category_ids[best] - 1, column] += 1
    for g in free:
        matrix[a.category_ids[g] - 1, 3] += 1
    return found, matrix.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_diagnosis_equals_plain_loops(write, seed):
    a, detections = random_set(write, seed)
    diagnosis = scoring.diagnose(a, detections)
    found, matrix = naive_diagnosis(a, diagnosis.detections)
    assert diagnosis.found.tolist() == found
    assert diagnosis.is_false.tolist() == [number == 0 for number in found]
    assert scoring.confusion_matrix(a, diagnosis, min_score=0.3).tolist() == matrix


def test_mean_precision_is_that_of_the_metrics(write):
    a, detections = random_set(write, seed=0)
    for scorer in ("pycocotools", "hotcoco"):
        scores = scoring.score_detections(a, detections, scorer)
        assert scores.precision.shape == (len(scoring.IOU_THRESHOLDS), len(scoring.RECALLS))
        assert scores.precision.mean() == pytest.approx(scores.metrics["AP"], abs=1e-12)
        assert scores.precision[5].mean() == pytest.approx(scores.metrics["AP75"], abs=1e-12)


def test_thresholds_are_cocos():
    params = COCOeval(iouType="bbox").params
    np.testing.assert_allclose(params.iouThrs, scoring.IOU_THRESHOLDS)
    np.testing.assert_allclose(params.recThrs, scoring.RECALLS)


def test_a_learning_curve_has_what_is_logged_over_the_epochs(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(charts, "learning_curve", lambda *curves: drawn.append(curves) or torch.zeros(3, 9, 9).byte())
    records = [
        {"kind": "train", "step": 2, "loss": 9.0, "lr": 1.0},
        {"kind": "skipped", "step": 3, "samples": 1, "faults": []},
        {"kind": "train", "step": 4, "loss": 5.0, "lr": 1.0},
        {"kind": "val", "step": 4, "AP": 0.25, "AP50": 0.5},
        {"kind": "val", "step": 8, "AP": None, "AP50": None, "loss": 3.0},
    ]
    reports.write_learning_curve(tmp_path, records, steps_per_epoch=4)
    assert drawn == [
        (
            {"loss": ([0.5, 1.0], [9.0, 5.0]), "validation loss": ([2.0], [3.0])},
            {"AP": ([1.0], [0.25]), "AP50": ([1.0], [0.5])},
        )
    ]
    with Image.open(tmp_path / "pictures/learning_curve.png") as picture:
        assert picture.size == (9, 9)
