"""The flags of training, those that evaluation shares, and the data that they name."""

import argparse
import math
from pathlib import Path

import torch

import coco_annotations
import presets
import shapes
import ssd
import utils
from coco_annotations import CocoAnnotations
from execution import AMP_DTYPES

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
MAX_INTEGER = 10**9  # far beyond all sense, and within what PyTorch takes for seeds and seconds


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that train.py and evaluate.py share."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=["coco", "shapes"], help="COCO format, or the embedded set of drawn shapes")
    data.add_argument("--data-path", help="folder with train2017, val2017 and annotations (shapes: data/shapes)")
    data.add_argument("--val-images", help="image folder, for another layout than COCO's")
    data.add_argument("--val-annotations", help="annotation file, for another layout than COCO's")
    data.add_argument(
        "--on-bad-image", choices=["raise", "skip"], default="raise", help="what to do with one that cannot be read"
    )
    data.add_argument(
        "--input-scaling",
        choices=["default", *ssd.INPUT_SCALINGS],
        default="default",
        help="of images (default: that of the weights)",
    )
    run = parser.add_argument_group("run")
    run.add_argument("-b", "--batch-size", type=positive, help="images per process (default: %(default)s)")
    run.add_argument("-j", "--workers", type=not_negative, help="loader processes per process (default: %(default)s)")
    run.add_argument("--device", type=device_name, help="cuda, cpu, ... (default: the GPU if there is one)")
    run.add_argument("--amp", nargs="?", const="bf16", choices=list(AMP_DTYPES), help="mixed precision, bf16 if bare")
    run.add_argument("--val-loss", action="store_true", help="compute the loss on the validation set too")
    run.add_argument(
        "--loader-timeout",
        type=not_negative,
        default=300,
        help="seconds to wait for a batch; 0: forever (default: 300)",
    )
    run.add_argument(
        "--dist-timeout", type=positive, default=1800, help="seconds to wait for another process (default: 1800)"
    )
    run.add_argument("--output-dir", help="folder for everything that is written (default: in out)")
    parser.set_defaults(dataset="coco", workers=4)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of train.py alone."""
    data = parser.add_argument_group("training data")
    data.add_argument("--train-images", help="image folder, for another layout than COCO's")
    data.add_argument("--train-annotations", help="annotation file, for another layout than COCO's")
    data.add_argument("--data-augmentation", choices=list(presets.DATA_AUGMENTATIONS), help="default: %(default)s")
    data.add_argument("--cache", choices=["ram"], help="hold the training images' files in memory")
    data.add_argument("--check-data", action="store_true", help="verify annotations and images, list all faults, exit")
    data.add_argument("--aspect-ratio-group-factor", type=int, help="accepted, without effect: SSD's input is square")
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=list(ssd.MODELS), help="default: %(default)s")
    model.add_argument("--weights", help="start from a whole model: SSD300_VGG16_Weights.COCO_V1, or a file")
    model.add_argument(
        "--weights-backbone", default="default", help="enum name, file, 'none' or 'default': ImageNet weights"
    )
    frozen = model.add_mutually_exclusive_group()
    frozen.add_argument(
        "--trainable-backbone-layers",
        type=not_negative,
        help="stages that train, from the last (default: 4 of VGG)",
    )
    frozen.add_argument("--freeze-backbone", action="store_true", help="train the heads alone; needs --weights")
    model.add_argument(
        "--weight-init",
        choices=["default", *ssd.WEIGHT_INITS],
        default="default",
        help="of what SSD adds to a backbone (default: xavier, of SSDlite normal)",
    )
    model.add_argument("--sync-bn", action="store_true", help="batch norm over the batches of all GPUs")
    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--epochs", type=positive, help="default: %(default)s")
    optimization.add_argument("--max-steps", type=positive, help="stop after this many steps of the whole run")
    optimization.add_argument(
        "--accumulate", type=positive, default=1, help="batches of a process per step (default: %(default)s)"
    )
    optimization.add_argument(
        "--compile", nargs="?", const="default", choices=COMPILE_MODES, help="with torch.compile, in this mode of its"
    )
    optimization.add_argument("--opt", choices=["sgd", "sgd_nesterov", "adamw"], help="default: %(default)s")
    optimization.add_argument("--lr", type=positive_number, help="for the global batch (default: %(default)s)")
    optimization.add_argument(
        "--scale-lr",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="take --lr for the recipe's global batch, and scale it to this one",
    )
    optimization.add_argument(
        "--lr-warmup-epochs",
        type=not_negative,
        help="epochs of rising rate (default: up to 1000 steps of the first)",
    )
    optimization.add_argument("--momentum", type=fraction, help="default: %(default)s")
    optimization.add_argument("--wd", "--weight-decay", dest="weight_decay", type=fraction, help="default: %(default)s")
    optimization.add_argument("--norm-weight-decay", type=fraction, help="of batch norm (default: that of all layers)")
    optimization.add_argument(
        "--lr-scheduler", choices=["multisteplr", "cosineannealinglr"], help="default: %(default)s"
    )
    optimization.add_argument(
        "--lr-steps", type=int, nargs="+", help="epochs that lower the rate (default: %(default)s)"
    )
    optimization.add_argument("--lr-gamma", type=positive_number, help="factor at each of them (default: %(default)s)")
    optimization.add_argument(
        "--seed", type=not_negative, default=0, help="of weights, order and augmentation (default: 0)"
    )
    optimization.add_argument("--use-deterministic-algorithms", action="store_true", help="slower on a GPU")
    progress = parser.add_argument_group("progress")
    progress.add_argument("--print-freq", type=positive, default=20, help="steps between lines (default: %(default)s)")
    progress.add_argument(
        "--eval-freq", type=not_negative, default=1, help="epochs between evaluations, 0: never (default: 1)"
    )
    progress.add_argument(
        "--checkpoint-freq",
        type=not_negative,
        default=0,
        help="steps between checkpoints (default: every epoch)",
    )
    progress.add_argument(
        "--keep", type=not_negative, default=1, help="older checkpoints that stay (default: %(default)s)"
    )
    progress.add_argument("--time-limit", type=positive_number, help="minutes until the run stops with a checkpoint")
    progress.add_argument("--resume", help="checkpoint to continue from; 'auto': that of --output-dir, if any")
    progress.add_argument("--test-only", action="store_true", help="evaluate --resume or --weights, then exit")


def not_negative(text: str) -> int:
    value = int(text)
    if not 0 <= value <= MAX_INTEGER:
        raise argparse.ArgumentTypeError(f"must be between 0 and {MAX_INTEGER}, got {value}")
    return value


def positive(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MAX_INTEGER:
        raise argparse.ArgumentTypeError(f"must be between 1 and {MAX_INTEGER}, got {value}")
    return value


def positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def device_name(text: str) -> str:
    try:
        torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of PyTorch") from None
    return text


def name_data(args: argparse.Namespace, split: str) -> tuple[Path, Path]:
    """Image folder and annotation file of a split, ``train`` or ``val``, as the flags name them.

    Raises:
        ValueError: the flags name neither a data path nor the files of the split.
    """
    root = args.data_path
    if args.dataset == "shapes":
        root = root or "data/shapes"
        with utils.main_first():
            shapes.draw_data_set(root)
    images, annotations = getattr(args, f"{split}_images"), getattr(args, f"{split}_annotations")
    if root is None and not (images and annotations):
        raise ValueError(
            f"--data-path is missing: give the folder of a COCO data set, or --{split}-images and "
            f"--{split}-annotations; --dataset shapes needs neither"
        )
    return Path(images or f"{root}/{split}2017"), Path(annotations or f"{root}/annotations/instances_{split}2017.json")


def open_data(args: argparse.Namespace, split: str, needs_images: bool = True) -> tuple[CocoAnnotations, Path]:
    """Annotations and image folder of a split, as the flags name them; the annotations are indexed in the output.

    Raises:
        ValueError: the flags name no data, there is no such folder though it is needed, or the annotations have faults.
    """
    images_dir, path = name_data(args, split)
    if needs_images and not images_dir.is_dir():
        raise ValueError(f"{images_dir}: no such image folder")
    with utils.main_first():  # so that the file is read once
        annotations = coco_annotations.read_annotations(path, Path(args.output_dir) / "annotations")
    for note in annotations.notes:
        utils.print_on_main(note)
    return annotations, images_dir
