"""What tells a collapsed model from one that has learned, and from one that has not begun to."""

import numpy as np
import pytest
import torch

import coco
import evaluate
import ssd
from engine import collapse, inference
from tests import tiny
from tests.conftest import infer

BOXES_PER_MAP = [30, 10]


def make_logits(dependence: list[float], level: float = -5.0, images: int = 8) -> torch.Tensor:
    """Of three classes, apart by about ``level``, which changes by this share from image to image."""
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(images, sum(BOXES_PER_MAP), generator=generator)
    change = (change - change.mean(dim=0)) / change.std(dim=0)
    change = 1 + change * torch.tensor(dependence).repeat_interleave(torch.tensor(BOXES_PER_MAP))
    return 7 + level * change[..., None] * torch.tensor([1.0, -0.5, 0.3])


@pytest.mark.parametrize("level", [-8.0, 3.0, 1e-3])
@pytest.mark.parametrize(
    ("dependence", "collapsed"), [([0.3, 0.1], 0), ([0.3, 0.001], 1), ([0.0, 0.0], 2), ([0.01, 0.4], 1)]
)
def test_maps_that_say_the_same_of_every_image_are_counted(dependence, collapsed, level):
    """At any level of the predictions: those of new layers are small, and still depend on the image."""
    found = collapse.image_dependence(make_logits(dependence, level), BOXES_PER_MAP)
    assert found == pytest.approx(dependence, rel=0.1, abs=1e-6)
    lines = list(collapse.describe(found, {}))
    assert [line.split(":")[0] for line in lines] == ["Collapsed"] * (collapsed > 0)
    if collapsed:
        assert f"{collapsed} of 2 feature maps" in lines[0]
        assert "--recipe small" in lines[0]


def test_a_model_has_collapsed_where_half_of_its_maps_have():
    found = [0.5, 0.5, 0.001, 0.5, 0.001]
    assert list(collapse.describe(found, {})) == []
    (line,) = collapse.describe([*found, 0.001], {})
    assert "3 of 6 feature maps" in line


def test_one_box_that_depends_on_the_image_is_enough():
    """A camera that does not move sees the same nearly everywhere."""
    logits = make_logits([0.0, 0.5])
    logits[:, 3] += make_logits([0.5, 0.5])[:, 3]
    assert collapse.image_dependence(logits, BOXES_PER_MAP)[0] > collapse.LEAST_DEPENDENCE


@pytest.mark.parametrize("images", [0, 1])
def test_nothing_is_said_of_fewer_than_two_images(images):
    assert collapse.image_dependence(torch.zeros(images, 40, 3), BOXES_PER_MAP) is None
    assert list(collapse.describe(None, {})) == []


def test_predictions_of_nothing_at_all_are_collapsed():
    found = collapse.image_dependence(torch.zeros(4, 40, 3), BOXES_PER_MAP)
    assert found == [0, 0]


def test_classes_that_are_never_detected_are_named():
    rows = {f"class {k}": {"boxes": k, "detections": k % 2} for k in range(30)}
    (line,) = collapse.describe(None, rows)
    assert line.startswith("Never detected: 14 of 30 classes, here with their boxes: class 2 (2), class 4 (4), ")
    assert line.endswith("class 20 (20), ...")
    (line,) = collapse.describe(None, {"cat": {"boxes": 3, "detections": 0}, "dog": {"boxes": 1, "detections": 9}})
    assert line == "Never detected: 1 of 2 classes, here with their boxes: cat (3)"


def dependence_of(model: ssd.SSD, data_path, *flags) -> list[float]:
    """What an evaluation finds."""
    annotations = coco.read_annotations(data_path / "annotations/instances_val2017.json")
    args = evaluate.get_args_parser().parse_args(["--checkpoint", "", "--workers", "0", *flags])
    return infer(args, model, annotations, data_path / "val2017").dependence


@pytest.mark.parametrize("settings", [{}, {"num_classes": 2}, {"weight_init": "small_head"}], ids=str)
def test_an_untrained_model_has_not_collapsed_until_its_layers_die(settings, data_path):
    model = ssd.get_model("ssd300_light", weights_backbone=None, **({"num_classes": 91} | settings))
    assert min(dependence_of(model, data_path)) > collapse.LEAST_DEPENDENCE
    for head in model.head.classification_head.module_list[2:]:
        layer = [one for one in head.modules() if isinstance(one, torch.nn.Conv2d)][-1]
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.normal_(layer.bias)
    is_collapsed = [one < collapse.LEAST_DEPENDENCE for one in dependence_of(model, data_path)]
    assert is_collapsed == [False] * 2 + [True] * 4


def test_what_is_watched_does_not_depend_on_the_batch(data_path, monkeypatch):
    """More images than one batch has, and fewer than the data set."""
    monkeypatch.setattr(collapse, "WATCHED_IMAGES", 5)
    model = tiny.MODEL(num_classes=91)
    found = [dependence_of(model, data_path, "--batch-size", str(size)) for size in (1, 2, 7)]
    assert len(found[0]) == 2
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[2] == pytest.approx(found[0], rel=1e-3)
    monkeypatch.setattr(collapse, "WATCHED_IMAGES", 7)
    assert dependence_of(model, data_path) != pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("kind", ["one photograph again and again", "noise of a sensor", "a small thing that moves"])
def test_images_that_are_alike_say_nothing_of_the_model(kind):
    """A model cannot but predict the same of them."""
    generator = torch.Generator().manual_seed(0)
    images = (255 * torch.rand(1, 3, 60, 60, generator=generator)).repeat(8, 1, 1, 1)
    if kind == "noise of a sensor":
        images += 2 * torch.randn(images.shape, generator=generator)
    elif kind == "a small thing that moves":
        for number, image in enumerate(images):
            image[:, 20:25, 7 * number : 7 * number + 5] = 255
    watched = collapse.Watched(8)
    watched.add(images, make_logits([0.0, 0.0]), [""] * 8)
    assert watched.dependence(BOXES_PER_MAP) is None
    watched.add(255 - images, make_logits([0.0, 0.0]), [""] * 8)
    assert watched.dependence(BOXES_PER_MAP) == pytest.approx([0, 0], abs=1e-6)


def test_images_at_even_distances_are_watched_but_no_bad_ones():
    watched = collapse.Watched(40)
    for first in range(0, 40, 8):
        batch = torch.arange(first, first + 8.0)
        faults = ["bad" if number in (3, 12) else "" for number in batch.tolist()]
        watched.add(batch.view(-1, 1, 1, 1), batch.view(-1, 1, 1), faults)
    assert torch.cat(watched.logits).flatten().tolist() == [
        number for number in range(0, 40, 3) if number not in (3, 12)
    ]
    assert torch.equal(torch.cat(watched.images).flatten(), torch.cat(watched.logits).flatten())


@pytest.mark.parametrize("num_images", [0, 1, 15, 16, 17, 31, 32, 33, 5000])
def test_never_more_images_are_watched_than_memory_is_meant_for(num_images):
    watched = collapse.Watched(num_images)
    for first in range(0, num_images, 7):
        size = min(7, num_images - first)
        watched.add(torch.zeros(size, 3, 2, 2), torch.zeros(size, 40, 3), [""] * size)
    assert min(num_images, 8) <= sum(len(logits) for logits in watched.logits) <= collapse.WATCHED_IMAGES


def test_processes_together_say_what_the_first_has_seen():
    shares = [inference.Inference(np.array([i]), np.zeros((0, 7)), None, [], 0.0, [0.5 + i]) for i in (1, 2)]
    assert inference.merge(shares, np.array([1, 2])).dependence == [1.5]
