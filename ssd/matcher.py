"""Matching of default boxes with ground truth (paper section 2.2, "Matching strategy").

Dimension key: B images, A default boxes, G ground-truth slots.
"""

import torch
from torch import Tensor

UNMATCHED = -1


class SSDMatcher:
    """Matches each default box with the object it overlaps most, if their IoU reaches the threshold.

    So that no object goes without a default box, each object then takes the default box that overlaps it most. Where
    several objects want the same one, the last in order wins, as in torchvision, here on every device alike.
    """

    def __init__(self, iou_threshold: float = 0.5):
        if not 0 < iou_threshold <= 1:
            raise ValueError(f"the IoU threshold of matching must be over 0 and at most 1, got {iou_threshold}")
        self.iou_threshold = iou_threshold

    def __call__(self, iou: Tensor, is_object: Tensor) -> Tensor:
        """
        Args:
            iou: [B, G, A], G >= 1; 0 for the empty slots of the padding.
            is_object: bool [B, G], False for those.

        Returns:
            int64 [B, A]: the ground-truth slot of each default box, or ``UNMATCHED``.
        """
        best_iou, best_slot = iou.max(dim=1)  # [B, A]
        matches = best_slot.masked_fill(best_iou < self.iou_threshold, UNMATCHED)

        num_slots, num_default_boxes = iou.shape[1:]
        best_default_box = iou.argmax(dim=2)  # [B, G]
        wants_same = best_default_box[:, :, None] == best_default_box[:, None, :]  # [B, G, G]
        is_later = torch.ones(num_slots, num_slots, dtype=torch.bool, device=iou.device).triu(diagonal=1)
        yields = (wants_same & is_later & is_object[:, None, :]).any(dim=2) | ~is_object
        # slots that yield write to a column beside the others, so that no two write to the same
        column = best_default_box.masked_fill(yields, num_default_boxes)
        slots = torch.arange(num_slots, device=iou.device).expand_as(column)
        forced = torch.full((len(iou), num_default_boxes + 1), UNMATCHED, device=iou.device).scatter(1, column, slots)
        return torch.where(forced[:, :-1] == UNMATCHED, matches, forced[:, :-1])
