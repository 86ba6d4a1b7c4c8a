"""Photometric distortion: what augmentation does to colours.

``draw`` makes the parameters of one image in a loader worker, ``distort`` applies those of a batch, on whichever device
the batch is. Images are float, 0 to 255, unless a docstring says otherwise.
"""

import math

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

import transforms

MAX_PIXELS_FOR_GREY_MEAN = 10_000
FACTORS = ("brightness", "contrast_before", "contrast_after", "saturation", "hue")  # as ``draw_factors`` names them


class RandomPhotometricDistort:
    """Random brightness, contrast, saturation, hue and channel order, each with probability ``p``.

    Contrast comes first or last with equal chance. Constants and order are torchvision's.
    """

    WIDTHS = dict.fromkeys((*FACTORS, "grey_mean"), 1) | {"channels": 3}  # how many numbers ``draw`` has for each name

    def __init__(
        self,
        brightness: tuple[float, float] = (0.875, 1.125),
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: tuple[float, float] = (-0.05, 0.05),
        p: float = 0.5,
    ):
        self.ranges = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
        self.neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
        self.p = p

    def draw(self, image: ndarray, rng: np.random.Generator) -> dict[str, ndarray]:
        """Parameters for the uint8 image [H, W, 4]; its pixels are needed for the grey that contrast pivots on."""
        factors = draw_factors(self.ranges, self.neutral, self.p, rng)
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


class CaffePhotometricDistort:
    """Random brightness, contrast, saturation and hue as in Caffe's SSD, each with probability ``p``.

    Brightness is added, contrast multiplies without a pivot, saturation is that of the HSV model, hue turns by up to 36
    degrees, and channels keep their order. Contrast comes before saturation or last with equal chance. What Caffe loses
    in bytes is left out: rounding, and hues that stop at red instead of turning past it.
    """

    WIDTHS = dict.fromkeys(FACTORS, 1)

    def __init__(
        self,
        brightness: tuple[float, float] = (-32.0, 32.0),
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: tuple[float, float] = (-0.1, 0.1),
        p: float = 0.5,
    ):
        self.ranges = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
        self.neutral = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
        self.p = p

    def draw(self, image: ndarray, rng: np.random.Generator) -> dict[str, ndarray]:
        """Parameters for an image, whatever it shows."""
        factors = draw_factors(self.ranges, self.neutral, self.p, rng)
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


def draw_factors(
    ranges: dict[str, tuple[float, float]], neutral: dict[str, float], p: float, rng: np.random.Generator
) -> dict[str, float]:
    """A value of each range with probability ``p``, else the neutral one; contrast is one of two, before or after."""
    factors = {name: rng.uniform(*limits) if rng.random() < p else neutral[name] for name, limits in ranges.items()}
    contrast, contrast_first = factors.pop("contrast"), rng.random() < 0.5
    factors["contrast_before"] = contrast if contrast_first else neutral["contrast"]
    factors["contrast_after"] = neutral["contrast"] if contrast_first else contrast
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
    distance = (hue + 6 * shift + transforms.channel_constants((5, 3, 1), images.device)) % 6  # [B, 3, H, W]
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
