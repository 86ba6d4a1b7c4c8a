"""Pascal VOC's AP against a naive computation, and against a published example."""

import numpy as np
import pytest

import coco
from coco import voc_scoring
from tests.conftest import annotation, image

NAMES = {1: "cat", 2: "dog", 3: "cow"}
CATEGORIES = [{"id": i, "name": name} for i, name in NAMES.items()]


def overlap(a, b) -> float:
    """IoU as VOC's code counts it: corners are whole pixels, of which the last is inside."""
    ax1, ay1, ax2, ay2 = a[0] + 1, a[1] + 1, a[0] + a[2], a[1] + a[3]
    bx1, by1, bx2, by2 = b[0] + 1, b[1] + 1, b[0] + b[2], b[1] + b[3]
    width, height = min(ax2, bx2) - max(ax1, bx1) + 1, min(ay2, by2) - max(ay1, by1) + 1
    if width <= 0 or height <= 0:
        return 0
    shared = width * height
    return shared / ((ax2 - ax1 + 1) * (ay2 - ay1 + 1) + (bx2 - bx1 + 1) * (by2 - by1 + 1) - shared)


def naive_ap(objects: list[dict], detections: list[tuple]) -> tuple[float, float] | tuple[None, None]:
    """One detection after the other: ``objects`` of one class, ``detections`` (image id, box, score)."""
    count = sum(not one["iscrowd"] for one in objects)
    if count == 0:
        return None, None
    taken, tp, fp, curve = set(), 0, 0, []
    for image_id, box, _ in sorted(detections, key=lambda one: -one[2]):
        nearest, largest = None, 0
        for number, one in enumerate(objects):
            if one["image_id"] == image_id and overlap(box, one["bbox"]) > largest:
                nearest, largest = number, overlap(box, one["bbox"])
        if largest >= 0.5 and objects[nearest]["iscrowd"]:
            continue
        if largest >= 0.5 and nearest not in taken:
            taken.add(nearest)
            tp += 1
        else:
            fp += 1
        curve.append((tp, tp / (tp + fp)))
    points = [max((p for t, p in curve if t * 10 >= k * count), default=0) for k in range(11)]
    area = sum(max(p for t, p in curve if t >= level) for level in range(1, tp + 1)) / count
    return sum(points) / 11, area


def check(write, objects: list[dict], detections: list[tuple]) -> dict:
    """Compares the scores of all classes with the naive ones; ``detections`` are (image id, box, score, class)."""
    a = coco.read_annotations(write(objects, images=[image(i) for i in range(1, 5)], categories=CATEGORIES))
    rows = np.array([[image_id, *box, score, c] for image_id, box, score, c in detections], float).reshape(-1, 7)
    scores = voc_scoring.score_detections(a, rows)
    expected = {}
    for category_id, name in NAMES.items():
        of_class = [one for one in objects if one["category_id"] == category_id]
        expected[name] = naive_ap(of_class, [one[:3] for one in detections if one[3] == category_id])
        found = scores["per_class"][name]
        assert (found["AP11"], found["AP"]) == pytest.approx(expected[name], abs=1e-12)
    for place, key in enumerate(("AP11", "AP")):
        known = [one[place] for one in expected.values() if one[place] is not None]
        assert scores[key] == (pytest.approx(np.mean(known)) if known else None)
    return scores


def test_difficult_objects_doubled_detections_and_absent_classes(write):
    objects = [
        annotation(1, 1, 1, (10, 10, 20, 20), iscrowd=0),
        annotation(2, 1, 1, (50, 10, 20, 20), iscrowd=1),
        annotation(3, 2, 1, (10, 10, 30, 20), iscrowd=0),
        annotation(4, 2, 2, (10, 10, 30, 20), iscrowd=1),
    ]
    detections = [
        (1, (10, 10, 20, 20), 0.9, 1),
        (1, (11, 10, 20, 20), 0.8, 1),  # doubled
        (1, (50, 10, 20, 20), 0.95, 1),  # of a difficult object, twice
        (1, (50, 11, 20, 20), 0.7, 1),
        (2, (12, 10, 30, 20), 0.5, 1),
        (3, (10, 10, 30, 20), 0.99, 1),  # in an image without objects
        (2, (10, 10, 30, 20), 0.6, 2),  # all of whose objects are difficult
        (1, (10, 10, 20, 20), 0.6, 3),  # without objects
    ]
    scores = check(write, objects, detections)
    assert scores["per_class"]["dog"] == scores["per_class"]["cow"] == {"AP11": None, "AP": None}
    # false, right, doubled, right
    assert scores["AP"] == pytest.approx((1 / 2 + 1 / 2) / 2)


@pytest.mark.parametrize("seed", range(30))
def test_many_detections_are_scored_as_one_after_the_other(write, seed):
    """With whole pixels, few places and few scores, so that overlaps at the limit and equal scores are frequent."""
    rng = np.random.default_rng(seed)

    def box() -> tuple:
        return (*(int(v) for v in rng.integers(0, 3, 2) * 10), *(int(v) for v in rng.integers(1, 3, 2) * 10))

    objects = [
        annotation(i, int(rng.integers(1, 5)), int(rng.integers(1, 3)), box(), iscrowd=int(rng.random() < 0.2))
        for i in range(1, int(rng.integers(2, 25)))
    ]
    detections = [
        (int(rng.integers(1, 5)), box(), float(rng.integers(1, 8)) / 8, int(rng.integers(1, 4))) for _ in range(60)
    ]
    check(write, objects, detections)


def test_no_detections_and_no_objects(write):
    assert check(write, [annotation(1, iscrowd=0, category_id=1)], [])["AP"] == 0
    assert check(write, [], [(1, (0, 0, 9, 9), 0.5, 1)])["AP11"] is None


def test_a_published_example():
    """24 detections of 15 objects, with 26.84 % and 24.56 %: https://github.com/rafaelpadilla/Object-Detection-Metrics."""
    right = {1, 3, 10, 12, 13, 14, 23}
    verdicts = np.array([voc_scoring.RIGHT if place in right else voc_scoring.WRONG for place in range(1, 25)])
    ap11, ap = voc_scoring.average_precisions(verdicts, num_objects=15)
    assert 100 * ap11 == pytest.approx(26.84, abs=0.005)
    assert 100 * ap == pytest.approx(24.56, abs=0.01)
