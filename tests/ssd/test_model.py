"""The model against torchvision's as oracle: from the same weights and inputs, the same results.

All in float64: results are equal, or something is wrong. test_scripts.py compares detections in float32.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection import ssd300_vgg16 as torchvision_ssd300_vgg16

import ssd
from tests.conftest import float64, use_float64

NUM_CLASSES = 7
CAFFE_MEAN, CAFFE_STD = ssd.INPUT_SCALINGS["caffe"]


@pytest.fixture(scope="module", autouse=True)
def in_float64():
    with float64():
        yield


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """But for the order of sums: in float64 that is about 1e-14 of the largest number, of which 1e-10 leaves enough."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 * theirs.abs().max().item())


@pytest.fixture(scope="module")
def pair():
    """Our model and torchvision's with the same weights, whose scores lie between 0 and 1 instead of tied at both."""
    torch.manual_seed(1)
    theirs = torchvision_ssd300_vgg16(weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
    use_float64(theirs.anchor_generator)
    with torch.no_grad():
        for conv in theirs.head.classification_head.module_list:
            conv.weight *= 0.3
    ours = ssd.get_model("ssd300_vgg16", weights_backbone=None, num_classes=NUM_CLASSES)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Two images of 300 pixels, 0 to 255. Noise, so that no two default boxes see the same and get tied scores."""
    return torch.rand(2, 3, 300, 300, generator=torch.Generator().manual_seed(2)) * 255


def random_targets(generator: torch.Generator, num_classes: int = NUM_CLASSES) -> list[dict[str, torch.Tensor]]:
    """Four images: many boxes, none, two boxes that want one default box, and boxes of one pixel."""
    start = torch.rand(12, 2, generator=generator) * 200
    many = torch.cat((start, start + 5 + torch.rand(12, 2, generator=generator) * 90), dim=1)
    crowded = torch.tensor([[100.0, 100, 103, 103], [100, 100, 102, 102], [10, 10, 290, 280]])
    pixels = torch.tensor([[0.0, 0, 1, 1], [299, 299, 300, 300], [150, 150, 151, 151]])
    all_boxes = [many, torch.zeros(0, 4), crowded, pixels]
    return [
        {"boxes": boxes, "labels": torch.randint(1, num_classes, (len(boxes),), generator=generator)}
        for boxes in all_boxes
    ]


def pad(targets: list[dict[str, torch.Tensor]], spare_slots: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    num_slots = max(len(target["labels"]) for target in targets) + spare_slots
    boxes, labels = torch.zeros(len(targets), num_slots, 4), torch.zeros(len(targets), num_slots, dtype=torch.int64)
    for i, target in enumerate(targets):
        boxes[i, : len(target["boxes"])] = target["boxes"]
        labels[i, : len(target["labels"])] = target["labels"]
    return boxes, labels


def random_outputs(batch_size: int, generator: torch.Generator, num_classes: int = NUM_CLASSES):
    return {
        "cls_logits": torch.randn(batch_size, 8732, num_classes, generator=generator) * 2,
        "bbox_regression": torch.randn(batch_size, 8732, 4, generator=generator),
    }


def torchvision_loss(theirs, outputs, targets):
    boxes = theirs.anchor_generator
    from torchvision.models.detection.image_list import ImageList
    from torchvision.ops import box_iou

    images = ImageList(torch.zeros(len(targets), 3, 300, 300), [(300, 300)] * len(targets))
    maps = [torch.zeros(1, 1, side, side) for side in (38, 19, 10, 5, 3, 1)]
    anchors = boxes(images, maps)
    matches = [
        theirs.proposal_matcher(box_iou(t["boxes"], a)) if len(t["boxes"]) else torch.full((len(a),), -1)
        for t, a in zip(targets, anchors, strict=True)
    ]
    return theirs.compute_loss(targets, outputs, anchors, matches)


def naive_loss(model, outputs, boxes, labels):
    """The MultiBox loss as the paper tells it, one default box at a time."""
    box_sum = class_sum = positives = 0.0
    for logits, offsets, image_boxes, image_labels in zip(
        outputs["cls_logits"], outputs["bbox_regression"], boxes, labels, strict=True
    ):
        objects = [(box, label) for box, label in zip(image_boxes, image_labels, strict=True) if label > 0]
        match = {}
        for a, default_box in enumerate(model.default_boxes):
            overlaps = [float(ssd.pairwise_iou(box[None], default_box[None])) for box, _ in objects]
            if objects and max(overlaps) >= 0.5:
                match[a] = overlaps.index(max(overlaps))
        for g, (box, _) in enumerate(objects):
            match[int(ssd.pairwise_iou(box[None], model.default_boxes).argmax())] = g
        negatives = []
        for a in range(len(model.default_boxes)):
            log_probabilities = logits[a].log_softmax(dim=0)
            if a not in match:
                negatives.append(-float(log_probabilities[0]))
                continue
            box, label = objects[match[a]]
            class_sum -= float(log_probabilities[label])
            target = model.box_coder.encode(box, model.default_boxes[a])
            for error in (offsets[a] - target).abs().tolist():
                box_sum += 0.5 * error**2 if error < 1 else error - 0.5
        class_sum += sum(sorted(negatives, reverse=True)[: 3 * len(match)])
        positives += len(match)
    return {"bbox_regression": box_sum / max(1, positives), "classification": class_sum / max(1, positives)}


def test_state_dict_is_torchvisions():
    with torch.device("meta"):
        ours = ssd.get_model("ssd300_vgg16", weights_backbone=None).state_dict()
        theirs = torchvision_ssd300_vgg16(weights=None, weights_backbone=None).state_dict()
    assert len(ours) == 71
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    assert sum(value.numel() for value in ours.values()) == 35_641_826


def test_state_dict_loads_strictly_both_ways(pair):
    ours, theirs = pair
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_head_outputs_equal_torchvision(pair, images):
    ours, theirs = (model.eval() for model in pair)
    with torch.no_grad():
        outputs = ours(images)
        normalized, _ = theirs.transform(list(images / 255))
        expected = theirs.head(list(theirs.backbone(normalized.tensors).values()))
    for name in ("cls_logits", "bbox_regression"):
        assert_equal(outputs[name], expected[name])


def test_uint8_images_give_what_float_images_give(pair, images):
    ours, images = pair[0], images[:1].byte()
    with torch.no_grad():
        assert torch.equal(ours(images)["cls_logits"], ours(images.float())["cls_logits"])


@pytest.mark.parametrize("seed", range(5))
def test_losses_and_their_gradients_equal_torchvision(pair, seed):
    ours, theirs = pair
    generator = torch.Generator().manual_seed(seed)
    targets, outputs = random_targets(generator), random_outputs(4, generator)
    predictions = [output.requires_grad_() for output in outputs.values()]
    losses, expected = ours.compute_loss(outputs, *pad(targets)), torchvision_loss(theirs, outputs, targets)
    assert losses.keys() == expected.keys()
    for name in losses:
        assert_equal(losses[name], expected[name])
    gradients, expected = (torch.autograd.grad(sum(one.values()), predictions) for one in (losses, expected))
    for ours, theirs in zip(gradients, expected, strict=True):
        assert_equal(ours, theirs)


def test_losses_equal_the_naive_loop():
    model = small_model()
    generator = torch.Generator().manual_seed(3)
    targets = random_targets(generator, num_classes=4)
    num_default_boxes = len(model.default_boxes)
    outputs = {
        "cls_logits": torch.randn(4, num_default_boxes, 4, generator=generator),
        "bbox_regression": torch.randn(4, num_default_boxes, 4, generator=generator),
    }
    boxes, labels = pad(targets)
    losses = model.compute_loss(outputs, boxes, labels)
    expected = naive_loss(model, outputs, boxes, labels)
    assert {name: float(value) for name, value in losses.items()} == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("content", [(0, 0, 0, 0), (20, 30, 150, 160), (math.nan,) * 4, (math.inf, -math.inf, 0, 1)])
def test_padding_does_not_change_the_loss(pair, content):
    """Whatever it holds."""
    ours, _ = pair
    generator = torch.Generator().manual_seed(4)
    targets, outputs = random_targets(generator), random_outputs(4, generator)
    losses = ours.compute_loss(outputs, *pad(targets))
    boxes, labels = pad(targets, spare_slots=9)
    boxes[labels == 0] = torch.tensor(content, dtype=boxes.dtype)
    padded = ours.compute_loss(outputs, boxes, labels)
    assert all(torch.equal(losses[name], padded[name]) for name in losses)


def test_images_are_matched_alike_one_by_one_and_together(pair):
    ours, _ = pair
    boxes, labels = pad(random_targets(torch.Generator().manual_seed(5)))
    together = ours.matcher(ssd.pairwise_iou(boxes, ours.default_boxes), labels > 0)
    assert torch.equal(ours.match(boxes, labels > 0), together)


@pytest.mark.parametrize("num_slots", [0, 1, 3])
def test_a_batch_without_boxes_has_zero_loss_and_zero_gradients(num_slots):
    model = small_model()
    outputs = model(torch.rand(2, 3, 300, 300))
    losses = model.compute_loss(outputs, torch.zeros(2, num_slots, 4), torch.zeros(2, num_slots, dtype=torch.int64))
    assert [loss.item() for loss in losses.values()] == [0, 0]
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())


def test_only_negatives_are_mined():
    """Where positives outnumber a quarter of the default boxes, none of them counts twice."""
    model = small_model(iou_thresh=1e-9)  # every default box matches
    outputs = {name: torch.randn(1, len(model.default_boxes), 4) for name in ("cls_logits", "bbox_regression")}
    box, label = torch.tensor([[[0.0, 0, 300, 300]]]), torch.tensor([[2]])
    classification = model.compute_loss(outputs, box, label)["classification"]
    expected = F.cross_entropy(outputs["cls_logits"][0], torch.full((len(model.default_boxes),), 2))
    assert_equal(classification, expected)


def test_gradients_and_three_sgd_steps_equal_torchvision(pair, images):
    """On one image; what several do to a loss and to its gradients, the losses show."""
    ours, theirs = (copy.deepcopy(model).train() for model in pair)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4) for m in (ours, theirs)]
    images = images[:1]
    many, _, crowded, _ = random_targets(torch.Generator().manual_seed(6))
    target = {key: torch.cat((many[key], crowded[key])) for key in many}
    boxes, labels = pad([target])
    for _ in range(3):
        losses = ours.compute_loss(ours(images), boxes, labels)
        expected = theirs(list(images / 255), [dict(target)])
        for optimizer, loss in zip(optimizers, (losses, expected), strict=True):
            optimizer.zero_grad()
            sum(loss.values()).backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_equal(p.grad, q.grad)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_equal(p, q)


def test_detections_equal_torchvision(pair, images):
    ours, theirs = (model.eval() for model in pair)
    sizes = torch.tensor([[200, 340], [431, 256]])
    originals = [
        F.interpolate(image[None], size=size.tolist(), mode="bilinear")[0]
        for image, size in zip(images, sizes, strict=True)
    ]
    resized = [F.interpolate(image[None], size=(300, 300), mode="bilinear")[0] for image in originals]
    with torch.no_grad():
        detections = ours.postprocess_detections(ours(torch.stack(resized)), sizes)
        expected = theirs([image / 255 for image in originals])
    assert sum(len(result["labels"]) for result in expected) > 20
    for result, reference in zip(detections, expected, strict=True):
        assert torch.equal(result["labels"], reference["labels"])
        assert_equal(result["scores"], reference["scores"])
        # torchvision scales by a ratio of sizes that it rounds to float32, which is 6e-8 of it
        torch.testing.assert_close(result["boxes"], reference["boxes"], rtol=1e-6, atol=0)


def test_postprocessing_alone_equals_torchvision(pair):
    """Given the same outputs; with more candidates per class and image than are kept."""
    ours, theirs = pair
    outputs = random_outputs(3, torch.Generator().manual_seed(8))
    images = [(300, 300)] * 3
    detections = ours.postprocess_detections(outputs, torch.tensor(images))
    anchors = [ours.default_boxes] * 3
    expected = theirs.postprocess_detections(outputs, anchors, images)
    assert all(len(result["labels"]) == theirs.detections_per_img for result in expected)
    for result, reference in zip(detections, expected, strict=True):
        assert torch.equal(result["labels"], reference["labels"])
        for key in ("scores", "boxes"):
            assert_equal(result[key], reference[key])


def test_no_detection_over_the_threshold():
    model = small_model(score_thresh=1.1)
    (detections,) = model.postprocess_detections(model(torch.zeros(1, 3, 300, 300)), torch.tensor([[10, 20]]))
    assert {name: value.shape for name, value in detections.items()} == {
        "boxes": (0, 4),
        "scores": (0,),
        "labels": (0,),
    }


def small_model(**settings) -> ssd.SSD:
    """An SSD of a few hundred default boxes, for tests that need no real network."""

    class Backbone(torch.nn.Module):
        out_channels = (8,)

        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, kernel_size=3, stride=30)

        def forward(self, images):
            return [self.conv(images)]

    boxes = ssd.DefaultBoxGenerator([[2]], min_ratio=0.2, max_ratio=0.6)
    settings = {"num_classes": 4, **settings}
    return ssd.SSD(Backbone(), boxes, 300, **settings)


def test_new_models_have_torchvisions_constants(pair):
    ours, theirs = pair
    assert math.isclose(ours.neg_to_pos_ratio, theirs.neg_to_pos_ratio)
    for name in ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert list(CAFFE_MEAN) == theirs.transform.image_mean
    assert list(CAFFE_STD) == theirs.transform.image_std


@pytest.mark.parametrize(("settings", "frozen"), [({}, 0), ({"trainable_backbone_layers": 4}, 4)])
def test_trainable_layers_without_pretrained_backbone(settings, frozen):
    model = ssd.get_model("ssd300_vgg16", weights_backbone=None, **settings)
    assert sum(not p.requires_grad for p in model.parameters()) == frozen


def test_matching_and_loss_have_static_shapes():
    """One graph without a break: nothing in the loss depends on the data, so nothing waits for the device."""
    model = small_model()
    loss = torch.compile(model.compute_loss, fullgraph=True, backend="eager")
    outputs = model(torch.rand(2, 3, 300, 300))
    boxes, labels = torch.tensor([[[30.0, 40, 200, 220]], [[0, 0, 0, 0]]]), torch.tensor([[1], [0]])
    expected = model.compute_loss(outputs, boxes, labels)
    assert all(torch.equal(value, expected[name]) for name, value in loss(outputs, boxes, labels).items())
