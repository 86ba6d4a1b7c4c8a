"""The flags that train.py and evaluate.py share, and what they name: data, device, precision."""

import argparse
import math
from pathlib import Path

import torch

import coco_annotations
import shapes
import utils
from coco_annotations import CocoAnnotations

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
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


def make_autocast(device: torch.device, amp: str | None) -> torch.autocast:
    return torch.autocast(device.type, AMP_DTYPES.get(amp), enabled=amp is not None)
