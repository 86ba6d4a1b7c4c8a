"""The augmentation of Caffe's SSD, against its algorithms written out naively and its documented effects."""

import colorsys
import math

import numpy as np
import pytest
import torch

from tests.test_transforms import NUM_DRAWS, ks_p_value, make_image, to_tensor
from transforms import CaffeIoUCrop, CaffePhotometricDistort, View

NEUTRAL = {"brightness": 0.0, "contrast_before": 1.0, "contrast_after": 1.0, "saturation": 1.0, "hue": 0.0}
BOXES = np.array([[20, 30, 120, 200], [150, 100, 380, 280], [200, 20, 240, 60]], np.float32)


def distort(pixels, **changes) -> np.ndarray:
    """Of pixels [N, 3], 0 to 255."""
    images = torch.tensor(pixels, dtype=torch.float32).T[None, :, None]  # [1, 3, 1, N]
    parameters = {name: torch.tensor([value]) for name, value in (NEUTRAL | changes).items()}
    return CaffePhotometricDistort.distort(images, parameters)[0, :, 0].T.numpy()


def naive_distortion(pixel, parameters: dict) -> list[float]:
    """One pixel, by the formulas of HSV."""

    def clamp(values):
        return [min(max(value, 0.0), 255.0) for value in values]

    pixel = clamp([channel + parameters["brightness"] for channel in pixel])
    pixel = clamp([channel * parameters["contrast_before"] for channel in pixel])
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in pixel))
    hue, saturation = (hue + parameters["hue"]) % 1, min(saturation * parameters["saturation"], 1)
    pixel = [255 * channel for channel in colorsys.hsv_to_rgb(hue, saturation, value)]
    return clamp([channel * parameters["contrast_after"] for channel in pixel])


@pytest.mark.parametrize("seed", range(10))
def test_distortion_equals_the_formulas_of_hsv(seed):
    image = make_image(12, 12, seed)
    parameters = CaffePhotometricDistort(p=0.8).draw(image, np.random.default_rng(seed))
    pixels = image.reshape(-1, 4)[:, :3]
    expected = [naive_distortion(pixel.tolist(), {k: float(v) for k, v in parameters.items()}) for pixel in pixels]
    np.testing.assert_allclose(distort(pixels, **parameters), expected, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        ({"brightness": 32.0}, [10, 10, 10], [42, 42, 42]),
        ({"brightness": -32.0}, [10, 10, 10], [0, 0, 0]),
        ({"contrast_before": 0.5}, [200, 200, 200], [100, 100, 100]),
        ({"contrast_after": 1.5}, [200, 200, 200], [255, 255, 255]),
        ({"hue": 0.1}, [255, 0, 0], [255, 153, 0]),
        ({"saturation": 1.5}, [200, 100, 100], [200, 50, 50]),
        ({"saturation": 1.5}, [200, 20, 50], [200, 0, 100 / 3]),  # saturated: no channel below 0, the hue as it was
        ({"saturation": 0.5}, [0, 0, 0], [0, 0, 0]),
        ({}, [12, 34, 56], [12, 34, 56]),
    ],
)
def test_effects(changes, before, after):
    np.testing.assert_allclose(distort([before], **changes), [after], atol=0.01)


def test_distributions():
    """Each is neutral half of the time, else uniform; contrast comes before or after, never both."""
    image = make_image(5, 5)
    drawn = [CaffePhotometricDistort().draw(image, np.random.default_rng((0, i))) for i in range(NUM_DRAWS)]
    assert "channels" not in drawn[0]
    contrast = [float(d["contrast_before"] * d["contrast_after"]) for d in drawn]
    assert all(1.0 in (d["contrast_before"], d["contrast_after"]) for d in drawn)
    assert np.mean([d["contrast_before"] != 1 for d in drawn]) == pytest.approx(0.25, abs=0.02)
    samples = {name: [float(d[name]) for d in drawn] for name in ("brightness", "saturation", "hue")}
    for name, (low, neutral, high) in {
        "brightness": (-32, 0, 32),
        "contrast": (0.5, 1, 1.5),
        "saturation": (0.5, 1, 1.5),
        "hue": (-0.1, 0, 0.1),
    }.items():
        values = np.array((samples | {"contrast": contrast})[name])
        changed = values[values != neutral]
        assert len(changed) / NUM_DRAWS == pytest.approx(0.5, abs=0.02)
        uniform = np.linspace(low, high, len(changed))
        assert ks_p_value(list(changed), list(uniform)) > 0.01, name


