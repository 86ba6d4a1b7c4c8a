"""Named input pipelines and named training recipes.

A pipeline has two stages: ``__call__`` works on one image in a loader worker, ``on_device`` on a whole batch next to
the model. All randomness is drawn in the first stage.
"""

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

import transforms as T

HFLIP_PROBABILITY = 0.5

# name -> (geometric transforms in order, photometric transform or None), as in torchvision
DATA_AUGMENTATIONS = {
    "ssd": (
        [T.RandomZoomOut(), T.RandomIoUCrop(), T.RandomHorizontalFlip(HFLIP_PROBABILITY)],
        T.RandomPhotometricDistort(),
    ),
    "ssdlite": ([T.RandomIoUCrop(), T.RandomHorizontalFlip(HFLIP_PROBABILITY)], None),
    "hflip": ([T.RandomHorizontalFlip(HFLIP_PROBABILITY)], None),
}


class DetectionPresetTrain:
    """Augments and resamples training images.

    Args:
        data_augmentation: a key of ``DATA_AUGMENTATIONS``.
        size: side of the network input in pixels.
    """

    def __init__(self, *, data_augmentation: str, size: int):
        self.geometric, self.photometric = DATA_AUGMENTATIONS[data_augmentation]
        self.size = size

    def __call__(self, image: ndarray, boxes: ndarray, labels: ndarray, rng: np.random.Generator) -> dict:
        """
        Args:
            image: uint8 [H, W, 4], RGB and a byte without meaning.
            boxes: float32 [G, 4], xyxy in pixels of ``image``.
            labels: int64 [G].
            rng: the source of all randomness.

        Returns:
            ``image`` uint8 [3, size, size], ``boxes`` in its pixels, ``labels``, and what ``on_device`` needs.
        """
        sample = {}
        if self.photometric is not None:
            sample["photometric"] = self.photometric.draw(image, rng)
        view = T.View(0, 0, image.shape[1], image.shape[0])
        for transform in self.geometric:
            view, boxes, labels = transform(view, boxes, labels, rng)
        pixels, coverage = T.resample(image, view, self.size, np.uint8)
        return sample | {
            "image": pixels,
            "coverage": coverage,
            "boxes": torch.from_numpy(T.project_boxes(boxes, view, self.size)),
            "labels": torch.from_numpy(labels),
        }

    def on_device(self, batch: dict) -> Tensor:
        """Finishes the collated ``batch``: the images that the network sees, float32 [B, 3, size, size], 0 to 255."""
        images = batch["image"].float()
        if self.photometric is not None:
            images = T.distort(images, batch["photometric"])
        return T.fill_uncovered(images, batch["coverage"])


class DetectionPresetEval:
    """Resizes to a square of ``size`` pixels without rounding, as torchvision does inside its model."""

    def __init__(self, *, size: int):
        self.size = size

    def __call__(self, image: ndarray, boxes: ndarray) -> dict:
        """
        Args:
            image: uint8 [H, W, 4], RGB and a byte without meaning.
            boxes: float32 [G, 4], xyxy in pixels of ``image``.

        Returns:
            ``image`` float32 [3, size, size], 0 to 255, and ``boxes`` in its pixels.
        """
        view = T.View(0, 0, image.shape[1], image.shape[0])
        pixels, _ = T.resample(image, view, self.size, np.float32)
        return {"image": pixels, "boxes": torch.from_numpy(T.project_boxes(boxes, view, self.size))}


# name -> values of train.py's flags, and the global batch that its learning rate is tuned for.
# "lr_scheme", the last row of the published ablation table, gave 25.1 mAP on COCO with 8 processes of 4 images.
DEFAULT_RECIPE = "lr_scheme"
RECIPES = {
    "lr_scheme": {
        "model": "ssd300_vgg16",
        "data_augmentation": "ssd",
        "batch_size": 4,
        "tuned_for_batch": 32,
        "epochs": 120,
        "opt": "sgd",
        "lr": 0.002,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "lr_scheduler": "multisteplr",
        "lr_steps": [80, 110],
        "lr_gamma": 0.1,
    },
    "demo": {
        "dataset": "shapes",
        "model": "ssd300_resnet18",
        "weights_backbone": "none",
        "data_augmentation": "hflip",
        "batch_size": 4,
        "tuned_for_batch": 4,
        "epochs": 5,
        "opt": "adamw",
        "lr": 0.001,
        "lr_steps": [4],
        "workers": 1,
        "print_freq": 10,
        "eval_freq": 3,
        "output_dir": "out/demo",
    },
}
