import pytest
import torch
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator as TorchvisionGenerator
from torchvision.models.detection.image_list import ImageList

from ssd import DefaultBoxGenerator, SSDFeatureExtractorVGG
from ssd.model import grid_sizes, vgg

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


def test_highres_has_the_grid_of_ssd512():
    backbone = SSDFeatureExtractorVGG(vgg.make_layers(vgg.cfgs["A"]), highres=True)
    grids = grid_sizes(backbone, 512)
    assert grids == [(side, side) for side in (64, 32, 16, 8, 4, 2, 1)]
    ratios = [[2], [2, 3], [2, 3], [2, 3], [2, 3], [2], [2]]
    assert len(DefaultBoxGenerator(ratios)((512, 512), grids)) == 24564


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
