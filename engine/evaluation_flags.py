"""The flags of evaluate.py alone."""

import argparse
from collections.abc import Iterable

import ssd

from .flags import Groups, add_batch_size, fraction, not_negative


def add_evaluation_flags(what: argparse._ArgumentGroup, groups: Groups, orders: Iterable[str]) -> None:
    """Adds them.

    Args:
        what: the group "what to evaluate".
        groups: of ``flags.add_groups``.
        orders: the values of ``--pictures-by``, the first one is the default.
    """
    add_source_flags(what)
    add_image_flags(what)
    add_export_flags(what)
    groups["model"].add_argument(
        "--model",
        choices=ssd.list_models(),
        metavar="NAME",
        help="for a bare state dict, see docs/models.md (default: ssd300_vgg16); a checkpoint knows its own",
    )
    groups["model"].add_argument(
        "--no-ema", action="store_true", help="the weights themselves, where a checkpoint has their average too"
    )
    add_batch_size(groups["speed"], default=8)
    add_report_flags(groups["log and checkpoints"], [*orders])


def add_source_flags(what: argparse._ArgumentGroup) -> None:
    source = what.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="NAME_OR_FILE", help="file, or SSD300_VGG16_Weights.COCO_V1")
    source.add_argument("--detector", metavar="FILE", help="a file of --export, or what other tools made of one")
    source.add_argument("--detections", metavar="FILE", help="score a file in COCO's results format, without a model")


def add_image_flags(what: argparse._ArgumentGroup) -> None:
    add = what.add_argument
    add("--images", metavar="PATH", help="an image or a folder of images to detect on, without scoring")
    add("--min-score", type=fraction, metavar="S", help="of --images: leave out less sure detections (default: 0.3)")
    add("--skip-done", action="store_true", help="of --images: leave out those that an earlier run has done")
    add("--json-only", action="store_true", help="of --images: draw no pictures")


def add_export_flags(what: argparse._ArgumentGroup) -> None:
    add = what.add_argument
    add("--export", metavar="FILE", help="write the model as .onnx or .pt2 for other programs, and exit")
    add(
        "--export-part",
        choices=list(ssd.EXPORT_OUTPUTS),
        help="detections, or the logits and offsets that they are made from (default: detections)",
    )


def add_report_flags(log: argparse._ArgumentGroup, orders: list[str]) -> None:
    log.add_argument(
        "--scorer",
        choices=["pycocotools", "hotcoco"],
        default="pycocotools",
        help="the same figures; hotcoco needs far less time (default: %(default)s)",
    )
    log.add_argument(
        "--pictures",
        type=not_negative,
        default=0,
        metavar="N",
        help="draw N images, and charts (default: %(default)s)",
    )
    log.add_argument("--pictures-by", choices=orders, default=orders[0], help="which images (default: %(default)s)")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not go together."""
    if args.images is not None and (args.detections is not None or args.val_loss or args.pictures):
        raise ValueError("--images has no ground truth and draws all: give a model, no --val-loss, no --pictures")
    if args.images is None and (args.min_score is not None or args.skip_done or args.json_only):
        raise ValueError("--min-score, --skip-done and --json-only are for --images")
    if args.export is None and args.export_part is not None:
        raise ValueError("--export-part needs --export, the file to write")
    if args.export is not None:
        others = args.images, args.amp, args.val_loss or None, args.pictures or None
        if args.checkpoint is None or {*others} != {None} or args.device not in (None, "cpu"):
            raise ValueError(
                "--export writes the model of --checkpoint, in float32 and on the CPU, and does nothing else"
            )
    if args.detections is not None and args.val_loss:
        raise ValueError("--val-loss needs a model: give --checkpoint instead of --detections")
    if args.detector is not None:
        check_detector(args)


def check_detector(args: argparse.Namespace) -> None:
    """Raises ValueError for a flag that the file of ``--detector`` decides."""
    given = {"--model": args.model, "--amp": args.amp, "--val-loss": args.val_loss or None}
    given |= {"--no-ema": args.no_ema or None, "--device": None if args.device == "cpu" else args.device}
    given |= {"--input-scaling": args.input_scaling, "--default-boxes": args.default_boxes}
    refused = [flag for flag, value in given.items() if value not in (None, "default")]
    if refused:
        raise ValueError(
            f"--detector: its file knows its model, has no loss, and runs on the CPU: leave out {', '.join(refused)}"
        )
