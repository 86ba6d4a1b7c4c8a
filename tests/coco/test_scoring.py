import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import coco
from coco import scoring
from tests.conftest import annotation, pycocotools_stats


def fake_detections(a: coco.CocoAnnotations, seed: int = 0) -> np.ndarray:
    """Good, poor and wrong detections, with ties in the scores."""
    rng = np.random.default_rng(seed)
    image_ids = np.repeat(a.image_ids, np.diff(a.offsets))
    parts = []
    for spread in (2, 15):
        boxes = np.abs(a.boxes + rng.normal(0, spread, a.boxes.shape))
        categories = np.where(rng.random(len(boxes)) < 0.2, rng.permutation(a.category_ids), a.category_ids)
        parts.append(np.column_stack([image_ids, boxes, rng.random(len(boxes)).round(1), categories]))
    return np.concatenate(parts)


def test_both_scorers_equal_plain_pycocotools_to_the_last_digit(tmp_path, data_path):
    """On a set with crowds and empty images."""
    annotation_file = data_path / "annotations/instances_train2017.json"
    content = json.loads(annotation_file.read_text())
    content["annotations"][0]["iscrowd"] = 1
    annotation_file = tmp_path / "annotations.json"
    annotation_file.write_text(json.dumps(content))
    a = coco.read_annotations(annotation_file)
    detections = fake_detections(a)
    scoring.write_results(tmp_path / "detections.json", detections)
    expected = pycocotools_stats(annotation_file, tmp_path / "detections.json")
    assert 0.1 < expected[0] < 0.9
    scored = [scoring.score_detections(a, detections, scorer).metrics for scorer in ("pycocotools", "hotcoco")]
    assert scored[0] == scored[1]
    assert [-1 if scored[0][name] is None else scored[0][name] for name in scoring.METRICS] == expected


@pytest.mark.parametrize("scorer", ["pycocotools", "hotcoco"])
def test_no_detections_score_zero_and_absent_classes_are_unknown(tmp_path, scorer):
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 80} for i in (1, 2, 3)],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20]}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    a = coco.read_annotations(tmp_path / "annotations.json")
    metrics = scoring.score_detections(a, np.zeros((0, 7)), scorer).metrics
    assert metrics["AP"] == 0
    assert metrics["APl"] is None
    assert metrics["per_class"] == {
        "cat": {"AP": 0, "AP50": 0, "boxes": 1, "detections": 0},
        "dog": {"AP": None, "AP50": None, "boxes": 0, "detections": 0},
    }
    assert metrics["counts"] == {"images": 3, "boxes": 1, "detections": 0}
    assert "n/a" in scoring.format_table(metrics)


def test_table_is_that_of_pycocotools(data_path, capsys, tmp_path):
    annotation_file = data_path / "annotations/instances_train2017.json"
    a = coco.read_annotations(annotation_file)
    detections = fake_detections(a)
    scoring.write_results(tmp_path / "detections.json", detections)
    pycocotools_stats(annotation_file, tmp_path / "detections.json")
    printed = [line for line in capsys.readouterr().out.splitlines() if "@[" in line]
    assert scoring.format_table(scoring.score_detections(a, detections, "hotcoco").metrics).splitlines() == printed


def test_scores_of_a_class_are_those_of_the_class_alone(data_path):
    a = coco.read_annotations(data_path / "annotations/instances_train2017.json")
    detections = fake_detections(a)
    metrics = scoring.score_detections(a, detections, "hotcoco").metrics
    assert a.is_crowd.any()
    truth = scoring.coco_of(COCO, scoring.ground_truth(a))
    for category_id, name in a.categories.items():
        alone = COCOeval(truth, truth.loadRes(detections), "bbox")
        alone.params.catIds = [category_id]
        alone.evaluate()
        alone.accumulate()
        alone.summarize()
        of_class = metrics["per_class"][name]
        assert [of_class["AP"], of_class["AP50"]] == pytest.approx(alone.stats[:2].tolist(), abs=1e-12)
        assert of_class["boxes"] == ((a.category_ids == category_id) & ~a.is_crowd).sum()
        assert of_class["detections"] == (detections[:, 6] == category_id).sum()


