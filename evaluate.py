"""Scores a checkpoint, or detections in COCO's results format, on a validation set in COCO format.

    python evaluate.py --checkpoint out/checkpoint.pth --data-path /data/coco
    python evaluate.py --detections detections.json --data-path /data/coco
    torchrun --nproc-per-node=8 evaluate.py --checkpoint SSD300_VGG16_Weights.COCO_V1 --data-path /data/coco

Prints the COCO table and writes metrics.json, detections.json and, with --pictures, pictures of what was found.
"""

import argparse
import json
import time
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.utils.data import DataLoader

import coco_annotations
import coco_eval
import coco_utils
import flags
import pictures
import presets
import ssd
import utils
from coco_annotations import CocoAnnotations, DataError

MIN_PICTURED_SCORE = 0.3


@torch.inference_mode()
def detect(
    model: ssd.SSD, loader: DataLoader, category_id_of: dict[int, int], autocast: AbstractContextManager
) -> dict:
    """Runs ``model`` over the batches of ``loader``.

    Returns:
        ``image_ids`` that were seen, their ``detections`` as an array [N, 7], see ``coco_eval.detections_to_array``,
        and the ``faults`` of images that were skipped, which have no detections.

    Raises:
        FloatingPointError: the model predicts boxes or scores that are not finite.
    """
    model.eval()
    device = model.default_boxes.device
    image_ids, arrays, faults = [], [], []
    for batch in loader:
        faults += filter(None, batch["fault"])
        with autocast:
            outputs = model(batch["image"].to(device, non_blocking=True))
        try:
            results = model.postprocess_detections(outputs, batch["size"].to(device))
        except ssd.NotFiniteError as error:
            image_ids = batch["image_id"][error.rows].tolist()
            raise FloatingPointError(
                f"the model's predictions are not finite on images {image_ids}: its weights are broken"
            ) from None
        for image_id, fault, detections in zip(batch["image_id"].tolist(), batch["fault"], results, strict=True):
            image_ids.append(image_id)
            if not fault:
                arrays.append(coco_eval.detections_to_array(image_id, detections, category_id_of))
    return {"image_ids": image_ids, "detections": np.concatenate([np.zeros((0, 7)), *arrays]), "faults": faults}


def evaluate(
    model: ssd.SSD,
    annotations: CocoAnnotations,
    images_dir: str | Path,
    *,
    batch_size: int,
    workers: int,
    autocast: AbstractContextManager,
    scorer: str,
    skip_bad_images: bool = False,
) -> tuple[dict, ndarray] | None:
    """Detects on every image once, shared among all processes, and scores on the main one.

    Args:
        model: predicts the labels of ``annotations.label_of``.
        annotations: the ground truth.
        images_dir: folder of its images.
        batch_size, workers: of the loader, per process.
        autocast: context for the forward pass.
        scorer: see ``coco_eval.score_detections``.
        skip_bad_images: score an image that cannot be read as one without detections, and print why. By default a
            DataError.

    Returns:
        On the main process the metrics of ``coco_eval.score_detections``, among their counts the images ``skipped``,
        and all detections [N, 7]; None elsewhere.
    """
    share = range(utils.rank(), len(annotations.image_ids), utils.world_size())
    preset = presets.DetectionPresetEval(size=model.size)
    dataset = coco_utils.CocoEvalDataset(annotations, images_dir, preset, share, skip_bad_images)
    on_gpu = model.default_boxes.device.type == "cuda"
    loader = coco_utils.make_loader(dataset, workers, pin_memory=on_gpu, batch_size=batch_size)
    category_id_of = {label: category_id for category_id, label in annotations.label_of.items()}
    shares = utils.gather_to_main(detect(model, loader, category_id_of, autocast))
    if shares is None:
        return None
    image_ids = np.concatenate([share["image_ids"] for share in shares])
    if not np.array_equal(np.sort(image_ids), np.sort(annotations.image_ids)):
        raise RuntimeError("an image is missing or came twice: the processes shared the validation set differently")
    detections = np.concatenate([share["detections"] for share in shares])
    detections = detections[np.argsort(detections[:, 0], kind="stable")]  # the same order for any number of processes
    metrics = coco_eval.score_detections(annotations, detections, scorer)
    faults = [fault for share in shares for fault in share["faults"]]
    metrics["counts"]["skipped"] = len(faults)
    for fault in sorted(faults):
        print(f"Skipped, and scored as an image without detections: {fault}")
    return metrics, detections


