"""Scores a checkpoint, or detections in COCO's results format, on a validation set in COCO format.

    python evaluate.py --checkpoint out/checkpoint.pth --data-path /data/coco
    python evaluate.py --detections detections.json --data-path /data/coco
    python evaluate.py --checkpoint out/checkpoint.pth --images photographs
    python evaluate.py --checkpoint out/checkpoint.pth --export ssd.onnx
    python evaluate.py --detector ssd.onnx --data-path /data/coco
    torchrun --nproc-per-node=8 evaluate.py --checkpoint SSD300_VGG16_Weights.COCO_V1 --data-path /data/coco

Prints the COCO table and writes metrics.json, report.html, detections.json and, with --pictures, pictures of what was
found. With --images it has nothing to score, and writes detections.json and a picture of each image; with --export it
writes the model as a file that other programs run.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from numpy import ndarray

import coco
import ssd
import utils
from coco import CocoAnnotations, Split, scoring
from coco_utils import CocoEvalDataset
from engine import checkpoints, evaluation_flags, execution, failures, flags, inference, output, resuming
from engine.exported import ExportedDetector, open_exported
from engine.inference import Inference
from engine.journal import Journal, describe_file
from engine.progress import Progress
from presets import DetectionPresetEval
from view import html_report, own_images, reports


def find_splits(args: argparse.Namespace, *names: str, needs_images: bool = True) -> dict[str, Split]:
    """The files of the splits ``train`` and ``val`` that the flags name."""
    files = {name: (getattr(args, f"{name}_images"), getattr(args, f"{name}_annotations")) for name in names}
    return coco.find_splits(args.dataset, args.data_path, files, args.val_fraction, needs_images)


def open_model(args: argparse.Namespace, device: torch.device) -> tuple[ssd.SSD | ExportedDetector, list[dict] | None]:
    """The model of ``--checkpoint`` or ``--detector``, and its classes if it tells them; says what was assumed."""
    if args.detector is not None:
        model = open_exported(args.detector)
        if model.batch_size not in (None, args.batch_size):
            utils.print_on_main(f"{args.detector}: takes {model.batch_size} images at a time, whatever --batch-size is")
            args.batch_size = model.batch_size
        return model, model.classes
    with utils.main_first():  # so that weights are downloaded once
        asked = (args.model, args.input_scaling, args.default_boxes, not args.no_ema)
        model, classes = checkpoints.load_model(args.checkpoint, *asked)
    for note in model.notes:
        utils.print_on_main(note)
    return model.to(device, memory_format=execution.memory_format(device)), classes


def make_validation_set(
    args: argparse.Namespace, model: ssd.SSD, annotations: CocoAnnotations, images_dir: Path
) -> CocoEvalDataset:
    preset = DetectionPresetEval(size=model.size)
    return CocoEvalDataset(annotations, images_dir, preset, skip_bad_images=args.on_bad_image == "skip")


def inference_settings(args: argparse.Namespace, device: torch.device) -> inference.Settings:
    autocast = execution.make_autocast(device, args.amp)
    return inference.Settings(args.batch_size, args.workers, args.loader_timeout, autocast)


def make_infer(args: argparse.Namespace, device: torch.device) -> Callable[..., Inference | None]:
    """``inference.infer`` with the settings that the flags name."""
    return partial(inference.infer, settings=inference_settings(args, device), with_loss=args.val_loss)


def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    """Scores ``--checkpoint``, ``--detector`` or ``--detections`` on the validation set."""
    files = ["metrics.json", html_report.FILE_NAME, *(["detections.json"] if args.detections is None else [])]
    output.prepare(Path(args.output_dir), files, folders=["pictures"] if args.pictures else [])
    needs_images = args.detections is None or args.pictures > 0
    split = find_splits(args, "val", needs_images=needs_images)["val"]
    index_dir = Path(args.output_dir) / "annotations"
    annotations = split.open(index_dir, needs_images, needs_annotations=args.detections is not None)
    if not annotations.has_annotations and (args.val_loss or args.pictures):
        raise ValueError(
            f"{annotations.path}: has no annotations, which --val-loss and --pictures need; --images draws"
        )
    if args.detections is None:
        model, classes = open_model(args, device)
        name = args.checkpoint or args.detector
        annotations = checkpoints.check_knows(model, classes, name, annotations)
        utils.print_on_main(f"Evaluating {name} on {len(annotations.image_ids)} images ({annotations.path})")
        dataset = make_validation_set(args, model, annotations, split.images_dir)
        found, notes = make_infer(args, device)(model, dataset, annotations.category_id_of), model.notes
    else:
        found, notes = read_detections(args, annotations), []
    if found is not None:
        report(args, annotations, split.images_dir, found, notes)


def read_detections(args: argparse.Namespace, annotations: CocoAnnotations) -> Inference | None:
    """What ``--detections`` holds, on the main process; None elsewhere."""
    if not utils.is_main():
        return None
    detections, notes = scoring.read_results(args.detections, annotations)
    for note in notes:
        print(note)
    print(f"Scoring {len(detections)} detections ({args.detections}) on {annotations.path}")
    return Inference(annotations.image_ids, detections, losses=None, faults=[])


def report(
    args: argparse.Namespace, annotations: CocoAnnotations, images_dir: Path, found: Inference, notes: Iterable[str]
) -> None:
    """Writes ``--output-dir``, the detections before they are scored, and prints the scores."""
    output_dir = Path(args.output_dir)
    for name in ("metrics.json", html_report.FILE_NAME):
        (output_dir / name).unlink(missing_ok=True)  # an earlier evaluation's would pass for that of these
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
    diagnosis = scoring.diagnose(annotations, found.detections)
    charts = reports.draw_charts(annotations, scores, diagnosis)
    worst = reports.draw_worst(annotations, images_dir, diagnosis)
    if args.pictures:
        rows = reports.choose_images(annotations, diagnosis, args.pictures, args.pictures_by)
        drawn = reports.draw_images(annotations, images_dir, diagnosis, rows, worst)
        reports.write_pictures(output_dir, itertools.chain(charts.items(), drawn))
    html_report.write(
        output_dir,
        title=args.checkpoint or args.detector or args.detections,
        facts=[f"on {annotations.path}", *notes],
        warnings=inference.warnings(found, scores.metrics),
        metrics=scores.metrics,
        charts=charts,
        worst=worst.values(),
        data={"validation": annotations},
        flags=vars(args),
    )
    print(f"The results are in {output_dir}")


def detect_on_images(args: argparse.Namespace, device: torch.device) -> None:
    """Writes what the model finds in ``--images``, of each image as soon as it is known."""
    output_dir = Path(args.output_dir)
    min_score = reports.MIN_SHOWN_SCORE if args.min_score is None else args.min_score
    output.prepare(output_dir, ["detections.json", "detections.jsonl"], [] if args.json_only else ["pictures"])
    model, classes = open_model(args, device)
    names = own_images.class_names(classes, model.num_classes)
    journal = Journal(output_dir, origin_of(args, min_score), has_pictures=not args.json_only)

    def begin() -> tuple[list[Path], dict[Path, str]]:
        resuming.claim(output_dir)
        paths = own_images.find_images(args.images, output_dir)
        return paths, journal.begin(paths, args.skip_done)

    paths, left = utils.run_on_main(begin)
    utils.print_on_main(f"Detecting on {len(left)} of {len(paths)} images of {args.images}")
    skip_bad_images = args.on_bad_image == "skip"

    def finish(index: int, fault: str, detections: ndarray) -> dict:
        path, detections = dataset.paths[index], own_images.at_least(detections, min_score)
        if not (fault or args.json_only):
            image, fault = coco.load_or_skip(partial(coco.load_upright, path), skip_bad_images)
            if not fault:
                content = own_images.to_png(image[..., :3], detections, names, min_score)
                ssd.write_file([content], journal.picture_of(path.name))
        return own_images.describe(path, left[path], fault, detections[: 0 if fault else None], names)

    dataset = own_images.ImageFiles([*left], DetectionPresetEval(size=model.size), skip_bad_images)
    settings = inference_settings(args, device)
    progress = Progress(len(left))
    for found in inference.infer_in_turn(model, dataset, {label: label for label in names}, settings, finish):
        journal.add(found)
        progress.add([own_images.as_line(one) for one in found])
    if utils.is_main():
        journal.finish([path.name for path in paths])
        progress.finish(f"The detections on {len(paths)} images are in {output_dir}")


def origin_of(args: argparse.Namespace, min_score: float) -> dict[str, str]:
    """By the names of flags, what the detections on ``--images`` depend on."""
    images = Path(args.images).resolve()
    origin = {"--images": str(images.parent if images.is_file() else images), "--min-score": f"{min_score:g}"}
    for flag, name in (("--checkpoint", args.checkpoint), ("--detector", args.detector)):
        is_file = name is not None and Path(name).is_file()
        origin[flag] = f"{Path(name).resolve()} of {describe_file(name)}" if is_file else f"{name}"
    flags_of_model = ("model", "no_ema", "input_scaling", "default_boxes", "amp")
    return origin | {f"--{flag.replace('_', '-')}": f"{getattr(args, flag)}" for flag in flags_of_model}


def export(args: argparse.Namespace) -> None:
    """Writes the model of ``--checkpoint`` to the file ``--export``."""
    file, part = Path(args.export), args.export_part or "detections"
    ssd.check_export_target(file)
    output.prepare(file.parent, [file.name], flag="--export")
    model, classes = open_model(args, torch.device("cpu"))
    names = own_images.class_names(classes, model.num_classes)
    classes = classes or [{"label": label, "name": name} for label, name in names.items()]

    def write() -> None:
        ssd.export_model(model.eval(), file, part, classes)
        count = f"{len(classes)} class{'es' * (len(classes) != 1)}"
        print(f"Exported to {file}: {part} of {count}, {file.stat().st_size / 1e6:.1f} MB")

    utils.run_on_main(write)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to evaluate")
    groups = flags.add_groups(parser)
    flags.add_common_flags(groups)
    evaluation_flags.add_evaluation_flags(what, groups, reports.ORDERS)
    return parser


def main(args: argparse.Namespace) -> None:
    evaluation_flags.check(args)
    device = utils.init_distributed("cpu" if args.detector else args.device, args.dist_timeout)
    if args.export is not None:
        export(args)
    elif args.images is not None:
        args.output_dir = args.output_dir or "out/images"
        detect_on_images(args, device)
    else:
        args.output_dir = args.output_dir or "out/evaluation"
        evaluate(args, device)
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
    output_dir = str(Path(args.output_dir) / "evaluation")  # beside what the training wrote
    main(argparse.Namespace(**vars(defaults) | vars(args) | {"output_dir": output_dir}))


if __name__ == "__main__":
    with failures.one_line_errors(flags.names_of(get_args_parser())):
        main(get_args_parser().parse_args())
