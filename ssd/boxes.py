"""Box algebra: IoU and the coding of boxes relative to default boxes.

Dimension key: B images, A default boxes, G ground-truth slots. Boxes are xyxy in pixels of the network input.
"""

import math

import torch
from torch import Tensor


def box_area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


@torch.no_grad()
def pairwise_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every box of ``boxes1`` [..., N, 4] with every box of ``boxes2`` [..., M, 4].

    Boxes are float. Leading dimensions broadcast, so a padded batch needs no loop. Returns [..., N, M], which takes no
    gradients; a pair without any area gives 0.
    """
    # The time goes into passes over [..., N, M]: few of them, in place, along coordinates that lie side by side.
    x1, y1, x2, y2 = boxes1[..., None].unbind(-2)  # [..., N, 1]
    other_x1, other_y1, other_x2, other_y2 = boxes2.mT.contiguous()[..., None, :].unbind(-3)  # [..., 1, M]
    width = torch.minimum(x2, other_x2).sub_(torch.maximum(x1, other_x1)).clamp_(min=0)
    height = torch.minimum(y2, other_y2).sub_(torch.maximum(y1, other_y1)).clamp_(min=0)
    intersection = width.mul_(height)
    union = (box_area(boxes1)[..., :, None] + box_area(boxes2)[..., None, :]).sub_(intersection)
    return intersection.div_(union.clamp_(min=torch.finfo(union.dtype).tiny))


class BoxCoder:
    """Codes boxes as offsets from default boxes (paper equation 2).

    ``weights`` are the inverse of Caffe's prior variances (0.1, 0.1, 0.2, 0.2), for x, y, width and height. Widths and
    heights decode to at most 1000/16 of the default box, as in torchvision, so that exp() cannot overflow.
    """

    def __init__(self, weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)):
        self.weights = weights
        self.max_log_scale = math.log(1000 / 16)

    def encode(self, boxes: Tensor, default_boxes: Tensor) -> Tensor:
        """Offsets [..., 4] that lead from ``default_boxes`` to ``boxes``, both [..., 4] and of positive area."""
        x, y, width, height = split_center_size(boxes)
        default_x, default_y, default_width, default_height = split_center_size(default_boxes)
        weight_x, weight_y, weight_width, weight_height = self.weights
        return torch.stack(
            (
                weight_x * (x - default_x) / default_width,
                weight_y * (y - default_y) / default_height,
                weight_width * torch.log(width / default_width),
                weight_height * torch.log(height / default_height),
            ),
            dim=-1,
        )

    def decode(self, offsets: Tensor, default_boxes: Tensor) -> Tensor:
        """The boxes [..., 4] that ``offsets`` [..., 4] describe: the inverse of ``encode``."""
        default_x, default_y, default_width, default_height = split_center_size(default_boxes)
        dx, dy, log_width, log_height = (offsets / offsets.new_tensor(self.weights)).unbind(-1)
        x = dx * default_width + default_x
        y = dy * default_height + default_y
        half_width = 0.5 * default_width * torch.exp(log_width.clamp(max=self.max_log_scale))
        half_height = 0.5 * default_height * torch.exp(log_height.clamp(max=self.max_log_scale))
        return torch.stack((x - half_width, y - half_height, x + half_width, y + half_height), dim=-1)


def split_center_size(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x, centre y, width and height, each [...], of ``boxes`` xyxy [..., 4]."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height