def draw_detections(
    annotations: CocoAnnotations, images_dir: str | Path, detections: ndarray, num_pictures: int
) -> list[Tensor]:
    """The first images with ground truth (left) and detections over ``MIN_PICTURED_SCORE`` (right), uint8 [3, H, W]."""
    drawn = []
    for row in range(min(num_pictures, len(annotations.image_ids))):
        try:
            image = coco_utils.load_image(annotations, Path(images_dir), row)
        except DataError:  # evaluation has reported it
            continue
        objects = slice(*annotations.offsets[row : row + 2])
        found = detections[(detections[:, 0] == annotations.image_ids[row]) & (detections[:, 5] >= MIN_PICTURED_SCORE)]
        found = found[np.argsort(found[:, 5])]  # the surest is drawn last, over the others
        notes = [" (crowd)" if is_crowd else "" for is_crowd in annotations.is_crowd[objects]]
        scores = [f" {score:.2f}" for score in found[:, 5]]
        sides = []
        for caption, boxes, category_ids, suffixes in (
            ("ground truth", annotations.boxes[objects], annotations.category_ids[objects], notes),
            (f"detections, score >= {MIN_PICTURED_SCORE}", found[:, 1:5], found[:, 6], scores),
        ):
            corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)
            texts = [annotations.categories[i] + suffix for i, suffix in zip(category_ids, suffixes, strict=True)]
            labels = [annotations.label_of[i] for i in category_ids]
            sides.append(pictures.draw_boxes(image[..., :3], corners, labels, texts, caption))
        drawn.append(pictures.side_by_side(*sides))
    return drawn


def load_model(checkpoint: str, model_name: str | None, annotations: CocoAnnotations) -> ssd.SSD:
    """The model of a checkpoint (ours, torchvision's, a state dict, or an enum name), which must know the annotations.

    Raises:
        ValueError: it cannot be read, or it was trained on other classes.
    """
    content = {} if ssd.is_enum_name(checkpoint) else ssd.load_file(checkpoint)
    if "categories" in content:
        model_name = content["args"]["model"]
        coco_annotations.check_same_classes(content["categories"], checkpoint, annotations)
    model = ssd.MODELS[model_name or "ssd300_vgg16"](weights=checkpoint, weights_backbone=None)
    if model.num_classes != annotations.num_classes:
        raise ValueError(
            f"{checkpoint}: predicts {model.num_classes} classes (background included), "
            f"but {annotations.path} needs {annotations.num_classes}"
        )
    return model


def write_metrics(output_dir: Path, metrics: dict) -> None:
    """Writes metrics.json."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


def write_pictures(output_dir: Path, drawn: list[Tensor]) -> None:
    folder = output_dir / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for outdated in folder.glob("[0-9]*.png"):
        outdated.unlink()
    for number, picture in enumerate(drawn):
        pictures.save_png(picture, folder / f"{number:04d}.png")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", help="file, or SSD300_VGG16_Weights.COCO_V1")
    what.add_argument("--detections", metavar="FILE", help="score a file in COCO's results format, without a model")
    parser.add_argument("--model", choices=list(ssd.MODELS), help="only for a bare state dict (default: ssd300_vgg16)")
    parser.add_argument("--scorer", choices=["pycocotools", "hotcoco"], default="pycocotools", help="same figures")
    parser.add_argument(
        "--pictures", type=flags.not_negative, default=0, metavar="N", help="draw the first N images with boxes"
    )
    flags.add_common_arguments(parser)
    parser.set_defaults(batch_size=8, output_dir="out/evaluation")
    return parser


def evaluate_checkpoint(
    args: argparse.Namespace, device: torch.device, annotations: CocoAnnotations, images_dir: Path
) -> tuple[dict, ndarray] | None:
    """``evaluate`` as the flags have it."""
    with utils.main_first():  # so that weights are downloaded once
        model = load_model(args.checkpoint, args.model, annotations)
    model = model.to(device, memory_format=torch.channels_last)
    utils.print_on_main(f"Evaluating {args.checkpoint} on {len(annotations.image_ids)} images ({annotations.path})")
    return evaluate(
        model,
        annotations,
        images_dir,
        batch_size=args.batch_size,
        workers=args.workers,
        autocast=flags.make_autocast(device, args.amp),
        scorer=args.scorer,
        skip_bad_images=args.on_bad_image == "skip",
    )


def score_file(args: argparse.Namespace, annotations: CocoAnnotations) -> tuple[dict, ndarray] | None:
    """The metrics of ``--detections``, and what it holds, on the main process; None elsewhere."""
    if not utils.is_main():
        return None
    detections = coco_eval.read_results(args.detections, annotations)
    print(f"Scoring {len(detections)} detections ({args.detections}) on {annotations.path}")
    return coco_eval.score_detections(annotations, detections, args.scorer), detections


def main(args: argparse.Namespace) -> None:
    device = utils.init_distributed(args.device)
    annotations, images_dir = flags.open_data(
        args, "val", needs_images=args.checkpoint is not None or args.pictures > 0
    )
    start = time.perf_counter()
    if args.detections is None:
        result = evaluate_checkpoint(args, device, annotations, images_dir)
    else:
        result = score_file(args, annotations)
    if result is not None:
        metrics, detections = result
        print(coco_eval.format_table(metrics))
        print(coco_eval.format_class_table(metrics))
        output_dir = Path(args.output_dir)
        write_metrics(output_dir, metrics)
        if args.detections is None:
            coco_eval.write_results(output_dir / "detections.json", detections)
        if args.pictures:
            write_pictures(output_dir, draw_detections(annotations, images_dir, detections, args.pictures))
        print(f"Done in {time.perf_counter() - start:.1f} s; the results are in {output_dir}")
    utils.cleanup_distributed()


if __name__ == "__main__":
    with utils.one_line_errors():
        main(get_args_parser().parse_args())
