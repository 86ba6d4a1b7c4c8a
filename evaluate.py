"""Scores a checkpoint, or detections in COCO's results format, on a validation set in COCO format.

    python evaluate.py --checkpoint out/checkpoint.pth --data-path /data/coco
    python evaluate.py --detections detections.json --data-path /data/coco
    python evaluate.py --checkpoint out/checkpoint.pth --images photographs
    torchrun --nproc-per-node=8 evaluate.py --checkpoint SSD300_VGG16_Weights.COCO_V1 --data-path /data/coco

Prints the COCO table and writes metrics.json, detections.json and, with --pictures, pictures of what was found. With
--images it has nothing to score, and writes detections.json and a picture of each image.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import coco
import ssd
import utils
from coco import CocoAnnotations, Split, scoring
from coco_utils import CocoEvalDataset
from engine import checkpoints, execution, failures, flags, inference, output
from engine.inference import Inference
from presets import DetectionPresetEval
from view import own_images, reports


def find_splits(args: argparse.Namespace, *names: str, needs_images: bool = True) -> dict[str, Split]:
    """The files of the splits ``train`` and ``val`` that the flags name."""
    files = {name: (getattr(args, f"{name}_images"), getattr(args, f"{name}_annotations")) for name in names}
    return coco.find_splits(args.dataset, args.data_path, files, args.val_fraction, needs_images)


def open_model(args: argparse.Namespace, device: torch.device) -> tuple[ssd.SSD, list[dict] | None]:
    """The model of ``--checkpoint``, and its classes if it tells them. Says what was assumed of it."""
    with utils.main_first():  # so that weights are downloaded once
        asked = (args.model, args.input_scaling, args.default_boxes)
        model, classes = checkpoints.load_model(args.checkpoint, *asked)
    for note in model.notes:
        utils.print_on_main(note)
    return model.to(device, memory_format=execution.memory_format(device)), classes


def make_validation_set(
    args: argparse.Namespace, model: ssd.SSD, annotations: CocoAnnotations, images_dir: Path
) -> CocoEvalDataset:
    preset = DetectionPresetEval(size=model.size)
    return CocoEvalDataset(annotations, images_dir, preset, skip_bad_images=args.on_bad_image == "skip")


def make_infer(args: argparse.Namespace, device: torch.device) -> Callable[..., Inference | None]:
    """``inference.infer`` with the settings that the flags name."""
    return partial(
        inference.infer,
        batch_size=args.batch_size,
        workers=args.workers,
        loader_timeout=args.loader_timeout,
        autocast=execution.make_autocast(device, args.amp),
        with_loss=args.val_loss,
    )


def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    """Scores ``--checkpoint`` or ``--detections`` on the validation set."""
    files = ["metrics.json", *(["detections.json"] if args.detections is None else [])]
    output.prepare(Path(args.output_dir), files, folders=["pictures"] if args.pictures else [])
    needs_images = args.checkpoint is not None or args.pictures > 0
    split = find_splits(args, "val", needs_images=needs_images)["val"]
    index_dir = Path(args.output_dir) / "annotations"
    annotations = split.open(index_dir, needs_images, needs_annotations=args.checkpoint is None)
    if not annotations.has_annotations and (args.val_loss or args.pictures):
        raise ValueError(
            f"{annotations.path}: has no annotations, which --val-loss and --pictures need; --images draws"
        )
    if args.detections is None:
        model, classes = open_model(args, device)
        annotations = checkpoints.check_knows(model, classes, args.checkpoint, annotations)
        utils.print_on_main(f"Evaluating {args.checkpoint} on {len(annotations.image_ids)} images ({annotations.path})")
        dataset = make_validation_set(args, model, annotations, split.images_dir)
        found = make_infer(args, device)(model, dataset, annotations.category_id_of)
    else:
        found = read_detections(args, annotations)
    if found is not None:
        report(args, annotations, split.images_dir, found)


def read_detections(args: argparse.Namespace, annotations: CocoAnnotations) -> Inference | None:
    """What ``--detections`` holds, on the main process; None elsewhere."""
    if args.val_loss:
        raise ValueError("--val-loss needs a model: give --checkpoint instead of --detections")
    if not utils.is_main():
        return None
    detections, notes = scoring.read_results(args.detections, annotations)
    for note in notes:
        print(note)
    print(f"Scoring {len(detections)} detections ({args.detections}) on {annotations.path}")
    return Inference(annotations.image_ids, detections, losses=None, faults=[])


def report(args: argparse.Namespace, annotations: CocoAnnotations, images_dir: Path, found: Inference) -> None:
    """Writes ``--output-dir``, the detections before they are scored, and prints the scores."""
    output_dir = Path(args.output_dir)
    (output_dir / "metrics.json").unlink(missing_ok=True)  # an earlier evaluation's would pass for that of these
    if args.detections is None:
        scoring.write_results(output_dir / "detections.json", found.detections)
    if not annotations.has_annotations:
        print(f"{annotations.path} has no annotations: nothing to score; the detections are in {output_dir}")
        return
    start = time.perf_counter()
    scores = inference.score(annotations, found, args.scorer)
    seconds = time.perf_counter() - start
    (output_dir / "metrics.json").write_text(json.dumps(scores.metrics, indent=2) + "\n")
    print(inference.describe(found, scores.metrics, seconds))
    print(scoring.format_class_table(scores.metrics))
    if args.pictures:
        diagnosis = scoring.diagnose(annotations, found.detections)
        rows = reports.choose_images(annotations, diagnosis, args.pictures, args.pictures_by)
        charts = reports.draw_charts(annotations, scores, diagnosis)
        drawn = reports.draw_images(annotations, images_dir, diagnosis, rows)
        reports.write_pictures(output_dir, itertools.chain(charts.items(), drawn))
    print(f"The results are in {output_dir}")


def detect_on_images(args: argparse.Namespace, device: torch.device) -> None:
    """Writes what ``--checkpoint`` finds in ``--images``."""
    if args.checkpoint is None or args.val_loss or args.pictures:
        raise ValueError("--images has no ground truth and draws all: give --checkpoint, no --val-loss, no --pictures")
    output_dir = Path(args.output_dir)
    output.prepare(output_dir, ["detections.json"], folders=["pictures"])
    paths = own_images.find_images(args.images, output_dir)
    model, classes = open_model(args, device)
    names = own_images.class_names(classes, model.num_classes)
    preset = DetectionPresetEval(size=model.size)
    dataset = own_images.ImageFiles(paths, preset, skip_bad_images=args.on_bad_image == "skip")
    found = make_infer(args, device)(model, dataset, {label: label for label in names})
    if found is not None:
        own_images.report(output_dir, dataset, found.detections, found.faults, names)
        print(f"The detections on {len(dataset)} images are in {output_dir}")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to evaluate")
    source = what.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="NAME_OR_FILE", help="file, or SSD300_VGG16_Weights.COCO_V1")
    source.add_argument("--detections", metavar="FILE", help="score a file in COCO's results format, without a model")
    what.add_argument("--images", metavar="PATH", help="an image or a folder of images to detect on, without scoring")
    groups = flags.add_groups(parser)
    flags.add_common_flags(groups)
    groups["model"].add_argument(
        "--model",
        choices=ssd.list_models(),
        metavar="NAME",
        help="for a bare state dict, see docs/models.md (default: ssd300_vgg16); a checkpoint knows its own",
    )
    flags.add_batch_size(groups["speed"], default=8)
    log = groups["log and checkpoints"]
    log.add_argument(
        "--scorer",
        choices=["pycocotools", "hotcoco"],
        default="pycocotools",
        help="the same figures; hotcoco needs far less time (default: %(default)s)",
    )
    log.add_argument(
        "--pictures",
        type=flags.not_negative,
        default=0,
        metavar="N",
        help="draw N images, and charts (default: %(default)s)",
    )
    log.add_argument("--pictures-by", choices=reports.ORDERS, default="first", help="which images (default: first)")
    return parser


def main(args: argparse.Namespace) -> None:
    device = utils.init_distributed(args.device, args.dist_timeout)
    if args.images is None:
        args.output_dir = args.output_dir or "out/evaluation"
        evaluate(args, device)
    else:
        args.output_dir = args.output_dir or "out/images"
        detect_on_images(args, device)
    utils.cleanup_distributed()


def evaluate_as_trained(args: argparse.Namespace) -> None:
    """``train.py --test-only``: evaluates what its flags ``--resume`` or ``--weights`` name."""
    checkpoint = args.resume or args.weights
    if checkpoint is None:
        raise ValueError("--test-only needs --resume or --weights, to know what to evaluate")
    if checkpoint == "auto":
        found = checkpoints.newest_sound(Path(args.output_dir))
        if found is None:
            raise ValueError(f"--test-only --resume auto: there is no checkpoint in {args.output_dir}")
        checkpoint = str(found.path)
    defaults = get_args_parser().parse_args(["--checkpoint", checkpoint])
    main(argparse.Namespace(**vars(defaults) | vars(args)))


if __name__ == "__main__":
    with failures.one_line_errors(flags.names_of(get_args_parser())):
        main(get_args_parser().parse_args())
