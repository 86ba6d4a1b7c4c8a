import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder as TorchvisionBoxCoder
from torchvision.ops import box_iou

from ssd import BoxCoder, pairwise_iou


def random_boxes(*shape: int) -> torch.Tensor:
    start = torch.rand(*shape, 2) * 250
    return torch.cat((start, start + 1 + torch.rand(*shape, 2) * 50), dim=-1)


def test_iou_by_hand():
    iou = pairwise_iou(
        torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10]])
    )
    assert iou.tolist() == [pytest.approx([1, 50 / 150, 0])]


def test_iou_equals_torchvision_for_each_image_of_a_batch():
    boxes, default_boxes = random_boxes(3, 7), random_boxes(40)
    expected = torch.stack([box_iou(image_boxes, default_boxes) for image_boxes in boxes])
    assert torch.equal(pairwise_iou(boxes, default_boxes), expected)


def test_iou_of_boxes_without_area_is_zero():
    assert pairwise_iou(torch.zeros(1, 4), torch.zeros(2, 4)).tolist() == [[0, 0]]


def test_encode_and_decode_are_inverse():
    boxes, default_boxes = random_boxes(2, 50), random_boxes(50)
    coder = BoxCoder()
    torch.testing.assert_close(
        coder.decode(coder.encode(boxes, default_boxes), default_boxes), boxes, rtol=0, atol=1e-3
    )


def test_a_box_is_no_offset_from_itself():
    boxes = random_boxes(5)
    assert BoxCoder().encode(boxes, boxes).abs().max() == 0


def test_equal_to_torchvision():
    boxes, default_boxes, offsets = (x.double() for x in (random_boxes(30), random_boxes(30), torch.randn(30, 4)))
    theirs = TorchvisionBoxCoder((10.0, 10.0, 5.0, 5.0))
    torch.testing.assert_close(BoxCoder().encode(boxes, default_boxes), theirs.encode_single(boxes, default_boxes))
    torch.testing.assert_close(BoxCoder().decode(offsets, default_boxes), theirs.decode_single(offsets, default_boxes))


def test_huge_offsets_decode_to_finite_boxes():
    box = BoxCoder().decode(torch.tensor([[0.0, 0, 1e6, 1e6]]), torch.tensor([[0.0, 0, 16, 16]]))
    assert box.isfinite().all()
    assert box[0, 2] - box[0, 0] == pytest.approx(16 * math.exp(math.log(1000 / 16)))
