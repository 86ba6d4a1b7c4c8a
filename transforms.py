"""SSD augmentation (paper section 2.2, "Data augmentation", and section 3.6 for zooming out).

A sample's parameters are drawn before any pixel is touched. Zooming out, cropping and flipping only move a ``View``, a
window on the plane around the image; one bilinear resampling then fills the network input from it. The reference
resizes without antialiasing, so this gives its pixels without its canvas of up to 16 times the image.

Photometric distortion, below, is in two parts: ``draw`` makes the parameters of one image in a loader worker,
``distort`` applies those of a batch, on whichever device it is, to float images of 0 to 255.

Constants and order are those of torchvision's ``ssd`` preset, which trained the published weights. Boxes are float32
[G, 4], xyxy in pixels of the source image until ``project_boxes``.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

FILL = (123.0, 117.0, 104.0)  # ImageNet's mean colour
MAX_PIXELS_FOR_GREY_MEAN = 10_000
FACTORS = ("brightness", "contrast_before", "contrast_after", "saturation", "hue")  # as ``draw_factors`` names them


@dataclass(frozen=True)
class View:
    """The window that the network sees, in pixels of the source image; outside the image it shows ``FILL``."""

    left: int
    top: int
    width: int
    height: int
    flipped: bool = False

    def cropped(self, crop: ndarray) -> "View":
        """What ``crop`` [4], xyxy in pixels of the source image, leaves of it."""
        left, top, right, bottom = crop.tolist()
        return replace(self, left=left, top=top, width=right - left, height=bottom - top)


@dataclass(frozen=True)
class RandomZoomOut:
    """Makes objects smaller: the view becomes up to ``max_ratio`` times as wide and high, the image anywhere in it."""

    max_ratio: float = 4.0
    p: float = 0.5

    def __call__(self, view: View, boxes: ndarray, labels: ndarray, rng: np.random.Generator):
        if rng.random() >= self.p:
            return view, boxes, labels
        ratio = rng.uniform(1.0, self.max_ratio)
        width, height = int(view.width * ratio), int(view.height * ratio)
        left = view.left - int((width - view.width) * rng.random())
        top = view.top - int((height - view.height) * rng.random())
        return replace(view, left=left, top=top, width=width, height=height), boxes, labels


@dataclass(frozen=True)
class RandomIoUCrop:
    """Makes objects larger: crops the view so that some object overlaps the crop with a random minimum IoU.

    Keeps the boxes whose centre lies in the crop. Each option is tried ``trials`` times before another is drawn; the
    option 1.0 keeps the view whole.
    """

    min_ious: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    min_scale: float = 0.3
    max_aspect_ratio: float = 2.0
    trials: int = 40

    def __call__(self, view: View, boxes: ndarray, labels: ndarray, rng: np.random.Generator):
        while len(boxes) > 0:  # without an object no crop can succeed
            min_iou = self.min_ious[rng.integers(len(self.min_ious))]
            if min_iou >= 1.0:
                break
            crops = self.draw_crops(view, rng)
            has_center, iou = overlaps(crops, boxes)
            fits = (np.where(has_center, iou, -1.0).max(axis=1) >= min_iou) & self.is_valid(crops)
            if fits.any():
                first = fits.argmax()
                return view.cropped(crops[first]), boxes[has_center[first]], labels[has_center[first]]
        return view, boxes, labels

    def draw_crops(self, view: View, rng: np.random.Generator) -> ndarray:
        """One crop per trial: int64 [trials, 4], xyxy."""
        share = rng.uniform(self.min_scale, 1.0, (self.trials, 2))
        size = (np.array([view.width, view.height]) * share).astype(np.int64)
        return place_anywhere(size, view, rng)

    def is_valid(self, crops: ndarray) -> ndarray:
        """Which crops [N, 4] have an area and an allowed aspect ratio: bool [N]."""
        width, height = (crops[:, 2:] - crops[:, :2]).T
        ratio = self.max_aspect_ratio
        return (width > 0) & (height > 0) & (width <= ratio * height) & (height <= ratio * width)


@dataclass(frozen=True)
class CaffeIoUCrop:
    """Crops as Caffe's batch sampler does, with the settings of its SSD for COCO.

    For each minimum IoU up to ``trials`` crops are drawn, until some object overlaps one so much. One of the crops that
    were found, or the whole view, is taken, all with equal chance; it may contain the centre of no box.
    """

    min_ious: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9, 0.0)
    min_scale: float = 0.3
    max_aspect_ratio: float = 2.0
    trials: int = 50

    def __call__(self, view: View, boxes: ndarray, labels: ndarray, rng: np.random.Generator):
        found = []
        for min_iou in self.min_ious if len(boxes) > 0 else ():
            crops = self.draw_crops(view, rng)
            has_center, iou = overlaps(crops, boxes)
            fits = iou.max(axis=1) >= min_iou
            if fits.any():
                found.append((crops[fits.argmax()], has_center[fits.argmax()]))
        choice = rng.integers(len(found) + 1)
        if choice == len(found):
            return view, boxes, labels
        crop, kept = found[choice]
        return view.cropped(crop), boxes[kept], labels[kept]

    def draw_crops(self, view: View, rng: np.random.Generator) -> ndarray:
        """One crop per trial: int64 [trials, 4], xyxy. Scale and aspect ratio are relative to the view's."""
        scale = rng.uniform(self.min_scale, 1.0, self.trials)
        ratio = rng.uniform(1 / self.max_aspect_ratio, self.max_aspect_ratio, self.trials).clip(scale**2, scale**-2)
        share = np.stack((scale * np.sqrt(ratio), scale / np.sqrt(ratio)), axis=1).clip(max=1.0)
        size = np.maximum(np.array([view.width, view.height]) * share, 1).astype(np.int64)
        return place_anywhere(size, view, rng)


