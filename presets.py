"""Named input pipelines and named training recipes.

A pipeline has two stages: ``__call__`` works on one image in a loader worker, ``on_device`` on a whole batch next to
the model. All randomness is drawn in the first stage.
"""

import argparse
import textwrap
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

import transforms as T

HFLIP_PROBABILITY = 0.5

# name -> (geometric transforms in order, photometric transform or None); as in torchvision, but for "caffe"
DATA_AUGMENTATIONS = {
    "ssd": (
        [T.RandomZoomOut(), T.RandomIoUCrop(), T.RandomHorizontalFlip(HFLIP_PROBABILITY)],
        T.RandomPhotometricDistort(),
    ),
    "caffe": (
        [T.RandomZoomOut(), T.CaffeIoUCrop(), T.RandomHorizontalFlip(HFLIP_PROBABILITY)],
        T.CaffePhotometricDistort(),
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
        self.widths = {} if self.photometric is None else self.photometric.WIDTHS
        self.size = size

    def __call__(self, image: ndarray, boxes: ndarray, labels: ndarray, rng: np.random.Generator) -> dict:
        """
        Args:
            image: uint8 [H, W, 4], RGB and a byte without meaning.
            boxes: float32 [G, 4], xyxy in pixels of ``image``.
            labels: int64 [G].
            rng: the source of all randomness.

        Returns:
            ``image`` uint8 [3, size, size], ``boxes`` in its pixels, ``labels``, and ``parameters`` for ``on_device``,
            float32 [P].
        """
        drawn = {} if self.photometric is None else self.photometric.draw(image, rng)
        view = T.View(0, 0, image.shape[1], image.shape[0])
        for transform in self.geometric:
            view, boxes, labels = transform(view, boxes, labels, rng)
        pixels, coverage = T.resample(image, view, self.size, np.uint8)
        parameters = [coverage.flatten(), *(torch.as_tensor(drawn[name]).view(-1) for name in self.widths)]
        return {
            "image": pixels,
            "parameters": torch.cat(parameters),
            "boxes": torch.from_numpy(T.project_boxes(boxes, view, self.size)),
            "labels": torch.from_numpy(labels),
        }

    def on_device(self, batch: dict) -> Tensor:
        """Finishes the collated ``batch``: the images that the network sees, float32 [B, 3, size, size], 0 to 255."""
        images = batch["image"].float()
        coverage, drawn = self.split_parameters(batch["parameters"])
        if self.photometric is not None:
            images = self.photometric.distort(images, drawn)
        return T.fill_uncovered(images, coverage)

    def split_parameters(self, parameters: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The coverage [B, 2, size], and what the photometric transform has drawn, of ``parameters`` [B, P]."""
        coverage, *drawn = parameters.split([2 * self.size, *self.widths.values()], dim=1)
        return coverage.unflatten(1, (2, self.size)), dict(zip(self.widths, drawn, strict=True))


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


@dataclass(frozen=True)
class Recipe:
    """Named defaults for the flags of train.py.

    Args:
        description: what it is, in a line.
        values: by the flags' names in Python, and ``tuned_for_batch``, the global batch that its learning rate is for.
        published_ap: the published mAP in percent: torchvision's on COCO val2017, but of ``voc`` the paper's on VOC2007
            test, which is an AP50.
        changes: of ``values``, those in which it differs from the recipe that it is based on, if it is.
    """

    description: str
    values: dict
    published_ap: float | None = None
    changes: dict = field(default_factory=dict)

    def but(self, description: str, published_ap: float | None = None, **changes) -> "Recipe":
        """This recipe with some values changed."""
        return Recipe(description, self.values | changes, published_ap, changes)


# The ablation study of SSD300 in torchvision (https://pytorch.org/blog/torchvision-ssd-implementation), 8 processes
# each. It names the steps and their mAP; "our reading" marks numbers that it leaves open.
BASELINE = Recipe(
    "Faster R-CNN's hyper-parameters, flips, PyTorch's initialisation",
    {
        "model": "ssd300_vgg16",
        "weights_backbone": "VGG16_Weights.IMAGENET1K_V1",
        "input_scaling": "imagenet",
        "weight_init": "pytorch",
        "data_augmentation": "hflip",
        "batch_size": 2,
        "tuned_for_batch": 16,
        "epochs": 26,
        "opt": "sgd",
        "lr": 0.02,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "lr_scheduler": "multisteplr",
        "lr_steps": [16, 22],
        "lr_gamma": 0.1,
    },
    19.5,
)
PAPER_HYPERPARAMS = BASELINE.but(
    "the paper's hyper-parameters; our reading: its 240,000 steps for COCO (section 3.4) as epochs of train2017",
    21.1,
    batch_size=4,
    tuned_for_batch=32,
    epochs=65,
    lr=0.001,
    weight_decay=5e-4,
    lr_steps=[44, 55],
)
DATA_AUGMENTATION = PAPER_HYPERPARAMS.but(
    "zoom out, IoU crop, flip, photometric distortion", 22.9, data_augmentation="ssd"
)
WEIGHT_INIT_AND_INPUT_SCALING = DATA_AUGMENTATION.but(
    "Xavier for new layers; the model's own weights and scaling: for VGG16 Caffe's, of 0 to 255",
    23.9,
    weights_backbone="default",
    input_scaling="default",
    weight_init="default",
)
LR_SCHEME = WEIGHT_INIT_AND_INPUT_SCALING.but(
    "longer, at twice the rate: torchvision's SSD300_VGG16_Weights.COCO_V1",
    25.1,
    epochs=120,
    lr=0.002,
    lr_steps=[80, 110],
)

CAFFE = LR_SCHEME.but(
    "lr_scheme with the paper's code's augmentation, fc6, fc7 and schedule: 400,000 steps as epochs; all layers train",
    data_augmentation="caffe",
    trainable_backbone_layers=5,
    subsample_fc=True,
    epochs=109,
    lr=0.001,
    lr_steps=[76, 98],
)

SMALL = LR_SCHEME.but(
    "for tens to thousands of images of your own, from an ImageNet backbone, on one GPU or a CPU",
    weight_init="small_head",
    batch_size=8,
    tuned_for_batch=8,
    epochs=20,
    epoch_samples=160,
    opt="adamw",
    lr=1e-4,
    scale_lr=True,
    lr_warmup_steps=100,
    lr_steps=[14, 18],
)

DEFAULT_RECIPE = "lr_scheme"
RECIPES = {
    "baseline": BASELINE,
    "paper_hyperparams": PAPER_HYPERPARAMS,
    "data_augmentation": DATA_AUGMENTATION,
    "weight_init_and_input_scaling": WEIGHT_INIT_AND_INPUT_SCALING,
    "lr_scheme": LR_SCHEME,
    "two_thirds": LR_SCHEME.but(
        "lr_scheme in 66 % of its epochs, which the study takes for likely enough; our reading of the milestones",
        epochs=80,
        lr_steps=[53, 73],
    ),
    "caffe": CAFFE,
    "voc": CAFFE.but(
        "the paper's for PASCAL VOC (section 3.1): 120,000 steps as epochs of the 16,551 images of 07+12 trainval",
        77.2,
        default_boxes="voc",
        epochs=232,
        lr_steps=[155, 193],
    ),
    "small": SMALL,
    "finetune": SMALL.but(
        "the same from a detector, by default torchvision's for COCO",
        weights="SSD300_VGG16_Weights.COCO_V1",
        epochs=10,
        lr_steps=[7, 9],
    ),
    "large_batch": LR_SCHEME.but(
        "lr_scheme for many or big GPUs: rate in proportion to the batch, longer warm-up (Goyal et al., 2017); "
        "our reading",
        batch_size=32,
        scale_lr=True,
        lr_warmup_epochs=5,
    ),
    "ssdlite": Recipe(
        "torchvision's SSDLite320_MobileNet_V3_Large_Weights.COCO_V1",
        {
            "model": "ssdlite320_mobilenet_v3_large",
            "data_augmentation": "ssdlite",
            "batch_size": 24,
            "tuned_for_batch": 192,
            "epochs": 660,
            "opt": "sgd",
            "lr": 0.15,
            "momentum": 0.9,
            "weight_decay": 4e-5,
            "lr_scheduler": "cosineannealinglr",
        },
        21.3,
    ),
    "demo": Recipe(
        "the embedded data set on any machine, in minutes",
        {
            "dataset": "shapes",
            "model": "ssd300_light",
            "weights_backbone": "none",
            "data_augmentation": "hflip",
            "batch_size": 4,
            "tuned_for_batch": 4,
            "epochs": 8,
            "opt": "adamw",
            "lr": 0.001,
            "lr_steps": [6],
            "workers": 1,
            "print_freq": 10,
            "eval_freq": 4,
            "output_dir": "out/demo",
        },
    ),
}


def parse_with_recipe(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Flags over the values of ``--recipe`` over the values of the default recipe."""
    parser.set_defaults(**RECIPES[DEFAULT_RECIPE].values)
    given = parser.parse_known_args(arguments)[0]
    recipe = given.recipe
    if recipe == "list":
        print(list_recipes())
        parser.exit()
    values = RECIPES[recipe].values
    if given.lr_warmup_epochs is not None or given.lr_warmup_steps is not None:  # either excludes the recipe's
        values = {name: value for name, value in values.items() if not name.startswith("lr_warmup_")}
    if given.test_only:  # what is evaluated, the user names
        values = {name: value for name, value in values.items() if name != "weights"}
    parser.set_defaults(**values)
    return parser.parse_args(arguments)


def batch_ratio(args: argparse.Namespace) -> float:
    """With ``--scale-lr`` the images of a step, as a multiple of those that the recipe is tuned for."""
    return args.batch_size * args.world_size * args.accumulate / args.tuned_for_batch if args.scale_lr else 1.0


def list_recipes() -> str:
    """A table of all recipes: their published mAP, and the flags in which they differ from what they are based on.

    Each step of the study is based on the one above it, ``two_thirds``, ``caffe``, ``small`` and ``large_batch`` on
    ``lr_scheme``, ``voc`` on ``caffe``, ``finetune`` on ``small``.
    """
    lines = [f"{'recipe':<30} {'mAP':>4}  what it is, and its flags"]
    for name, recipe in RECIPES.items():
        published = "" if recipe.published_ap is None else f"{recipe.published_ap:.1f}"
        lines += ["", f"{name:<30} {published:>4}  {recipe.description}"]
        flags = (recipe.changes or recipe.values).items()
        text = " ".join(as_flag(flag, value) for flag, value in flags if flag != "tuned_for_batch")
        indent = " " * 37
        lines += textwrap.wrap(text, 120, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    lines += ["", "mAP as published: by torchvision, on COCO val2017; of voc by the paper, on VOC2007 test (AP50)."]
    lines += [f"The default is {DEFAULT_RECIPE}."]
    return "\n".join(lines)


def as_flag(name: str, value) -> str:
    flag = "--" + name.replace("_", "-")
    if value is True:
        return flag
    text = " ".join(map(str, value)) if isinstance(value, list) else f"{value}"
    return f"{flag} {text}"
