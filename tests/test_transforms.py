"""The augmentations against torchvision v2 as oracle: same parameters, same pixels; same distributions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

import transforms as T
from transforms import View

SIZE = 96
NUM_DRAWS = 10_000


def make_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours and some noise, uint8 [H, W, 4], of which the last byte is to be ignored."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 7, 9)))
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic")[0].permute(1, 2, 0).numpy()
    colors = (smooth + rng.normal(0, 5, smooth.shape)).clip(0, 255)
    return np.concatenate((colors, rng.integers(0, 256, (height, width, 1))), axis=2).astype(np.uint8)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """[3, H, W] of an image [H, W, 4]."""
    return torch.from_numpy(image[..., :3]).permute(2, 0, 1)


def our_pixels(image: np.ndarray, view: View, size: int = SIZE) -> torch.Tensor:
    pixels, coverage = T.resample(image, view, size, np.uint8)
    return T.fill_uncovered(pixels[None].float(), coverage[None])[0]


def reference_pixels(image: np.ndarray, view: View, size: int = SIZE) -> torch.Tensor:
    """Zoom-out canvas, crop, flip, and the resizing that torchvision's SSD does: one after the other."""
    height, width = image.shape[:2]
    pad = [max(0, -view.left), max(0, -view.top)]
    pad += [max(0, view.left + view.width - width), max(0, view.top + view.height - height)]
    canvas = V.pad(to_tensor(image), pad, fill=list(T.FILL))
    crop = V.crop(canvas, view.top + pad[1], view.left + pad[0], view.height, view.width)
    if view.flipped:
        crop = V.horizontal_flip(crop)
    return F.interpolate(crop[None].float(), size=(size, size), mode="bilinear", align_corners=False)[0]


def random_view(rng: np.random.Generator, height: int, width: int) -> View:
    view = View(0, 0, width, height)
    boxes, labels = np.array([[width * 0.2, height * 0.2, width * 0.7, height * 0.8]], np.float32), np.ones(1, np.int64)
    for transform in (T.RandomZoomOut(), T.RandomIoUCrop(), T.RandomHorizontalFlip()):
        view, _, _ = transform(view, boxes, labels, rng)
    return view


@pytest.mark.parametrize("seed", range(60))
def test_resampling_equals_the_reference_within_a_level(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(20, 260, 2))
    image, view = make_image(height, width, seed), random_view(rng, height, width)
    assert (our_pixels(image, view) - reference_pixels(image, view)).abs().max() <= 1


def test_a_flip_of_a_view_that_leaves_the_image():
    image, view = make_image(40, 50), View(-30, -10, 100, 90, flipped=True)
    assert (our_pixels(image, view) - reference_pixels(image, view)).abs().max() <= 1
    assert torch.equal(our_pixels(image, view)[:, 0, 0], torch.tensor(T.FILL))


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(
    "view",
    [
        View(0, 60, 30, 30),  # below the image
        View(0, -60, 30, 30),
        View(70, 0, 30, 30),
        View(-70, 0, 30, 30),
        View(-80, 50, 30, 30),
        View(-1051, 39, 1565, 1118),  # one row is left of the image, and falls between the samples
        View(49, -900, 1200, 1000),
    ],
)
def test_views_that_see_next_to_nothing(view, flipped):
    image, view = make_image(40, 50), replace(view, flipped=flipped)
    assert (our_pixels(image, view) - reference_pixels(image, view)).abs().max() <= 1
    seen = T.resample(image, view, SIZE, np.float32)
    assert all(tensor.isfinite().all() for tensor in seen)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3), (2, 5), (3, 2)])
def test_tiny_images(height, width):
    image = make_image(height, width)
    for seed in range(50):
        view = random_view(np.random.default_rng(seed), height, width)
        assert min(view.width, view.height) >= 1
        assert (our_pixels(image, view) - reference_pixels(image, view)).abs().max() <= 1


@pytest.mark.parametrize(("height", "width"), [(480, 640), (375, 500), (300, 300), (33, 900)])
def test_evaluation_resizes_like_interpolate_without_rounding(height, width):
    image = make_image(height, width)
    pixels, coverage = T.resample(image, View(0, 0, width, height), 300, np.float32)
    expected = F.interpolate(to_tensor(image)[None].float(), size=(300, 300), mode="bilinear")[0]
    # Up to 900 pixels, positions round by 3e-5; where a CPU multiplies and adds at once, interpolate's round otherwise,
    # and 3e-5 from black to white is 0.008. Rounded pixels would be off by 0.5.
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0.02)
    assert (coverage == 1).all()