def naive_crop(rng: np.random.Generator) -> tuple[float, float, int]:
    """Caffe's batch sampler on an image of 400 x 300, in its normalised coordinates, one trial after the other.

    As in src/caffe/util/sampler.cpp of its author's repository (weiliu89/caffe), 4ca51d9.

    Returns:
        Area and aspect ratio of the crop, relative to the image's, and how many boxes have their centre in it.
    """
    boxes = BOXES / np.array([400, 300, 400, 300])
    found = [(0.0, 0.0, 1.0, 1.0)]
    for min_iou in (0.1, 0.3, 0.5, 0.7, 0.9, None):
        for _ in range(50):
            scale = rng.uniform(0.3, 1.0)
            ratio = min(max(rng.uniform(0.5, 2.0), scale**2), 1 / scale**2)
            width, height = min(scale * math.sqrt(ratio), 1.0), min(scale / math.sqrt(ratio), 1.0)
            left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
            crop = (left, top, left + width, top + height)
            if min_iou is None or any(iou(crop, box) >= min_iou for box in boxes):
                found.append(crop)
                break
    left, top, right, bottom = found[rng.integers(len(found))]
    centers = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in boxes]
    kept = sum(left < x < right and top < y < bottom for x, y in centers)
    return (right - left) * (bottom - top), (right - left) / (bottom - top), kept


def iou(crop, box) -> float:
    width = min(crop[2], box[2]) - max(crop[0], box[0])
    height = min(crop[3], box[3]) - max(crop[1], box[1])
    intersection = max(width, 0) * max(height, 0)
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in (crop, box)]
    return intersection / (sum(areas) - intersection)


def test_crops_have_the_distribution_of_the_naive_sampler():
    num_draws = 3000
    rng = np.random.default_rng(1)
    expected = np.array([naive_crop(rng) for _ in range(num_draws)])
    ours, whole = [], View(0, 0, 400, 300)
    for i in range(num_draws):
        view, kept, labels = CaffeIoUCrop()(whole, BOXES, np.arange(3), np.random.default_rng((0, i)))
        assert len(kept) == len(labels)
        assert view.left >= 0
        assert view.left + view.width <= 400
        assert view.top >= 0
        assert view.top + view.height <= 300
        ours.append((view.width * view.height / 120_000, view.width / view.height * 300 / 400, len(kept)))
    ours = np.array(ours)
    for column in range(3):
        assert ks_p_value(list(ours[:, column]), list(expected[:, column])) > 0.01, column
    assert (ours[:, 0] == 1).mean() == pytest.approx((expected[:, 0] == 1).mean(), abs=0.03)


def test_a_crop_keeps_the_boxes_whose_centre_it_has():
    for seed in range(200):
        view, kept, labels = CaffeIoUCrop()(View(0, 0, 400, 300), BOXES, np.arange(3), np.random.default_rng(seed))
        x, y = (BOXES[:, :2] + BOXES[:, 2:]).T / 2
        inside = (view.left < x) & (x < view.left + view.width) & (view.top < y) & (y < view.top + view.height)
        assert np.array_equal(kept, BOXES[inside])
        assert np.array_equal(labels, np.flatnonzero(inside))


def test_without_boxes_the_view_stays():
    view = View(3, 4, 50, 60)
    nothing = np.zeros((0, 4)), np.zeros(0)
    assert all(CaffeIoUCrop()(view, *nothing, np.random.default_rng(seed))[0] == view for seed in range(20))


def test_a_view_of_one_pixel():
    box = np.array([[0, 0, 1, 1]], np.float32)
    for seed in range(20):
        view, _, _ = CaffeIoUCrop()(View(0, 0, 1, 1), box, np.ones(1), np.random.default_rng(seed))
        assert (view.width, view.height) == (1, 1)


def test_neutral_parameters_change_nothing():
    image = make_image(30, 40)
    parameters = CaffePhotometricDistort(p=0.0).draw(image, np.random.default_rng(0))
    batch = {name: torch.as_tensor(value)[None] for name, value in parameters.items()}
    result = CaffePhotometricDistort.distort(to_tensor(image)[None].float(), batch)[0]
    torch.testing.assert_close(result, to_tensor(image).float(), rtol=0, atol=1e-3)
