import math

import pytest
import torch
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator as TorchvisionGenerator
from torchvision.models.detection.image_list import ImageList

import ssd
from ssd import DefaultBoxGenerator

SSD300_GRIDS = [(38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)]
SSD300_RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
SSD300_SCALES = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
SSD300_STEPS = [8, 16, 32, 64, 100, 300]


def torchvision_boxes(generator: TorchvisionGenerator, image_size, grids) -> torch.Tensor:
    images = ImageList(torch.zeros(1, 3, *image_size), [image_size])
    return generator(images, [torch.zeros(1, 1, *grid) for grid in grids])[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"scales": SSD300_SCALES, "steps": SSD300_STEPS},
        {"scales": SSD300_SCALES},
        {"scales": SSD300_SCALES, "clip": False},
        {"min_ratio": 0.2, "max_ratio": 0.95},
        {},
    ],
)
@pytest.mark.parametrize("image_size", [(300, 300), (240, 400)])
def test_equal_to_torchvision(settings, image_size):
    ours = DefaultBoxGenerator(SSD300_RATIOS, **settings)
    theirs = TorchvisionGenerator(SSD300_RATIOS, **settings)
    assert ours.num_anchors_per_location() == theirs.num_anchors_per_location()
    expected = torchvision_boxes(theirs, image_size, SSD300_GRIDS)
    torch.testing.assert_close(ours(image_size, SSD300_GRIDS), expected, rtol=0, atol=1e-4)


def test_ssd300_by_hand():
    boxes = DefaultBoxGenerator(SSD300_RATIOS, scales=SSD300_SCALES, steps=SSD300_STEPS)((300, 300), SSD300_GRIDS)
    assert boxes.shape == (8732, 4)
    assert boxes[0].tolist() == pytest.approx([-6.5, -6.5, 14.5, 14.5], abs=1e-4)  # 21 pixels around (4, 4)
    assert boxes[-1].tolist() == pytest.approx([57.72, 0, 242.28, 300], abs=1e-2)  # height clipped to the image


def test_one_feature_map():
    boxes = DefaultBoxGenerator([[2]], min_ratio=0.3, max_ratio=0.5)((100, 100), [(1, 1)])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides[0].tolist() == pytest.approx([30, 30])
    assert sides[1].tolist() == pytest.approx([100 * (0.3 * 0.5) ** 0.5] * 2)


def caffe_prior_boxes(size, grids, steps, sides, ratios) -> torch.Tensor:
    """Default boxes by the loops of Caffe's PriorBox layer: cell by cell, in float64, from sides in pixels.

    But for widths and heights, which Caffe's models for COCO do not limit to the image, and torchvision's do.
    """
    boxes = []
    for k, grid in enumerate(grids):
        smaller, larger = sides[k], sides[k + 1]
        shapes = [(smaller, smaller), (math.sqrt(smaller * larger),) * 2]
        for ratio in ratios[k]:
            shapes += [(smaller * math.sqrt(r), smaller / math.sqrt(r)) for r in (ratio, 1 / ratio)]
        for row in range(grid):
            for column in range(grid):
                x, y = (column + 0.5) * steps[k], (row + 0.5) * steps[k]
                for width, height in shapes:
                    half_width, half_height = min(width, size) / 2, min(height, size) / 2
                    boxes.append([x - half_width, y - half_height, x + half_width, y + half_height])
    return torch.tensor(boxes)


# sides of the smaller squares and, one further, of the larger, as in Caffe's scripts: percents of the input
CAFFE_PERCENTS = {
    ("coco", 300): (7, 15, 33, 51, 69, 87, 105),
    ("coco", 512): (4, 10, 26, 42, 58, 74, 90, 106),
    ("voc", 300): (10, 20, 37, 54, 71, 88, 105),
    ("voc", 512): (7, 15, 30, 45, 60, 75, 90, 105),
}


@pytest.mark.parametrize(("name", "size"), CAFFE_PERCENTS)
def test_those_of_vgg_equal_the_loops_of_caffe(name, size):
    sides = [size * percent / 100 for percent in CAFFE_PERCENTS[name, size]]
    ratios = [[2], *([2, 3] for _ in range(len(sides) - 4)), [2], [2]]
    steps = {300: (8, 16, 32, 64, 100, 300), 512: (8, 16, 32, 64, 128, 256, 512)}[size]
    grids = {300: (38, 19, 10, 5, 3, 1), 512: (64, 32, 16, 8, 4, 2, 1)}[size]
    expected = caffe_prior_boxes(size, grids, steps, sides, ratios)
    model = ssd.get_model(f"ssd{size}_vgg11", weights_backbone=None, num_classes=2, default_boxes=name)
    assert model.default_boxes.shape == ({300: 8732, 512: 24564}[size], 4)
    torch.testing.assert_close(model.default_boxes, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [300, 512])
def test_the_guess_is_close_to_caffe(size):
    """Every box of the guess has the scale of Caffe's within a tenth, and the same proportions."""
    caffe = ssd.default_boxes.CAFFE_DEFAULT_BOXES["coco"][size]
    steps = [8, 16, 32, 64, 100, 300] if size == 300 else [8, 16, 32, 64, 128, 256, 512]
    guess = ssd.guess_default_boxes([(-(-size // step),) * 2 for step in steps])
    assert guess.aspect_ratios == caffe.aspect_ratios
    assert guess.scales == pytest.approx(caffe.scales, rel=0.1)


@pytest.mark.parametrize("grids", [[10], [20, 10], [20, 10, 5], [8, 4, 2, 1], [2, 1, 1], [75, 38, 19, 10, 5, 3, 2, 1]])
def test_a_guess_for_any_number_of_maps(grids):
    grids = [(side, side) for side in grids]
    guess = ssd.guess_default_boxes(grids)
    assert guess.scales == sorted(guess.scales)
    assert guess.scales[0] > 0
    boxes = guess((300, 300), grids)
    assert len(boxes) == sum(
        rows * columns * boxes for (rows, columns), boxes in zip(grids, guess.num_anchors_per_location(), strict=True)
    )
    assert (boxes[:, 2:] > boxes[:, :2]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": [0.1, 0.2]}, "scales must have 3 values"),
        ({"scales": [0.1, 0.2, 0.3, 0.4]}, "scales must have 3 values"),
        ({"steps": [8]}, "steps must have 2 values"),
    ],
)
def test_mismatched_lengths(settings, message):
    with pytest.raises(ValueError, match=message):
        DefaultBoxGenerator([[2], [2, 3]], **settings)


def test_wrong_number_of_feature_maps():
    with pytest.raises(ValueError, match="got 1 feature maps but aspect ratios for 2"):
        DefaultBoxGenerator([[2], [2]])((300, 300), [(3, 3)])
