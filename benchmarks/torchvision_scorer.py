"""Scoring as torchvision's references/detection do it, in our words: with pycocotools, an image at a time."""

import contextlib
import copy
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from coco import scoring


class PerImageScorer:
    """Matches the detections of an image when they come, and keeps the matches until all images were seen."""

    def __init__(self, coco: COCO):
        self.coco = copy.deepcopy(coco)
        self.evaluator = COCOeval(self.coco, iouType="bbox")
        self.image_ids, self.matches = [], []

    def update(self, image_id: int, results: list[dict]) -> None:
        """Takes all detections of an image, in COCO's results format."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.evaluator.cocoDt = self.coco.loadRes(results) if results else COCO()
            self.evaluator.params.imgIds = [image_id]
            self.evaluator.evaluate()
        num_areas = len(self.evaluator.params.areaRng)
        self.image_ids.append(image_id)
        self.matches.append(np.asarray(self.evaluator.evalImgs).reshape(-1, num_areas, 1))

    def metrics(self) -> dict[str, float | None]:
        """The twelve metrics of COCO by name."""
        image_ids, order = np.unique(self.image_ids, return_index=True)
        self.evaluator.evalImgs = list(np.concatenate(self.matches, axis=2)[..., order].flatten())
        self.evaluator.params.imgIds = list(image_ids)
        self.evaluator._paramsEval = copy.deepcopy(self.evaluator.params)
        with contextlib.redirect_stdout(io.StringIO()):
            self.evaluator.accumulate()
            self.evaluator.summarize()
        return dict(zip(scoring.METRICS, map(scoring.known_or_none, self.evaluator.stats), strict=True))


def largest_difference(first: dict, second: dict) -> float:
    """Between two results with the twelve metrics; infinite if only one of them has a value."""
    pairs = [(first[name], second[name]) for name in scoring.METRICS]
    return max(abs(a - b) if None not in (a, b) else 0.0 if a is b else float("inf") for a, b in pairs)
