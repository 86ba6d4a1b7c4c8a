"""SSD: the detector, its loss and its post-processing (paper sections 2 and 3), and the builders of whole models.

Dimension key: B images, A default boxes, G ground-truth slots, C classes including the background (class 0).
Boxes are xyxy in pixels of the network input unless a comment says otherwise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18, vgg

from .backbones import SSDFeatureExtractorResNet, SSDFeatureExtractorVGG
from .boxes import BoxCoder, pairwise_iou
from .default_boxes import DefaultBoxGenerator
from .head import SSDHead
from .matcher import SSDMatcher
from .postprocess import NotFiniteError, select_candidates, split_by_image, suppress
from .weights import load_state_dict, not_finite

NUM_COCO_CLASSES = 91  # the background and COCO's category ids, which run from 1 to 90 with gaps

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Caffe's convention: only the mean is subtracted, and values stay in 0..255
CAFFE_MEAN, CAFFE_STD = (0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255)


class SSD(nn.Module):
    """Single Shot MultiBox Detector for square images.

    ``forward`` gives raw predictions; ``compute_loss`` and ``postprocess_detections`` turn them into what training and
    inference want. The state dict has the keys and shapes of ``torchvision.models.detection.ssd.SSD``.

    Args:
        backbone: ``forward(images) -> list[Tensor]`` and ``out_channels``, see ``ssd/backbones.py``.
        anchor_generator: the default boxes.
        size: side of the network input in pixels.
        num_classes: number of classes, background included.
        image_mean, image_std: normalisation per RGB channel, for values of 0 to 1 as in torchvision.
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
        anchor_generator: DefaultBoxGenerator,
        size: int,
        num_classes: int,
        *,
        image_mean: tuple[float, float, float] = IMAGENET_MEAN,
        image_std: tuple[float, float, float] = IMAGENET_STD,
        score_thresh: float = 0.01,
        nms_thresh: float = 0.45,
        detections_per_img: int = 200,
        iou_thresh: float = 0.5,
        topk_candidates: int = 400,
        positive_fraction: float = 0.25,
    ):
        super().__init__()
        self.backbone = backbone
        self.head = SSDHead(backbone.out_channels, anchor_generator.num_anchors_per_location(), num_classes)
        self.matcher = SSDMatcher(iou_thresh)
        self.box_coder = BoxCoder()
        self.size = size
        self.num_classes = num_classes
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.detections_per_img = detections_per_img
        self.topk_candidates = topk_candidates
        self.neg_to_pos_ratio = (1 - positive_fraction) / positive_fraction
        # Constants of the architecture, not weights: kept out of the state dict.
        default_boxes = anchor_generator((size, size), grid_sizes(backbone, size))
        self.register_buffer("default_boxes", default_boxes, persistent=False)  # [A, 4]
        for name, value in (("image_mean", image_mean), ("image_std", image_std)):
            self.register_buffer(name, 255 * torch.tensor(value).view(3, 1, 1), persistent=False)

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

    @torch.no_grad()
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
        # far faster than to look at each number: a nan is both extremes
        extremes = [
            extreme(output.flatten(1), dim=1) for output in outputs.values() for extreme in (torch.amin, torch.amax)
        ]
        is_finite = torch.stack(extremes).isfinite().all(dim=0)
        if not is_finite.all():
            raise NotFiniteError((~is_finite).nonzero().flatten().tolist())
        scores = outputs["cls_logits"].float().softmax(dim=-1)[..., 1:]  # [B, A, C - 1]
        boxes = self.box_coder.decode(outputs["bbox_regression"].float(), self.default_boxes).clamp(0, self.size)
        # As in ``match``: one image at a time stays in the cache of a CPU.
        images_at_a_time = 1 if boxes.device.type == "cpu" else len(boxes)
        found = []
        for part in zip(scores.split(images_at_a_time), boxes.split(images_at_a_time), strict=True):
            candidates = select_candidates(*part, self.score_thresh, self.topk_candidates)
            kept = suppress(candidates, self.nms_thresh, self.detections_per_img)
            found += split_by_image(kept, len(part[0]))
        height, width = (sizes.to(boxes) / self.size).unbind(1)
        scale = torch.stack((width, height, width, height), dim=1)  # [B, 4]
        return [
            {"boxes": one.boxes * scale[i], "scores": one.scores, "labels": one.labels + 1}
            for i, one in enumerate(found)
        ]


@torch.no_grad()
def grid_sizes(backbone: nn.Module, size: int) -> list[tuple[int, int]]:
    """Rows and columns of each feature map, found by running the backbone once."""
    training = backbone.training
    feature_maps = backbone.eval()(torch.zeros(1, 3, size, size))
    backbone.train(training)
    return [tuple(feature_map.shape[-2:]) for feature_map in feature_maps]


