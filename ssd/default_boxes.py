"""Default boxes (paper section 2.2): the fixed boxes that every prediction is relative to.

Dimension key: A default boxes.
"""

import math

import torch
from torch import Tensor


class DefaultBoxGenerator:
    """Lays default boxes of several scales and aspect ratios on every cell of every feature map.

    Per cell and feature map k, in this order: a square of scale s_k, a square of scale sqrt(s_k * s_{k+1}), and for
    each aspect ratio r a box (s_k * sqrt(r), s_k / sqrt(r)) and its transpose. Same order and arguments as
    torchvision's generator of this name.

    Args:
        aspect_ratios: for each feature map, the aspect ratios beside 1 (each also used upside down).
        min_ratio, max_ratio: scales of the first and the last feature map as fractions of the image side; the scales
            between are spaced evenly (paper section 2.2). Used only where ``scales`` is not given.
        scales: one scale per feature map and one more for the last map's larger square, as fractions of the image side.
        steps: distance in pixels between the centres of neighbouring cells, per feature map. Without it the cells
            divide the image evenly.
        clip: limit widths and heights (not corners) to the image.

    Raises:
        ValueError: the lengths of ``scales`` or ``steps`` do not fit ``aspect_ratios``.
    """

    def __init__(
        self,
        aspect_ratios: list[list[float]],
        min_ratio: float = 0.15,
        max_ratio: float = 0.9,
        scales: list[float] | None = None,
        steps: list[int] | None = None,
        clip: bool = True,
    ):
        num_maps = len(aspect_ratios)
        if scales is None:
            scales = evenly_spaced_scales(num_maps, min_ratio, max_ratio)
        if len(scales) != num_maps + 1:
            raise ValueError(f"scales must have {num_maps + 1} values (feature maps + 1), got {len(scales)}")
        if steps is not None and len(steps) != num_maps:
            raise ValueError(f"steps must have {num_maps} values (one per feature map), got {len(steps)}")
        self.aspect_ratios = aspect_ratios
        self.scales = scales
        self.steps = steps
        self.clip = clip

    def num_anchors_per_location(self) -> list[int]:
        """Default boxes per cell, for each feature map."""
        return [2 + 2 * len(ratios) for ratios in self.aspect_ratios]

    def box_sizes(self, k: int) -> Tensor:
        """Widths and heights of the boxes of one cell of feature map ``k``, as fractions of the image: [boxes, 2]."""
        scale, next_scale = self.scales[k], self.scales[k + 1]
        sizes = [(scale, scale), (math.sqrt(scale * next_scale),) * 2]
        for ratio in self.aspect_ratios[k]:
            width, height = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
            sizes += [(width, height), (height, width)]
        sizes = torch.tensor(sizes)
        return sizes.clamp(0, 1) if self.clip else sizes

    def __call__(self, image_size: tuple[int, int], grid_sizes: list[tuple[int, int]]) -> Tensor:
        """All default boxes, largest feature map first, row by row.

        Args:
            image_size: height and width of the network input in pixels.
            grid_sizes: height and width of each feature map in cells.

        Returns:
            float32 [A, 4], xyxy in pixels. Corners may lie outside the image.
        """
        if len(grid_sizes) != len(self.aspect_ratios):
            raise ValueError(f"got {len(grid_sizes)} feature maps but aspect ratios for {len(self.aspect_ratios)}")
        height, width = image_size
        boxes = []
        for k, (rows, columns) in enumerate(grid_sizes):
            rows_per_image, columns_per_image = rows, columns
            if self.steps is not None:
                rows_per_image, columns_per_image = height / self.steps[k], width / self.steps[k]
            center_y = (torch.arange(rows) + 0.5) / rows_per_image
            center_x = (torch.arange(columns) + 0.5) / columns_per_image
            centers = torch.stack(torch.meshgrid(center_y, center_x, indexing="ij")[::-1], dim=-1)
            centers = centers.view(-1, 1, 2)  # [cells, 1, 2]
            half_sizes = 0.5 * self.box_sizes(k)  # [boxes, 2]
            boxes.append(torch.cat((centers - half_sizes, centers + half_sizes), dim=-1).view(-1, 4))
        return torch.cat(boxes) * torch.tensor([width, height, width, height])


def evenly_spaced_scales(num_maps: int, min_ratio: float, max_ratio: float) -> list[float]:
    """Equation 4 of the paper, with the image itself as the scale after the last."""
    if num_maps == 1:
        return [min_ratio, max_ratio]
    step = (max_ratio - min_ratio) / (num_maps - 1)
    return [min_ratio + step * k for k in range(num_maps)] + [1.0]


def guess_default_boxes(grid_sizes: list[tuple[int, int]]) -> DefaultBoxGenerator:
    """Default boxes for any backbone, by the rule that Caffe's models for COCO follow, to within a tenth.

    The scale of the first map is 2.6 of its cells, of the second 3; from there on scales are spaced evenly up to 0.9.
    Equation 4 of the paper begins at 0.15 or more, where most small objects match nothing
    (``benchmarks/default_boxes.py``). The largest map, for its number of cells, and the two smallest, which have few
    proportions to tell apart, do without the aspect ratio 3.

    Args:
        grid_sizes: rows and columns of each feature map, largest first.
    """
    num_maps = len(grid_sizes)
    largest = 0.9
    scales = [min(cells / max(grid), largest) for cells, grid in zip((2.6, 3.0), grid_sizes, strict=False)]
    step = (largest - scales[-1]) / max(num_maps - 2, 1)
    scales += [scales[-1] + step * k for k in range(1, num_maps + 2 - len(scales))]
    ratios = [[2], *([2, 3] for _ in range(num_maps - 3)), [2], [2]] if num_maps > 3 else [[2, 3]] * num_maps
    return DefaultBoxGenerator(ratios, scales=scales)


def caffe_default_boxes(size: int, scales: list[float]) -> DefaultBoxGenerator:
    """Those of Caffe's models for an input of 300 or 512 pixels, with sides limited to the image, as in torchvision."""
    steps = [8, 16, 32, 64, 100, 300] if size == 300 else [8, 16, 32, 64, 128, 256, 512]
    return DefaultBoxGenerator([[2], *[[2, 3]] * (len(steps) - 3), [2], [2]], scales=scales, steps=steps)


# By the data set that Caffe's models are for, and by input size. The smallest are smaller than equation 4 of the paper
# has them.
CAFFE_DEFAULT_BOXES = {
    "coco": {
        300: caffe_default_boxes(300, [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]),
        512: caffe_default_boxes(512, [0.04, 0.1, 0.26, 0.42, 0.58, 0.74, 0.9, 1.06]),
    },
    "voc": {
        300: caffe_default_boxes(300, [0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05]),
        512: caffe_default_boxes(512, [0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05]),
    },
}