@pytest.mark.parametrize("flipped", [False, True])
def test_boxes_follow_the_pixels(flipped):
    """A white box on black ends up where its projected box says."""
    image = np.zeros((80, 120, 4), np.uint8)
    image[20:50, 30:90] = 255
    view = View(10, 10, 96, 64, flipped)
    (box,) = T.project_boxes(np.array([[30, 20, 90, 50]], np.float32), view, SIZE)
    white = our_pixels(image, view)[0] > 127
    rows, columns = white.any(dim=1).nonzero().flatten(), white.any(dim=0).nonzero().flatten()
    found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert box.tolist() == pytest.approx([float(side) for side in found], abs=1)


def test_boxes_are_clipped_to_the_view():
    boxes = T.project_boxes(np.array([[-5, -5, 50, 200]], np.float32), View(0, 0, 100, 100), 50)
    assert boxes.tolist() == [[0, 0, 25, 50]]


def test_transforms_are_pure():
    boxes, labels = np.array([[10, 10, 60, 60], [70, 70, 90, 90]], np.float32), np.array([1, 2])
    before = boxes.copy(), labels.copy()
    for seed in range(20):
        view = View(0, 0, 100, 100)
        for transform in (T.RandomZoomOut(), T.RandomIoUCrop(), T.RandomHorizontalFlip()):
            view, new_boxes, new_labels = transform(view, boxes, labels, np.random.default_rng(seed))
            assert len(new_boxes) == len(new_labels)
    assert np.array_equal(boxes, before[0])
    assert np.array_equal(labels, before[1])


def test_crop_keeps_boxes_by_centre_and_respects_its_limits():
    boxes = np.array([[5, 5, 40, 60], [50, 30, 190, 100], [150, 80, 160, 95]], np.float32)
    labels = np.array([1, 2, 3])
    kept = set()
    for seed in range(300):
        view, new_boxes, new_labels = T.RandomIoUCrop()(
            View(0, 0, 200, 110), boxes, labels, np.random.default_rng(seed)
        )
        right, bottom = view.left + view.width, view.top + view.height
        assert 0 <= view.left < right <= 200
        assert 0 <= view.top < bottom <= 110
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = (centers > (view.left, view.top)).all(axis=1) & (centers < (right, bottom)).all(axis=1)
        assert new_labels.tolist() == labels[inside].tolist()
        assert len(new_boxes) > 0
        kept.add(len(new_boxes))
        if view.width < 200:
            assert 0.5 <= view.width / view.height <= 2
    assert kept == {1, 2, 3}


def test_crop_without_boxes_leaves_the_view():
    view = View(0, 0, 50, 50)
    cropped, boxes, labels = T.RandomIoUCrop()(view, np.zeros((0, 4)), np.zeros(0), np.random.default_rng(0))
    assert cropped == view
    assert len(boxes) == len(labels) == 0


NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}


def our_distortion(image: np.ndarray, parameters: dict) -> torch.Tensor:
    batch = {name: torch.as_tensor(value)[None] for name, value in parameters.items()}
    return T.RandomPhotometricDistort.distort(to_tensor(image)[None].float(), batch)[0]


def reference_distortion(image: torch.Tensor, parameters: dict) -> torch.Tensor:
    result = V.adjust_brightness(image, float(parameters["brightness"]))
    result = V.adjust_contrast(result, float(parameters["contrast_before"]))
    result = V.adjust_saturation(result, float(parameters["saturation"]))
    result = V.adjust_hue(result, float(parameters["hue"]))
    result = V.adjust_contrast(result, float(parameters["contrast_after"]))
    return V.permute_channels(result, parameters["channels"].tolist()).float()


@pytest.mark.parametrize("seed", range(40))
def test_distortion_equals_torchvision(seed):
    """On float images, where torchvision does not round either; its uint8 images lose up to a level in each step."""
    image = make_image(90, 110, seed)
    parameters = T.RandomPhotometricDistort(p=0.8).draw(image, np.random.default_rng(seed))
    ours = our_distortion(image, parameters)
    exact = 255 * reference_distortion(to_tensor(image).float() / 255, parameters)
    torch.testing.assert_close(ours, exact, rtol=0, atol=0.05)
    rounded = reference_distortion(to_tensor(image), parameters)
    assert (ours - rounded).abs().quantile(0.99) <= 4


