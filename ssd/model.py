"""SSD: the detector, its loss and its post-processing (paper sections 2 and 3).

Dimension key: B images, A default boxes, G ground-truth slots, C classes including the background (class 0).
Boxes are xyxy in pixels of the network input unless a comment says otherwise.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .boxes import BoxCoder, pairwise_iou
from .default_boxes import DefaultBoxGenerator, guess_default_boxes
from .head import SSDHead
from .matcher import SSDMatcher
from .postprocess import find_detections, resize_boxes

# mean and standard deviation per RGB channel, for values of 0 to 1
INPUT_SCALINGS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # only the mean is subtracted, and values stay in 0..255
    "caffe": ((0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255)),
    # -1 to 1
    "tensorflow": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class SSD(nn.Module):
    """Single Shot MultiBox Detector for square images.

    ``forward`` gives raw predictions; ``compute_loss`` and ``postprocess_detections`` turn them into what training and
    inference want. The state dict has the keys and shapes of ``torchvision.models.detection.ssd.SSD``.

    Args:
        backbone: ``forward(images) -> list[Tensor]`` and ``out_channels``, see ``ssd/backbones.py``.
        anchor_generator: the default boxes; None for those of ``guess_default_boxes``.
        size: side of the network input in pixels.
        num_classes: number of classes, background included.
        head: ``head(feature_maps)`` gives what ``forward`` does, made by ``head(out_channels, num_anchors,
            num_classes)``; the numbers of channels and of default boxes per cell are those of each feature map.
        input_scaling: how images are normalised, a key of ``INPUT_SCALINGS``.
        score_thresh: detections with lower scores are dropped.
        nms_thresh: IoU over which the lower scored of two detections of one class is suppressed.
        detections_per_img: best detections kept per image.
        iou_thresh: IoU from which a default box matches an object.
        topk_candidates: best detections per class that enter the suppression.
        positive_fraction: share of positives in the classification loss; 0.25 gives the paper's 3:1 hard negatives.
    """

    def __init__(
        self,
        backbone: nn.Module,
        anchor_generator: DefaultBoxGenerator | None,
        size: int,
        num_classes: int,
        *,
        head: Callable[[list[int], list[int], int], nn.Module] = SSDHead,
        input_scaling: str = "imagenet",
        score_thresh: float = 0.01,
        nms_thresh: float = 0.45,
        detections_per_img: int = 200,
        iou_thresh: float = 0.5,
        topk_candidates: int = 400,
        positive_fraction: float = 0.25,
    ):
        super().__init__()
        grids = grid_sizes(backbone, size)
        anchor_generator = anchor_generator or guess_default_boxes(grids)
        self.backbone = backbone
        per_cell = anchor_generator.num_anchors_per_location()
        self.boxes_per_map = [rows * columns * n for (rows, columns), n in zip(grids, per_cell, strict=True)]
        self.head = head(backbone.out_channels, per_cell, num_classes)
        self.matcher = SSDMatcher(iou_thresh)
        self.box_coder = BoxCoder()
        self.size = size
        self.num_classes = num_classes
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.detections_per_img = detections_per_img
        self.topk_candidates = topk_candidates
        self.neg_to_pos_ratio = (1 - positive_fraction) / positive_fraction
        self.initialised_anew: list[str] | None = None  # what did not fit the weights that were loaded, if any were
        self.notes: list[str] = []  # what a user should know of them, a line each
        self.default_boxes_name = "default"  # or that of Caffe's
        # Constants of the architecture, not weights: kept out of the state dict.
        self.register_buffer("default_boxes", anchor_generator((size, size), grids), persistent=False)  # [A, 4]
        self.input_scaling = input_scaling
        for name, value in zip(("image_mean", "image_std"), INPUT_SCALINGS[input_scaling], strict=True):
            self.register_buffer(name, 255 * torch.tensor(value).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "SSD":
        """As in PyTorch, but batch norm whose weight is frozen keeps its statistics too."""
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)) and not layer.weight.requires_grad:
                layer.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """
        Args:
            images: [B, 3, size, size], RGB with values of 0 to 255, uint8 or float.

        Returns:
            ``cls_logits`` [B, A, C] and ``bbox_regression`` [B, A, 4] (offsets from the default boxes).
        """
        normalized = (images.float() - self.image_mean) / self.image_std
        return self.head(self.backbone(normalized))

    def match(self, boxes: Tensor, is_object: Tensor) -> Tensor:
        """The ground-truth slot of each default box, int64 [B, A], see ``SSDMatcher``."""
        boxes = boxes.masked_fill(~is_object[..., None], 0)  # which overlap with nothing
        # The cache of a CPU holds the IoUs of one image, not those of a batch; a GPU prefers few and large operations,
        # a compiler few of any size.
        one_by_one = boxes.device.type == "cpu" and not torch.compiler.is_compiling()
        images_at_a_time = 1 if one_by_one else len(boxes)
        parts = zip(boxes.split(images_at_a_time), is_object.split(images_at_a_time), strict=True)
        return torch.cat([self.matcher(pairwise_iou(part, self.default_boxes), mask) for part, mask in parts])

    def compute_loss(self, outputs: dict[str, Tensor], boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The MultiBox loss (paper equation 1 with alpha = 1), in float32 and without data-dependent shapes.

        Both terms are divided by the positives of the whole batch, so an image without boxes adds nothing.

        Args:
            outputs: what ``forward`` returned.
            boxes: float [B, G, 4], padded. Boxes must have positive width and height.
            labels: int64 [B, G], 1 to C - 1; 0 marks an empty slot.

        Returns:
            The scalars ``bbox_regression`` and ``classification``; their sum is the training loss.
        """
        sums = self.sum_losses(outputs, boxes, labels)
        normalizer = sums.pop("positives").sum().clamp(min=1)
        return {name: per_image.sum() / normalizer for name, per_image in sums.items()}

    def sum_losses(self, outputs: dict[str, Tensor], boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The terms of ``compute_loss`` before the division, and ``positives``, what to divide by: each [B]."""
        if boxes.shape[1] == 0:
            boxes, labels = F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1))
        matches = self.match(boxes, labels > 0)  # [B, A]
        positive = matches >= 0
        num_positives = positive.sum(dim=1, keepdim=True)  # [B, 1]
        slots = matches.clamp(min=0)

        # a default box without object is coded relative to itself, which keeps the logarithms finite
        matched_boxes = boxes.gather(1, slots[..., None].expand(-1, -1, 4))
        matched_boxes = torch.where(positive[..., None], matched_boxes, self.default_boxes)
        target_offsets = self.box_coder.encode(matched_boxes, self.default_boxes)  # [B, A, 4]
        box_loss = F.smooth_l1_loss(outputs["bbox_regression"].float(), target_offsets, reduction="none")
        box_loss = torch.where(positive[..., None], box_loss, 0)

        class_targets = torch.where(positive, labels.gather(1, slots), 0)  # [B, A]
        logits = outputs["cls_logits"].float()
        class_loss = F.cross_entropy(logits.flatten(0, 1), class_targets.flatten(), reduction="none")
        class_loss = class_loss.view_as(class_targets)
        # Hard negative mining (paper section 2.2): of the negatives, only those with the highest loss count.
        negative_loss = class_loss.masked_fill(positive, 0).sort(dim=1, descending=True).values
        is_hard = torch.arange(len(self.default_boxes), device=boxes.device) < self.neg_to_pos_ratio * num_positives
        counted = torch.where(positive, class_loss, 0), torch.where(is_hard, negative_loss, 0)
        return {
            "bbox_regression": box_loss.sum(dim=(1, 2)),
            "classification": sum(losses.sum(dim=1) for losses in counted),
            "positives": num_positives.squeeze(1),
        }

    @property
    def device(self) -> torch.device:
        return self.default_boxes.device

    @property
    def thresholds(self) -> dict[str, float]:
        """What decides which predictions become detections: the keyword arguments of ``find_detections``."""
        names = ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates")
        return {name: getattr(self, name) for name in names}

    def postprocess_detections(self, outputs: dict[str, Tensor], sizes: Tensor) -> list[dict[str, Tensor]]:
        """Scores, decodes and suppresses.

        Args:
            outputs: what ``forward`` returned.
            sizes: [B, 2], height and width of the original images in pixels.

        Returns:
            Per image ``boxes`` [N, 4] (xyxy, pixels of the original image), ``scores`` [N] and ``labels`` [N], best
            first, N <= ``detections_per_img``.

        Raises:
            NotFiniteError: a prediction is nan or infinite.
        """
        found = find_detections(outputs, self.default_boxes, self.size, **self.thresholds)
        return resize_boxes(found, self.size, sizes)


@torch.no_grad()
def grid_sizes(backbone: nn.Module, size: int) -> list[tuple[int, int]]:
    """Rows and columns of each feature map, found by running the backbone once."""
    training = backbone.training
    feature_maps = backbone.eval()(torch.zeros(1, 3, size, size))
    backbone.train(training)
    return [tuple(feature_map.shape[-2:]) for feature_map in feature_maps]
