import pytest
import torch
from torchvision.models.detection._utils import SSDMatcher as TorchvisionMatcher

from ssd import SSDMatcher
from ssd.matcher import UNMATCHED


def test_threshold_and_forced_match():
    iou = torch.tensor([[[0.6, 0.4, 0.0, 0.5], [0.0, 0.3, 0.1, 0.0]]])  # two objects, four default boxes
    matches = SSDMatcher(0.5)(iou, torch.tensor([[True, True]]))
    assert matches.tolist() == [[0, 1, UNMATCHED, 0]]


def test_the_last_of_two_objects_takes_a_shared_best_box():
    iou = torch.tensor([[[0.1, 0.9], [0.1, 0.8]]])
    assert SSDMatcher(0.5)(iou, torch.tensor([[True, True]])).tolist() == [[UNMATCHED, 1]]


def test_empty_slots_match_nothing():
    is_object = torch.tensor([[False, True, False], [False, False, False]])
    iou = torch.rand(2, 3, 9) * is_object[..., None]
    iou[0, 1, 4] = 1
    matches = SSDMatcher(0.5)(iou, is_object)
    assert set(matches[0].tolist()) == {1, UNMATCHED}
    assert (matches[1] == UNMATCHED).all()


def test_equal_to_torchvision_with_shared_boxes_and_ties():
    generator = torch.Generator().manual_seed(0)
    shared = 0
    for _ in range(300):
        num_objects = int(torch.randint(1, 12, (1,), generator=generator))
        # few distinct values and few default boxes, so that ties and shared best boxes are common
        iou = torch.randint(0, 6, (num_objects, 10), generator=generator) / 6
        shared += len(iou.argmax(dim=1).unique()) < num_objects
        padded = torch.cat((iou, torch.zeros(2, 10)))[None]
        is_object = torch.arange(num_objects + 2)[None] < num_objects
        assert torch.equal(SSDMatcher(0.5)(padded, is_object)[0], TorchvisionMatcher(0.5)(iou))
    assert shared > 100


@pytest.mark.parametrize("threshold", [0, -0.5, 1.5])
def test_a_threshold_that_every_or_no_box_reaches_is_an_error(threshold):
    with pytest.raises(ValueError, match="over 0 and at most 1"):
        SSDMatcher(threshold)