def striped(height: int, width: int) -> np.ndarray:
    """Stripes of 8 pixels, one of which is black and seven of which are bright."""
    image = np.full((height, width, 4), 200, np.uint8)
    image[:, ::8] = 0
    return image


@pytest.mark.parametrize("name", ["brightness", "contrast_before", "saturation", "hue", "contrast_after"])
@pytest.mark.parametrize("image", [make_image(80, 100), make_image(600, 800), striped(600, 800), striped(400, 600)])
def test_each_distortion_equals_torchvision_within_two_levels(name, image):
    for value in (-0.05, -0.02, 0.03, 0.05) if name == "hue" else (0.5, 0.875, 1.125, 1.5):
        parameters = {"brightness": 1.0, "contrast_before": 1.0, "saturation": 1.0, "hue": 0.0, "contrast_after": 1.0}
        parameters[name] = value
        parameters["grey_mean"] = T.grey_mean(image, parameters)
        parameters["channels"] = np.arange(3)
        difference = our_distortion(image, parameters) - reference_distortion(to_tensor(image), parameters)
        assert difference.abs().max() <= 2


def test_the_hue_does_not_rest_on_a_value_that_equals_its_maximum_to_the_last_bit(monkeypatch):
    """A compiled step may compute the maximum twice, rounded in two ways."""
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 255
    images[:, 1, :9] = images[:, 0, :9]  # the greatest value twice
    expected = T.shift_hue(images, 0.04)
    exact = T.value_and_chroma
    monkeypatch.setattr(T, "value_and_chroma", lambda images: (exact(images)[0] * (1 + 2**-22), exact(images)[1]))
    torch.testing.assert_close(T.shift_hue(images, 0.04), expected, rtol=0, atol=0.01)


def test_neutral_parameters_change_nothing():
    image = make_image(30, 40)
    parameters = T.RandomPhotometricDistort(p=0.0).draw(image, np.random.default_rng(0))
    torch.testing.assert_close(our_distortion(image, parameters), to_tensor(image).float(), rtol=0, atol=1e-3)


def test_a_batch_is_distorted_image_by_image():
    images = [make_image(40, 40, seed) for seed in range(6)]
    drawn = [T.RandomPhotometricDistort(p=0.7).draw(image, np.random.default_rng(i)) for i, image in enumerate(images)]
    batch = {name: torch.stack([torch.as_tensor(parameters[name]) for parameters in drawn]) for name in drawn[0]}
    together = T.RandomPhotometricDistort.distort(torch.stack([to_tensor(image) for image in images]).float(), batch)
    for image, parameters, result in zip(images, drawn, together, strict=True):
        # levels, which some ten operations round by 1e-5 each where the end of a row is computed by other instructions
        torch.testing.assert_close(result, our_distortion(image, parameters), rtol=0, atol=1e-2)


def test_contrast_pivots_on_the_mean_of_the_whole_source_image():
    """Also where that image is so large that only some of its pixels are read."""
    image = make_image(600, 800)
    factors = {"brightness": 1.1, "saturation": 1.4, "hue": 0.05, "contrast_before": 1.0, "contrast_after": 0.5}
    changed = V.adjust_hue(V.adjust_saturation(V.adjust_brightness(to_tensor(image), 1.1), 1.4), 0.05)
    expected = V.rgb_to_grayscale(changed).float().mean().item()
    assert T.grey_mean(image, factors) == pytest.approx(expected, abs=1.5)


def test_the_fill_stays_undistorted():
    image = make_image(50, 50)
    parameters = T.RandomPhotometricDistort(p=1.0).draw(image, np.random.default_rng(0))
    pixels, coverage = T.resample(image, View(-50, 0, 150, 50), SIZE, np.uint8)
    batch = {name: torch.as_tensor(value)[None] for name, value in parameters.items()}
    result = T.fill_uncovered(T.RandomPhotometricDistort.distort(pixels[None].float(), batch), coverage[None])
    outside = coverage[1] == 0
    assert outside.sum() > 50
    assert torch.equal(result[0, :, :, outside], torch.tensor(T.FILL).view(3, 1, 1).expand(3, SIZE, int(outside.sum())))