def test_class_table_has_the_best_and_the_worst():
    def row(ap):
        return {"AP": ap, "AP50": ap, "boxes": 1, "detections": 20}

    per_class = {f"c{i}": row(i / 100) for i in range(30)} | {"absent": row(None)}
    lines = scoring.format_class_table({"per_class": per_class}, at_most=4).splitlines()
    assert [line.split()[0] for line in lines] == ["class", "c29", "c28", "...", "c0", "absent"]
    assert lines[1].split() == ["c29", "0.290", "0.290", "1", "20"]
    assert lines[-1].split() == ["absent", "n/a", "n/a", "1", "20"]
    assert "27 more" in lines[3]
    assert len(scoring.format_class_table({"per_class": per_class}, at_most=31).splitlines()) == 32


def test_results_format(tmp_path):
    found = {
        "boxes": torch.tensor([[1.0, 2, 11, 22], [0, 0, 5, 5]]),
        "scores": torch.tensor([0.9, 0.8]),
        "labels": torch.tensor([2, 4]),
    }
    detections = scoring.detections_to_array(42, found, {2: 17})  # label 4 has no category
    scoring.write_results(tmp_path / "detections.json", detections)
    (result,) = json.loads((tmp_path / "detections.json").read_text())
    assert result == {"image_id": 42, "category_id": 17, "bbox": [1, 2, 10, 20], "score": pytest.approx(0.9)}


GOOD = {"image_id": 1, "category_id": 3, "bbox": [1, 2.5, 3, 4], "score": 0.5}


def test_a_results_file_is_read_as_it_was_written(tmp_path, write):
    a = coco.read_annotations(write([annotation(1)]))
    path = tmp_path / "detections.json"
    path.write_text(json.dumps([GOOD, GOOD | {"image_id": 2, "category_id": 7, "area": 12, "id": 5}]))
    detections, _ = scoring.read_results(path, a)
    assert detections.tolist() == [[1, 1, 2.5, 3, 4, 0.5, 3], [2, 1, 2.5, 3, 4, 0.5, 7]]
    scoring.write_results(path, detections)
    found, notes = scoring.read_results(path, a)
    assert np.array_equal(found, detections)
    assert notes == []
    path.write_text("[]")
    assert scoring.read_results(path, a)[0].shape == (0, 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a COCO results file: Expecting value"),
        ("<html>", "not a COCO results file: Expecting value"),
        ('{"annotations": []}', "not a COCO results file, which is a list of detections"),
        ([GOOD, 5], "position 1 of the list is no object"),
        ([{k: v for k, v in GOOD.items() if k != "score"}], "position 0 of the list has no score"),
        ([GOOD | {"image_id": 9}], r"is of image id 9, which .*annotations\.json does not list"),
        ([GOOD | {"image_id": "9"}], "is of image id 9, which"),
        ([GOOD | {"image_id": 1.5}], r"is of image id 1\.5, which"),
        ([GOOD | {"category_id": "3.0"}], r"is of category id '3\.0', which"),
        ([GOOD | {"category_id": True}], "is of category id True, which"),
        ([GOOD | {"category_id": 4}], "is of category id 4"),
        ([GOOD | {"category_id": [3]}], r"is of category id \[3\]"),
        ([GOOD | {"bbox": [1, 2, 3]}], r"\(image id 1\) has the bbox \[1, 2, 3\]"),
        ([GOOD | {"bbox": [1, 2, float("nan"), 3]}], "bbox .*nan.* all finite"),
        ([GOOD | {"bbox": [1, 2, -3, 3]}], "no negative size"),
        ([GOOD | {"bbox": None}], "has the bbox None"),
        ([GOOD | {"score": float("inf")}], r"has the score inf; expected a finite number"),
        ([GOOD | {"score": True}], "has the score True"),
        ([GOOD | {"score": 10**400}], "has the score 1000"),
    ],
)
def test_faults_of_a_results_file_are_named(tmp_path, write, content, message):
    a = coco.read_annotations(write([annotation(1)]))
    path = tmp_path / "detections.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(coco.DataError, match=message) as caught:
        scoring.read_results(path, a)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_results_file(tmp_path, write):
    a = coco.read_annotations(write([annotation(1)]))
    with pytest.raises(coco.DataError, match=r"nowhere\.json: cannot read the results file: No such file"):
        scoring.read_results(tmp_path / "nowhere.json", a)