@dataclass(frozen=True)
class RandomHorizontalFlip:
    p: float = 0.5

    def __call__(self, view: View, boxes: ndarray, labels: ndarray, rng: np.random.Generator):
        if rng.random() < self.p:
            view = replace(view, flipped=not view.flipped)
        return view, boxes, labels


def place_anywhere(size: ndarray, view: View, rng: np.random.Generator) -> ndarray:
    """A crop of each ``size``, int64 [N, 2], width and height, at a random place in ``view``: int64 [N, 4], xyxy."""
    offset = ((np.array([view.width, view.height]) - size) * rng.random(size.shape)).astype(np.int64)
    start = offset + np.array([view.left, view.top])
    return np.concatenate((start, start + size), axis=1)


def overlaps(crops: ndarray, boxes: ndarray) -> tuple[ndarray, ndarray]:
    """Of every crop [N, 4] with every box [G, 4]: whether the box's centre lies inside, and the IoU, both [N, G]."""
    left, top, right, bottom = crops.astype(np.float32).T[..., None]  # [N, 1] each
    x1, y1, x2, y2 = boxes.T
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    has_center = (left < x) & (x < right) & (top < y) & (y < bottom)
    width = np.minimum(right, x2) - np.maximum(left, x1)
    height = np.minimum(bottom, y2) - np.maximum(top, y1)
    intersection = np.maximum(width, 0) * np.maximum(height, 0)
    union = (right - left) * (bottom - top) + (x2 - x1) * (y2 - y1) - intersection
    return has_center, intersection / np.maximum(union, 1e-9)


def project_boxes(boxes: ndarray, view: View, size: int) -> ndarray:
    """Boxes of the source image, clipped to ``view`` and in pixels of the network input, whose side is ``size``."""
    x = ((boxes[:, 0::2] - view.left).clip(0, view.width)) * (size / view.width)
    y = ((boxes[:, 1::2] - view.top).clip(0, view.height)) * (size / view.height)
    if view.flipped:
        x = size - x[:, ::-1]
    return np.stack((x[:, 0], y[:, 0], x[:, 1], y[:, 1]), axis=1).astype(np.float32)