def ks_p_value(sample1: list[float], sample2: list[float]) -> float:
    """Two-sample Kolmogorov-Smirnov test, asymptotic."""
    values = np.sort(np.concatenate((sample1, sample2)))
    cdfs = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (sample1, sample2)]
    statistic = np.abs(cdfs[0] - cdfs[1]).max() * math.sqrt(len(sample1) * len(sample2) / (len(sample1) + len(sample2)))
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * k**2 * statistic**2) for k in range(1, 101)))


def reference_geometry(num_draws: int, boxes: np.ndarray) -> list[dict]:
    """What torchvision's own transforms draw, one image of 400 x 300 after the other."""
    torch.manual_seed(1)
    zoom_out, crop = v2.RandomZoomOut(side_range=(1.0, 4.0)), v2.RandomIoUCrop()
    # meta: parameters are drawn, no pixel is touched
    image = tv_tensors.Image(torch.empty(3, 300, 400, device="meta"))
    drawn = []
    for _ in range(num_draws):
        found = tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=(300, 400))
        zoomed, found = zoom_out(image, found)
        height, width = zoomed.shape[1:]
        parameters = crop.make_params([zoomed, found])
        kept = int(parameters["is_within_crop_area"].sum()) if parameters else len(boxes)
        drawn.append(
            {
                "zoom": width / 400,
                "area": parameters.get("width", width) * parameters.get("height", height) / (width * height),
                "aspect": parameters.get("width", width) / parameters.get("height", height),
                "kept": kept,
            }
        )
    return drawn


def our_geometry(num_draws: int, boxes: np.ndarray) -> list[dict]:
    labels = np.ones(len(boxes), np.int64)
    drawn = []
    for i in range(num_draws):
        rng = np.random.default_rng((0, i))
        zoomed, _, _ = T.RandomZoomOut()(View(0, 0, 400, 300), boxes, labels, rng)
        view, kept, _ = T.RandomIoUCrop()(zoomed, boxes, labels, rng)
        drawn.append(
            {
                "zoom": zoomed.width / 400,
                "area": view.width * view.height / (zoomed.width * zoomed.height),
                "aspect": view.width / view.height,
                "kept": len(kept),
            }
        )
    return drawn


def test_geometry_has_the_distribution_of_the_reference():
    boxes = np.array([[20, 30, 120, 200], [150, 100, 380, 280], [200, 20, 240, 60]], np.float32)
    num_draws = 4_000  # the reference takes milliseconds for each
    ours, reference = our_geometry(num_draws, boxes), reference_geometry(num_draws, boxes)
    for name in ("zoom", "area", "aspect", "kept"):
        assert ks_p_value([d[name] for d in ours], [d[name] for d in reference]) > 0.01, name


def test_distortion_has_the_distribution_of_the_reference():
    torch.manual_seed(0)
    image, reference = make_image(10, 10), v2.RandomPhotometricDistort()
    theirs = [reference.make_params([to_tensor(image)]) for _ in range(NUM_DRAWS)]
    ours = [T.RandomPhotometricDistort().draw(image, np.random.default_rng((0, i))) for i in range(NUM_DRAWS)]
    for name in ("brightness", "saturation", "hue"):
        expected = [NEUTRAL[name] if p[f"{name}_factor"] is None else p[f"{name}_factor"] for p in theirs]
        assert ks_p_value([float(p[name]) for p in ours], expected) > 0.01, name
    for name, before in (("contrast_before", True), ("contrast_after", False)):
        used = [p["contrast_factor"] is not None and p["contrast_before"] == before for p in theirs]
        expected = [p["contrast_factor"] if u else 1.0 for p, u in zip(theirs, used, strict=True)]
        assert ks_p_value([float(p[name]) for p in ours], expected) > 0.01, name
    shuffled = np.mean([p["channels"].tolist() != [0, 1, 2] for p in ours])
    assert shuffled == pytest.approx(0.5 * 5 / 6, abs=0.02)


def test_flip_rate():
    args = View(0, 0, 9, 9), np.zeros((0, 4)), np.zeros(0)
    flips = [T.RandomHorizontalFlip()(*args, np.random.default_rng((0, i)))[0].flipped for i in range(NUM_DRAWS)]
    assert np.mean(flips) == pytest.approx(v2.RandomHorizontalFlip().p, abs=0.02)