def ssd300_vgg16(
    *,
    weights: str | None = None,
    num_classes: int | None = None,
    weights_backbone: str | None = "VGG16_Weights.IMAGENET1K_FEATURES",
    trainable_backbone_layers: int | None = None,
    **kwargs,
) -> SSD:
    """SSD300 with VGG16: 8732 default boxes, 25.1 mAP on COCO val2017 with the weights of torchvision.

    Args:
        weights: weights of the whole model: ``SSD300_VGG16_Weights.COCO_V1``, or a file (state dict or checkpoint).
            ``"none"`` means None, here and below.
        num_classes: number of classes, background included. By default as many as ``weights`` have, else 91 (COCO).
        weights_backbone: weights of VGG16: ``VGG16_Weights.IMAGENET1K_FEATURES`` or a file; None for random weights.
            Not read where ``weights`` are given.
        trainable_backbone_layers: how many of the five convolution blocks train, counted from the last. By default 4
            if the backbone is pretrained (conv1 stays frozen, as in the run that made 25.1), else all.
        kwargs: keyword arguments of ``SSD``.

    Raises:
        ValueError: weights that are missing, damaged or of another model.
        TypeError: an unknown keyword argument.
    """
    features = vgg.make_layers(vgg.cfgs["D"])
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    weights, weights_backbone = (None if source == "none" else source for source in (weights, weights_backbone))
    if weights is None and weights_backbone is not None:
        load_vgg_features(features, weights_backbone)
    if trainable_backbone_layers is None:
        trainable_backbone_layers = 5 if weights is None and weights_backbone is None else 4
    backbone = SSDFeatureExtractorVGG(features, trainable_layers=trainable_backbone_layers)
    # Scales and steps of Caffe's COCO model, where the smallest boxes are smaller than equation 4 has them.
    default_boxes = DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
        scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
        steps=[8, 16, 32, 64, 100, 300],
    )
    kwargs = {"image_mean": CAFFE_MEAN, "image_std": CAFFE_STD, **kwargs}
    return build(backbone, default_boxes, 300, weights, num_classes, kwargs)


def ssd300_resnet18(
    *,
    weights: str | None = None,
    num_classes: int | None = None,
    weights_backbone: str | None = "ResNet18_Weights.IMAGENET1K_V1",
    trainable_backbone_layers: int | None = None,
    **kwargs,
) -> SSD:
    """SSD300 with ResNet-18: the grid of SSD300 with VGG16 at a fraction of its cost.

    Arguments and errors as for ``ssd300_vgg16``; the backbone's parts are its stem and four stages.
    """
    resnet = resnet18()
    weights, weights_backbone = (None if source == "none" else source for source in (weights, weights_backbone))
    if weights is None and weights_backbone is not None:
        load_matching(resnet, load_state_dict(weights_backbone), weights_backbone)
    if trainable_backbone_layers is None:
        trainable_backbone_layers = 5
    backbone = SSDFeatureExtractorResNet(resnet, trainable_layers=trainable_backbone_layers)
    default_boxes = DefaultBoxGenerator([[2], [2, 3], [2, 3], [2, 3], [2], [2]])
    return build(backbone, default_boxes, 300, weights, num_classes, kwargs)


def build(backbone, default_boxes, size, weights, num_classes, kwargs) -> SSD:
    """The whole model, with ``weights`` loaded where they are given."""
    if weights is None:
        return SSD(backbone, default_boxes, size, num_classes or NUM_COCO_CLASSES, **kwargs)
    state_dict = load_state_dict(weights)
    num_classes = num_classes or count_classes(state_dict, default_boxes, weights)
    model = SSD(backbone, default_boxes, size, num_classes, **kwargs)
    load_matching(model, state_dict, weights)
    return model


def count_classes(state_dict: dict[str, Tensor], default_boxes: DefaultBoxGenerator, source: str) -> int:
    """Number of classes, background included, that the weights of a whole model predict."""
    bias = state_dict.get("head.classification_head.module_list.0.bias")
    if bias is None:
        raise ValueError(f"{source}: not the weights of an SSD model (it has no classification head)")
    return len(bias) // default_boxes.num_anchors_per_location()[0]


def load_vgg_features(features: nn.Sequential, source: str) -> None:
    """Loads the convolutions of a VGG; its classifier, if ``source`` has one, is left aside."""
    prefix = "features."
    state_dict = load_state_dict(source)
    load_matching(features, {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}, source)


def load_matching(module: nn.Module, state_dict: dict[str, Tensor], source: str) -> None:
    """``load_state_dict`` with a one-line error that names the source, for weights that are not finite too."""
    try:
        module.load_state_dict(state_dict)
    except RuntimeError as error:
        faults = [line.strip() for line in str(error).splitlines()[1:]]
        raise ValueError(f"{source}: not the weights of this model: {faults[0]} ({len(faults)} faults)") from None
    for name in not_finite(module.state_dict()):
        raise ValueError(f"{source}: the weight {name} is not finite; the file is of no use")
