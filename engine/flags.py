"""The flags of the scripts, in the groups in which a user thinks.

Those without a default here take it from the recipe (``presets.parse_with_recipe``).
"""

import argparse
import math
from collections.abc import Callable, Iterable

import torch

import ssd

from .execution import AMP_DTYPES

GROUPS = ("data", "model", "training", "speed", "log and checkpoints", "rarely needed")
COMPILE_MODES = ("auto", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
MAX_INTEGER = 10**9  # far beyond all sense, and within what PyTorch takes for seeds and seconds
Groups = dict[str, argparse._ArgumentGroup]


def integer_from(least: int) -> Callable[[str], int]:
    """A type of flags: integers that are not less."""

    def integer(text: str) -> int:
        value = int(text)
        if not least <= value <= MAX_INTEGER:
            raise argparse.ArgumentTypeError(f"must be between {least} and {MAX_INTEGER}, got {value}")
        return value

    return integer


not_negative, positive = integer_from(0), integer_from(1)


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


def proper_fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be more than 0 and less than 1, got {text}")
    return value


def device_name(text: str) -> str:
    try:
        torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of PyTorch") from None
    return text


def add_recipe(parser: argparse.ArgumentParser, names: Iterable[str], default: str) -> None:
    parser.add_argument(
        "--recipe",
        choices=[*names, "list"],
        default=default,
        metavar="NAME",
        help="defaults for the other flags (default: %(default)s); 'list' shows all",
    )


def names_of(parser: argparse.ArgumentParser) -> set[str]:
    """What the flags of a script are called."""
    return {name for action in parser._actions for name in action.option_strings}


def add_groups(parser: argparse.ArgumentParser) -> Groups:
    """A group of flags for each of ``GROUPS``; those that stay empty are not shown."""
    return {title: parser.add_argument_group(title) for title in GROUPS}


def add_common_flags(groups: Groups) -> None:
    """The flags that train.py and evaluate.py share."""
    add = groups["data"].add_argument
    add(
        "--dataset",
        choices=["coco", "shapes"],
        default="coco",
        help="COCO format, or the embedded set of drawn shapes (default: %(default)s)",
    )
    add(
        "--data-path",
        metavar="DIR",
        help="folder of COCO, Roboflow, CVAT, Label Studio, YOLO or Pascal VOC (shapes: data/shapes)",
    )
    add("--val-images", metavar="DIR", help="image folder, where --data-path does not have it")
    add("--val-annotations", metavar="FILE", help="annotation file, where --data-path does not have it")
    add(
        "--val-fraction",
        type=proper_fraction,
        metavar="F",
        help="of data that come in one: hold this fraction of the images out, to validate on",
    )
    add(
        "--on-bad-image",
        choices=["raise", "skip"],
        default="raise",
        help="what to do with an image that cannot be read",
    )

    add = groups["speed"].add_argument
    add(
        "-j",
        "--workers",
        type=not_negative,
        default=4,
        metavar="N",
        help="loader processes per process (default: %(default)s)",
    )
    add("--device", type=device_name, metavar="NAME", help="cuda, cpu, ... (default: the GPU if there is one)")
    add("--amp", nargs="?", const="bf16", choices=list(AMP_DTYPES), help="mixed precision, bf16 if no type is named")

    add = groups["log and checkpoints"].add_argument
    add(
        "--output-dir",
        metavar="DIR",
        help="folder for all that is written (train: out; evaluate: out/evaluation, out/images)",
    )
    add("--val-loss", action="store_true", help="compute the loss on the validation set too")

    add = groups["rarely needed"].add_argument
    add(
        "--input-scaling",
        choices=["default", *ssd.INPUT_SCALINGS],
        default="default",
        help="how images are normalised (default: as the weights want it)",
    )
    add(
        "--default-boxes",
        choices=["default", *ssd.CAFFE_DEFAULT_BOXES],
        default="default",
        help="of a VGG, Caffe's for this data set (default: as the weights want it, else coco)",
    )
    add(
        "--loader-timeout",
        type=not_negative,
        default=300,
        metavar="SECONDS",
        help="how long to wait for a batch; 0: forever (default: %(default)s)",
    )
    add(
        "--dist-timeout",
        type=positive,
        default=1800,
        metavar="SECONDS",
        help="how long to wait for another process (default: %(default)s)",
    )


def add_batch_size(group: argparse._ArgumentGroup, default: int | None = None) -> None:
    """Of training or of speed, as the script has it."""
    group.add_argument(
        "-b",
        "--batch-size",
        type=positive,
        default=default,
        metavar="N",
        help="images per process (default: %(default)s)",
    )


def add_training_flags(groups: Groups, augmentations: Iterable[str]) -> None:
    """The flags of train.py alone; ``augmentations`` are the values of ``--data-augmentation``."""
    add_data_flags(groups["data"], augmentations)
    add_model_flags(groups["model"])
    add_optimization_flags(groups["training"])
    add_speed_flags(groups["speed"])
    add_log_flags(groups["log and checkpoints"])
    add_rare_flags(groups["rarely needed"])


def add_data_flags(group: argparse._ArgumentGroup, augmentations: Iterable[str]) -> None:
    add = group.add_argument
    add("--train-images", metavar="DIR", help="image folder, where --data-path does not have it")
    add("--train-annotations", metavar="FILE", help="annotation file, where --data-path does not have it")
    add("--data-augmentation", choices=list(augmentations), help="default: %(default)s")
    add("--check-data", action="store_true", help="verify annotations and images, list all faults, exit")


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--model",
        choices=ssd.list_models(),
        metavar="NAME",
        help="one of the family, see docs/models.md; SSDlite wants --recipe ssdlite (default: %(default)s)",
    )
    add("--weights", metavar="NAME_OR_FILE", help="start from a whole model: SSD300_VGG16_Weights.COCO_V1, or a file")
    add(
        "--weights-backbone",
        default="default",
        metavar="NAME_OR_FILE",
        help="of ImageNet: 'default', an enum name or a file; 'none' for random weights",
    )
    frozen = group.add_mutually_exclusive_group()
    frozen.add_argument(
        "--trainable-backbone-layers",
        type=not_negative,
        metavar="N",
        help="stages that train, from the last (default: 4 of VGG)",
    )
    frozen.add_argument("--freeze-backbone", action="store_true", help="train the heads alone; needs --weights")