@dataclass(frozen=True)
class AxisTaps:
    """The two source pixels along an axis that each output pixel blends; the fields but ``coverage`` hold the covered.

    ``coverage`` is the share of the image in each output pixel; the rest of it is fill.
    """

    first: ndarray  # int64 [covered]
    second: ndarray  # int64 [covered]
    second_weight: ndarray  # float32 [covered], without influence where second is first
    covered: slice  # of the output pixels
    coverage: ndarray  # float32 [size]


def axis_taps(start: int, length: int, image_length: int, size: int, flipped: bool = False) -> AxisTaps:
    """Bilinear taps for ``size`` output pixels over ``length`` source pixels from ``start``.

    Positions are computed in float32 in the order of ``F.interpolate(align_corners=False)``, to agree with it.
    """
    scale = np.float32(length) / np.float32(size)
    position = (scale * (np.arange(size, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)).clip(min=0)
    first = np.minimum(position.astype(np.int64), length - 1)
    second = np.minimum(first + 1, length - 1)
    second_weight = position - first.astype(np.float32)
    first, second = first + start, second + start
    has_first, has_second = ((tap >= 0) & (tap < image_length) for tap in (first, second))
    coverage = np.where(has_first, 1 - second_weight, np.float32(0)) + np.where(has_second, second_weight, 0)
    # where one tap is fill, what is left of the image is the other alone
    first, second = np.where(has_first, first, second), np.where(has_second, second, first)
    taps = first, second, second_weight, coverage
    first, second, second_weight, coverage = (array[::-1].copy() for array in taps) if flipped else taps
    covered = np.flatnonzero(coverage)
    covered = slice(covered[0], covered[-1] + 1) if len(covered) else slice(0)
    return AxisTaps(first[covered], second[covered], second_weight[covered], covered, coverage)


def resample(image: ndarray, view: View, size: int, dtype: type) -> tuple[Tensor, Tensor]:
    """What ``view`` shows of ``image``, as the network input.

    Each operation is exact or rounds each number on its own, so that the result does not depend on how PyTorch splits
    the work: it is the same, bit for bit, in the main process and in a loader worker.

    Args:
        image: uint8 [H, W, 4]. Whole pixels of four bytes are gathered far faster than those of three.
        view: the window on it.
        size: side of the output in pixels.
        dtype: np.uint8, which rounds, or np.float32, which does not.

    Returns:
        pixels: [3, size, size], 0 to 255. Where the view leaves the image they are to be replaced by fill:
        coverage: float32 [2, size], for rows and columns; their product is the image's share of a pixel.
    """
    height, width = image.shape[:2]
    rows = axis_taps(view.top, view.height, height, size)
    columns = axis_taps(view.left, view.width, width, size, view.flipped)
    start, end = (rows.first[0], rows.second[-1] + 1) if len(rows.first) else (0, 0)
    lines = image.view(np.uint32)[start:end, :, 0]
    taps = (torch.from_numpy(lines.take(tap, axis=1).view(np.uint8)).float() for tap in (columns.first, columns.second))
    lines = blend(*taps, torch.from_numpy(columns.second_weight.repeat(4)))
    taps = (lines.index_select(0, torch.from_numpy(tap - start)) for tap in (rows.first, rows.second))
    seen = blend(*taps, torch.from_numpy(rows.second_weight)[:, None]).numpy()
    if dtype == np.uint8:
        seen = seen.round().astype(np.uint8)
    seen = seen.reshape(len(rows.first), len(columns.first), 4)[..., :3]
    pixels = np.zeros((3, size, size), dtype)
    pixels[:, rows.covered, columns.covered] = seen.transpose(2, 0, 1)
    return torch.from_numpy(pixels), torch.from_numpy(np.stack((rows.coverage, columns.coverage)))


def blend(first: Tensor, second: Tensor, second_weight: Tensor) -> Tensor:
    """``first + second_weight * (second - first)``, in the memory of ``second``."""
    return second.sub_(first).mul_(second_weight).add_(first)


def fill_uncovered(images: Tensor, coverage: Tensor) -> Tensor:
    """Blends [B, 3, S, S] with ``FILL`` where ``coverage`` [B, 2, S], of rows and columns, is below 1."""
    share = coverage[:, 0, None, :, None] * coverage[:, 1, None, None, :]  # [B, 1, S, S]
    fill = channel_constants(FILL, images.device)
    return fill + share * (images - fill)


def channel_constants(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """float32 [3, 1, 1], filled on the device: for a copy from the host's memory the host would have to wait."""
    return torch.cat([torch.full((1, 1, 1), float(value), device=device) for value in values])


@dataclass(frozen=True)
class RandomPhotometricDistort:
    """Random brightness, contrast, saturation, hue and channel order, each with probability ``p``.

    Contrast comes first or last with equal chance. Constants and order are torchvision's.
    """

    # least, without effect, most
    RANGES: ClassVar = {
        "brightness": (0.875, 1.0, 1.125),
        "contrast": (0.5, 1.0, 1.5),
        "saturation": (0.5, 1.0, 1.5),
        "hue": (-0.05, 0.0, 0.05),
    }
    # how many numbers ``draw`` has for each name
    WIDTHS: ClassVar = dict.fromkeys((*FACTORS, "grey_mean"), 1) | {"channels": 3}
    p: float = 0.5

    def draw(self, image: ndarray, rng: np.random.Generator) -> dict[str, ndarray]:
        """Parameters for the uint8 image [H, W, 4]; its pixels are needed for the grey that contrast pivots on."""
        factors = draw_factors(self.RANGES, self.p, rng)
        channels = rng.permutation(3) if rng.random() < self.p else np.arange(3)
        has_contrast = factors["contrast_before"] != 1.0 or factors["contrast_after"] != 1.0
        factors["grey_mean"] = grey_mean(image, factors) if has_contrast else 0.0
        return {name: np.float32(value) for name, value in factors.items()} | {"channels": channels}

    @staticmethod
    def distort(images: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Distorts each image of [B, 3, H, W] (0 to 255) with its own ``parameters``: [B, 1] each, channels [B, 3].

        Channels may be float, as all that is drawn travels in one tensor.
        """
        factor = {name: value.view(-1, 1, 1, 1) for name, value in parameters.items() if name != "channels"}
        images = adjust_brightness(images, factor["brightness"])
        images = mix(images, factor["grey_mean"], factor["contrast_before"])
        images = mix(images, to_grey(images), factor["saturation"])
        images = shift_hue(images, factor["hue"])
        images = mix(images, factor["grey_mean"], factor["contrast_after"])
        batch = torch.arange(len(images), device=images.device)
        return images[batch[:, None], parameters["channels"].long()]


@dataclass(frozen=True)
class CaffePhotometricDistort:
    """Random brightness, contrast, saturation and hue as in Caffe's SSD, each with probability ``p``.

    Brightness is added, contrast multiplies without a pivot, saturation is that of the HSV model, hue turns by up to 36
    degrees, and channels keep their order. Contrast comes before saturation or last with equal chance. What Caffe loses
    in bytes is left out: rounding, and hues that stop at red instead of turning past it.
    """

    RANGES: ClassVar = RandomPhotometricDistort.RANGES | {"brightness": (-32.0, 0.0, 32.0), "hue": (-0.1, 0.0, 0.1)}
    WIDTHS: ClassVar = dict.fromkeys(FACTORS, 1)
    p: float = 0.5

    def draw(self, image: ndarray, rng: np.random.Generator) -> dict[str, ndarray]:
        """Parameters for an image, whatever it shows."""
        factors = draw_factors(self.RANGES, self.p, rng)
        return {name: np.float32(value) for name, value in factors.items()}

    @staticmethod
    def distort(images: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Distorts each image of [B, 3, H, W] (0 to 255) with its own ``parameters``, [B, 1] each."""
        factor = {name: value.view(-1, 1, 1, 1) for name, value in parameters.items()}
        images = (images + factor["brightness"]).clamp(0, 255)
        images = mix(images, 0, factor["contrast_before"])
        images = scale_saturation(images, factor["saturation"])
        images = shift_hue(images, factor["hue"])
        return mix(images, 0, factor["contrast_after"])


def draw_factors(ranges: dict[str, tuple[float, float, float]], p: float, rng: np.random.Generator) -> dict[str, float]:
    """A value of each range with probability ``p``, else the one without effect; contrast comes before or after."""
    factors = {
        name: rng.uniform(least, most) if rng.random() < p else without_effect
        for name, (least, without_effect, most) in ranges.items()
    }
    contrast = factors.pop("contrast"), 1.0
    factors["contrast_before"], factors["contrast_after"] = contrast if rng.random() < 0.5 else contrast[::-1]
    return factors


def adjust_brightness(images: Tensor, factor: Tensor | float) -> Tensor:
    return (images * factor).clamp(0, 255)


def mix(images: Tensor, other: Tensor | float, factor: Tensor | float) -> Tensor:
    """Moves ``images`` away from ``other`` (factor > 1) or towards it (factor < 1)."""
    return (other + factor * (images - other)).clamp(0, 255)


def to_grey(images: Tensor) -> Tensor:
    """Luma of ITU-R 601, as torchvision and Pillow compute it: [B, 1, H, W]."""
    red, green, blue = images.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


def value_and_chroma(images: Tensor) -> tuple[Tensor, Tensor]:
    """Of the HSV model: [B, 1, H, W] each."""
    value = images.amax(1, keepdim=True)
    return value, value - images.amin(1, keepdim=True)


def scale_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Multiplies the saturation of the HSV model by ``factor`` [B, 1, 1, 1], up to the full one."""
    value, chroma = value_and_chroma(images)
    full = value / torch.where(chroma > 0, chroma, 1)
    return mix(images, value, torch.minimum(factor, full))


def shift_hue(images: Tensor, shift: Tensor | float) -> Tensor:
    """Turns the hue by ``shift`` full turns, at the same saturation and value of the HSV model."""
    red, green, blue = images.unbind(1)
    value, chroma = value_and_chroma(images)
    divisor = torch.where(chroma > 0, chroma, 1).squeeze(1)
    # by comparisons alone: a compiler may compute the greatest value a second time, and round it in another way
    hue = torch.where(
        (red >= green) & (red >= blue),
        (green - blue) / divisor,
        torch.where(green >= blue, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    ).unsqueeze(1)  # in sixths of a turn
    distance = (hue + 6 * shift + channel_constants((5, 3, 1), images.device)) % 6  # [B, 3, H, W]
    return value - chroma * torch.minimum(distance, 4 - distance).clamp(0, 1)


def grey_mean(image: ndarray, factors: dict[str, float]) -> float:
    """Mean grey of the whole source image [H, W, 4] at the moment when contrast is applied.

    Every n-th pixel suffices for a mean, if these are spread over all columns. So few also keep PyTorch from splitting
    the work among threads, so that the result is the same, bit for bit, in the main process and in a loader worker.
    """
    pixels = image.reshape(-1, 4)
    stride = -(-len(pixels) // MAX_PIXELS_FOR_GREY_MEAN)
    while math.gcd(stride, image.shape[1]) > 1:
        stride += 1
    sampled = np.ascontiguousarray(pixels[stride // 2 :: stride].T[:3], dtype=np.float32)
    pixels = torch.from_numpy(sampled)[None, :, None]  # [1, 3, 1, pixels]
    pixels = adjust_brightness(pixels, factors["brightness"])
    if factors["contrast_after"] != 1.0 and factors["saturation"] != 1.0:
        pixels = mix(pixels, to_grey(pixels), factors["saturation"])
    if factors["contrast_after"] != 1.0 and factors["hue"] != 0.0:
        pixels = shift_hue(pixels, factors["hue"])
    return float(to_grey(pixels).numpy().mean())
