import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import coco_annotations
import coco_eval


def fake_detections(a: coco_annotations.CocoAnnotations, seed: int = 0) -> np.ndarray:
    """Good, poor and wrong detections, with ties in the scores."""
    rng = np.random.default_rng(seed)
    image_ids = np.repeat(a.image_ids, np.diff(a.offsets))
    parts = []
    for spread in (2, 15):
        boxes = np.abs(a.boxes + rng.normal(0, spread, a.boxes.shape))
        categories = np.where(rng.random(len(boxes)) < 0.2, rng.permutation(a.category_ids), a.category_ids)
        parts.append(np.column_stack([image_ids, boxes, rng.random(len(boxes)).round(1), categories]))
    return np.concatenate(parts)


def pycocotools_stats(annotation_file, results_file) -> list[float]:
    truth = COCO(str(annotation_file))
    evaluator = COCOeval(truth, truth.loadRes(str(results_file)), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator.stats.tolist()


def test_both_scorers_equal_plain_pycocotools_to_the_last_digit(tmp_path, data_path):
    """On a set with crowds and empty images."""
    annotation_file = data_path / "annotations/instances_train2017.json"
    content = json.loads(annotation_file.read_text())
    content["annotations"][0]["iscrowd"] = 1
    annotation_file = tmp_path / "annotations.json"
    annotation_file.write_text(json.dumps(content))
    a = coco_annotations.read_annotations(annotation_file)
    detections = fake_detections(a)
    coco_eval.write_results(tmp_path / "detections.json", detections)
    expected = pycocotools_stats(annotation_file, tmp_path / "detections.json")
    assert 0.1 < expected[0] < 0.9
    scored = [coco_eval.score_detections(a, detections, scorer) for scorer in ("pycocotools", "hotcoco")]
    assert scored[0] == scored[1]
    assert [-1 if scored[0][name] is None else scored[0][name] for name in coco_eval.METRICS] == expected


@pytest.mark.parametrize("scorer", ["pycocotools", "hotcoco"])
def test_no_detections_score_zero_and_absent_classes_are_unknown(tmp_path, scorer):
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 80} for i in (1, 2, 3)],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20]}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    a = coco_annotations.read_annotations(tmp_path / "annotations.json")
    metrics = coco_eval.score_detections(a, np.zeros((0, 7)), scorer)
    assert metrics["AP"] == 0
    assert metrics["APl"] is None
    assert metrics["per_class"] == {"cat": 0, "dog": None}
    assert metrics["counts"] == {"images": 3, "boxes": 1, "detections": 0}
    assert "n/a" in coco_eval.format_table(metrics)


def test_table_is_that_of_pycocotools(data_path, capsys, tmp_path):
    annotation_file = data_path / "annotations/instances_train2017.json"
    a = coco_annotations.read_annotations(annotation_file)
    detections = fake_detections(a)
    coco_eval.write_results(tmp_path / "detections.json", detections)
    pycocotools_stats(annotation_file, tmp_path / "detections.json")
    printed = [line for line in capsys.readouterr().out.splitlines() if "@[" in line]
    assert coco_eval.format_table(coco_eval.score_detections(a, detections, "hotcoco")).splitlines() == printed


def test_results_format(tmp_path):
    found = {
        "boxes": torch.tensor([[1.0, 2, 11, 22], [0, 0, 5, 5]]),
        "scores": torch.tensor([0.9, 0.8]),
        "labels": torch.tensor([2, 4]),
    }
    detections = coco_eval.detections_to_array(42, found, {2: 17})  # label 4 has no category
    coco_eval.write_results(tmp_path / "detections.json", detections)
    (result,) = json.loads((tmp_path / "detections.json").read_text())
    assert result == {"image_id": 42, "category_id": 17, "bbox": [1, 2, 10, 20], "score": pytest.approx(0.9)}