def add_optimization_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add_batch_size(group)
    add("--epochs", type=positive, metavar="N", help="default: %(default)s")
    add(
        "--epoch-samples",
        type=not_negative,
        default=0,
        metavar="N",
        help="of an epoch, at least: fewer images are passed over again (default: %(default)s)",
    )
    add(
        "--lr",
        type=positive_number,
        metavar="RATE",
        help="after the warm-up, of the global batch (default: %(default)s)",
    )
    add(
        "--scale-lr",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="take --lr and --lr-warmup-steps for the recipe's global batch, and fit them to this one",
    )
    add("--lr-scheduler", choices=["multisteplr", "cosineannealinglr"], help="after the warm-up (default: %(default)s)")
    add("--lr-steps", type=int, nargs="+", metavar="EPOCH", help="epochs that lower the rate (default: %(default)s)")
    add(
        "--lr-gamma",
        type=positive_number,
        metavar="FACTOR",
        help="of the rate, at each of --lr-steps (default: %(default)s)",
    )
    warmup = group.add_mutually_exclusive_group()
    warmup.add_argument(
        "--lr-warmup-epochs",
        type=not_negative,
        metavar="N",
        help="epochs of rising rate (default: up to 1000 steps of the first)",
    )
    warmup.add_argument("--lr-warmup-steps", type=not_negative, metavar="N", help="the same in steps, across epochs")
    add("--opt", choices=["sgd", "sgd_nesterov", "adamw"], help="default: %(default)s")
    add("--momentum", type=fraction, metavar="M", help="of SGD (default: %(default)s)")
    add("--wd", "--weight-decay", dest="weight_decay", type=fraction, metavar="W", help="default: %(default)s")
    add(
        "--accumulate",
        type=positive,
        default=1,
        metavar="N",
        help="batches of a process per step (default: %(default)s)",
    )
    add(
        "--ema",
        type=proper_fraction,
        metavar="DECAY",
        help="evaluate the moving average of the weights, of which a step keeps so much (default: none)",
    )
    add(
        "--seed",
        type=not_negative,
        default=0,
        metavar="N",
        help="of initial weights, order and augmentation (default: 0)",
    )


def add_speed_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--compile",
        nargs="?",
        const="auto",
        choices=COMPILE_MODES,
        help="compile with torch.compile, in this mode (auto: reduce-overhead, under torchrun default)",
    )
    add("--cache", choices=["ram"], help="hold the training images' files in memory")


def add_log_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--print-freq", type=positive, default=20, metavar="STEPS", help="steps between lines (default: %(default)s)")
    add(
        "--eval-freq",
        type=not_negative,
        default=1,
        metavar="EPOCHS",
        help="epochs between evaluations, 0: never (default: 1)",
    )
    add(
        "--checkpoint-freq",
        type=not_negative,
        default=0,
        metavar="STEPS",
        help="steps between checkpoints (default: every epoch)",
    )
    add("--keep", type=not_negative, default=1, metavar="N", help="older checkpoints that stay (default: %(default)s)")
    add("--resume", metavar="FILE", help="checkpoint to continue from; 'auto': that of --output-dir, if any")
    add("--time-limit", type=positive_number, metavar="MINUTES", help="stop then, with a checkpoint to continue from")
    add("--test-only", action="store_true", help="evaluate --resume or --weights, then exit")


def add_rare_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--weight-init",
        choices=["default", *ssd.WEIGHT_INITS],
        default="default",
        help="initialisation of what SSD adds to a backbone (default: xavier, of SSDlite normal)",
    )
    add(
        "--subsample-fc",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="begin fc6 and fc7 of a VGG with the classifier of --weights-backbone",
    )
    add("--sync-bn", action="store_true", help="batch norm over the batches of all GPUs")
    add("--norm-weight-decay", type=fraction, metavar="W", help="of batch norm (default: that of all layers)")
    add("--max-steps", type=positive, metavar="N", help="stop after this many steps of the whole run, then evaluate")
    add("--use-deterministic-algorithms", action="store_true", help="the same results again on a GPU")
    add("--aspect-ratio-group-factor", type=int, metavar="K", help="accepted, without effect: SSD's input is square")
