import pytest
import torch
from torchvision.ops import nms

import ssd
from ssd import postprocess
from ssd.postprocess import Detections, rank_within, select_candidates, split_by_image, suppress

KEYS = ("boxes", "scores", "labels", "images")


def random_candidates(seed: int, num_images: int = 3, num_classes: int = 4, number: int = 240) -> Detections:
    """Best first, crowded so that most overlap another."""
    generator = torch.Generator().manual_seed(seed)
    corners = 60 * torch.rand(number, 2, generator=generator)
    boxes = torch.cat((corners, corners + 5 + 30 * torch.rand(number, 2, generator=generator)), dim=1)
    scores = torch.rand(number, generator=generator).sort(descending=True).values
    labels = torch.randint(num_classes, (number,), generator=generator)
    return Detections(boxes, scores, labels, torch.randint(num_images, (number,), generator=generator))


def suppress_naively(candidates: Detections, iou_thresh: float, detections_per_img: int) -> Detections:
    """The definition: each candidate against all that were kept before it."""
    kept: list[int] = []
    for i in range(len(candidates.images)):
        same_image = [k for k in kept if candidates.images[k] == candidates.images[i]]
        same_class = [k for k in same_image if candidates.labels[k] == candidates.labels[i]]
        overlaps = ssd.pairwise_iou(candidates.boxes[i : i + 1].double(), candidates.boxes[same_class].double())
        if not (overlaps > iou_thresh).any() and len(same_image) < detections_per_img:
            kept.append(i)
    return candidates[torch.tensor(kept)]


def assert_same(first: Detections, second: Detections) -> None:
    for key in KEYS:
        assert torch.equal(getattr(first, key), getattr(second, key)), key


def test_ranks_count_the_elements_of_a_group_before():
    assert rank_within(torch.tensor([5, 2, 5, 5, 2, 7])).tolist() == [0, 0, 1, 2, 1, 0]
    assert rank_within(torch.tensor([], dtype=torch.int64)).tolist() == []


def test_candidates_are_over_the_threshold_and_the_best_of_their_class():
    scores = torch.tensor([[[0.5, 0.1], [0.5, 0.9], [0.7, 0.2]], [[0.0, 0.3], [0.1, 0.3], [0.1, 0.4]]])  # [2, 3, 2]
    boxes = torch.arange(24.0).view(2, 3, 4)
    found = select_candidates(scores, boxes, score_thresh=0.1, topk_per_class=2)
    expected = [(0.9, 0, 1, 1), (0.7, 0, 0, 2), (0.5, 0, 0, 0), (0.4, 1, 1, 2), (0.3, 1, 1, 0), (0.2, 0, 1, 2)]
    rows = zip(found.scores.tolist(), found.images.tolist(), found.labels.tolist(), found.boxes[:, 0], strict=True)
    assert [(pytest.approx(s), i, n, int(x) // 4 - 3 * i) for s, i, n, x in rows] == expected


@pytest.mark.parametrize("score_thresh", [-1.0, 0.2, 0.9, 1.0])
def test_candidates_are_those_of_the_definition_however_many_there_are(score_thresh):
    """Of equal scores, of which there are many, the lower class and then the earlier default box comes first."""
    scores = (10 * torch.rand(2, 60, 3, generator=torch.Generator().manual_seed(0))).round() / 10
    boxes = torch.arange(2 * 60 * 4.0).view(2, 60, 4)
    found = select_candidates(scores, boxes, score_thresh, topk_per_class=7)
    every = [(-scores[i, a, n].item(), n, i, a) for i in range(2) for a in range(60) for n in range(3)]
    best = [
        sorted(one for one in every if one[1:3] == (label, image) and -one[0] > score_thresh)[:7]
        for label in range(3)
        for image in range(2)
    ]
    expected = sorted(one for group in best for one in group)
    rows = zip(found.scores, found.labels, found.images, found.boxes[:, 0], strict=True)
    assert [(-s.item(), n.item(), i.item(), b.item() / 4 - 60 * i.item()) for s, n, i, b in rows] == expected


@pytest.mark.parametrize("first_candidates", [2, 30, 1000])
@pytest.mark.parametrize("detections_per_img", [5, 40, 1000])
def test_suppression_follows_the_definition_for_any_number_tried_at_first(
    monkeypatch, first_candidates, detections_per_img
):
    monkeypatch.setattr(postprocess, "FIRST_CANDIDATES", first_candidates)
    for seed in range(5):
        candidates = random_candidates(seed)
        found = suppress(candidates, 0.45, detections_per_img)
        assert len(found.images) < len(candidates.images)
        assert_same(found, suppress_naively(candidates, 0.45, detections_per_img))


@pytest.mark.parametrize("most", [1, 7, 60, 10_000])
def test_suppression_in_parts_follows_the_definition(monkeypatch, most):
    """No part is larger than allowed, unless a class of an image is."""
    sizes = []

    def recording_nms(boxes, scores, iou_thresh):
        sizes.append(len(boxes))
        return nms(boxes, scores, iou_thresh)

    monkeypatch.setattr(postprocess, "nms", recording_nms)
    monkeypatch.setattr(postprocess, "MAX_BOXES_AT_A_TIME", most)
    monkeypatch.setattr(postprocess, "FIRST_CANDIDATES", 20)
    for seed in range(5):
        sizes.clear()
        candidates = random_candidates(seed)
        assert_same(suppress(candidates, 0.45, 12), suppress_naively(candidates, 0.45, 12))
        largest_group = (candidates.images * 4 + candidates.labels).bincount().max()
        assert max(sizes) <= max(most, largest_group)


def test_an_image_that_has_enough_is_left_alone(monkeypatch):
    """While another, all of whose boxes are alike, is tried with more of its candidates."""
    sizes = []
    monkeypatch.setattr(postprocess, "nms", lambda boxes, *args: sizes.append(len(boxes)) or nms(boxes, *args))
    monkeypatch.setattr(postprocess, "FIRST_CANDIDATES", 20)
    boxes = torch.tensor([[0.0, 0, 9, 9]]).repeat(400, 1)
    boxes[::2] += 10 * torch.arange(200)[:, None]
    labels, scores = torch.zeros(400, dtype=torch.int64), torch.linspace(0.9, 0.1, 400)
    candidates = Detections(boxes, scores, labels, torch.arange(400) % 2)
    assert suppress(candidates, 0.45, 20).images.bincount().tolist() == [20, 1]
    assert sizes == [40, 80, 200]


def test_a_model_that_has_collapsed_is_suppressed_in_bounded_parts(monkeypatch):
    """Scores that hardly differ and boxes that lie on one another: all that its classes may have are candidates."""
    sizes = []
    monkeypatch.setattr(postprocess, "nms", lambda boxes, *args: sizes.append(len(boxes)) or nms(boxes, *args))
    generator = torch.Generator().manual_seed(0)
    scores = 1 / 91 + 1e-4 * torch.rand(2, 400, 90, generator=generator)
    corners = torch.rand(2, 400, 2, generator=generator)
    boxes = torch.cat((corners, corners + 250), dim=2)
    candidates = select_candidates(scores, boxes, score_thresh=0.01, topk_per_class=400)
    found = suppress(candidates, 0.45, 200)
    assert len(candidates.images) == 2 * 400 * 90
    assert found.images.bincount().tolist() == [90, 90]  # one of each class
    assert sum(sizes) > 2 * 400 * 90
    assert max(sizes) <= postprocess.MAX_BOXES_AT_A_TIME


def test_images_are_alike_one_by_one_and_together():
    candidates = random_candidates(seed=0)
    together = split_by_image(suppress(candidates, 0.45, 20), num_images=4)
    one_by_one = [suppress(part, 0.45, 20) for part in split_by_image(candidates, num_images=4)]
    assert [len(one.images) for one in together] == [20, 20, 20, 0]
    for first, second in zip(together, one_by_one, strict=True):
        assert_same(first, second)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["cls_logits", "bbox_regression"])
def test_predictions_that_are_no_numbers_are_an_error(name, value):
    model = ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=3)
    outputs = {
        key: torch.zeros(4, len(model.default_boxes), n) for key, n in (("cls_logits", 3), ("bbox_regression", 4))
    }
    outputs[name][[1, 3], 17, 2] = value
    with pytest.raises(ssd.NotFiniteError, match=r"images \[1, 3\] of the batch") as caught:
        model.postprocess_detections(outputs, torch.full((4, 2), 300))
    assert caught.value.rows == [1, 3]
