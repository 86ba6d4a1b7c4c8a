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
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

import coco_annotations
import coco_eval
import coco_utils
import execution
import failures
import flags
import loading
import own_images
import presets
import reports
import ssd
import utils
from coco_annotations import CocoAnnotations

DEFAULT_OUTPUT_DIRS = {"evaluate": "out/evaluation", "detect_on_images": "out/images"}
LOSSES = ("bbox_regression", "classification", "positives")


@dataclass
class Inference:
    """What a model predicts on images."""

    image_ids: ndarray  # int64 [n]
    detections: ndarray  # float64 [N, 7], see ``coco_eval.detections_to_array``
    losses: ndarray | None  # float64 [n, 3], the columns of ``LOSSES``, if asked for
    faults: list[str]  # of images that were skipped, which have no detections
    seconds: float = 0.0


@torch.inference_mode()
def detect(
    model: ssd.SSD,
    loader: DataLoader,
    category_id_of: dict[int, int],
    autocast: AbstractContextManager,
    with_loss: bool = False,
    after_batch: Callable[[], None] = lambda: None,
) -> Inference:
    """Runs ``model`` over the batches of ``loader``, and ``after_batch`` after each of them.

    Raises:
        FloatingPointError: the model predicts boxes or scores that are not finite.
    """
    model.eval()
    device = model.default_boxes.device
    start = time.perf_counter()
    image_ids, detections, losses, faults = [np.zeros(0, np.int64)], [np.zeros((0, 7))], [np.zeros((0, 3))], []
    for batch in loader:
        with autocast:
            outputs = predict(model, batch["image"].to(device, non_blocking=True), loader.batch_size)
        try:
            results = model.postprocess_detections(outputs, batch["size"].to(device))
        except ssd.NotFiniteError as error:
            broken = [batch["image_id"][row] for row in error.rows]
            raise FloatingPointError(
                f"the model's predictions are not finite on images {broken}: its weights are broken"
            ) from None
        if with_loss:
            sums = model.sum_losses(outputs, *coco_utils.split_objects(batch["objects"].to(device)))
            losses.append(torch.stack([sums[name] for name in LOSSES], dim=1).double().cpu().numpy())
        image_ids.append(np.array(batch["image_id"], np.int64))
        faults += filter(None, batch["fault"])
        for image_id, fault, found in zip(batch["image_id"], batch["fault"], results, strict=True):
            if not fault:
                detections.append(coco_eval.detections_to_array(image_id, found, category_id_of))
        after_batch()
    losses = np.concatenate(losses) if with_loss else None
    seconds = time.perf_counter() - start
    return Inference(np.concatenate(image_ids), np.concatenate(detections), losses, faults, seconds)


def predict(model: ssd.SSD, images: Tensor, batch_size: int) -> dict[str, Tensor]:
    """What the model says of images [N, 3, size, size], which it gets as a whole batch.

    Rounding may depend on a batch's size. If the last batch were smaller, results would depend on how many processes
    share the images.
    """
    num_images = len(images)
    if num_images < batch_size:
        images = F.pad(images, (0, 0) * 3 + (0, batch_size - num_images))
    return {name: output[:num_images] for name, output in model(images).items()}


def infer(
    model: ssd.SSD,
    dataset: Dataset,
    category_id_of: dict[int, int],
    *,
    batch_size: int,
    workers: int,
    loader_timeout: float,
    autocast: AbstractContextManager,
    with_loss: bool = False,
    after_batch: Callable[[], None] = lambda: None,
) -> Inference | None:
    """Detects on every image of ``dataset`` once, shared among all processes.

    Args:
        model: predicts the labels of ``category_id_of``.
        dataset: samples as those of ``coco_utils.CocoEvalDataset``, and their ``image_ids``.
        category_id_of: the category of each label; other labels are left out.
        batch_size, workers, loader_timeout: of the loader, per process.
        autocast: context for the forward pass.
        with_loss: compute the loss too.
        after_batch: called equally often by all processes, after each of their batches.

    Returns:
        On the main process what all have found, by image in the order of their ids; None elsewhere.
    """
    share = Subset(dataset, range(utils.rank(), len(dataset), utils.world_size()))
    on_gpu = model.default_boxes.device.type == "cuda"
    loader = loading.make_loader(
        share, workers, loader_timeout, pin_memory=on_gpu, batch_size=batch_size, collate_fn=coco_utils.collate
    )
    found = detect(model, loader, category_id_of, autocast, with_loss, after_batch)
    most_batches = math.ceil(math.ceil(len(dataset) / utils.world_size()) / batch_size)
    for _ in range(most_batches - len(loader)):
        after_batch()
    shares = utils.gather_to_main(found)
    return None if shares is None else merge(shares, dataset.image_ids)


def merge(shares: list[Inference], expected_ids: ndarray) -> Inference:
    """What all processes have found, in an order that does not depend on their number."""
    image_ids = np.concatenate([share.image_ids for share in shares])
    if not np.array_equal(np.sort(image_ids), np.sort(expected_ids)):
        raise RuntimeError("an image is missing or came twice: the processes shared the images differently")
    detections = np.concatenate([share.detections for share in shares])
    with_loss = shares[0].losses is not None
    return Inference(
        np.sort(image_ids),
        detections[np.argsort(detections[:, 0], kind="stable")],
        np.concatenate([share.losses for share in shares])[np.argsort(image_ids)] if with_loss else None,
        sorted(fault for share in shares for fault in share.faults),
        max(share.seconds for share in shares),
    )


def validation_set(
    args: argparse.Namespace, model: ssd.SSD, annotations: CocoAnnotations, images_dir: Path
) -> tuple[coco_utils.CocoEvalDataset, dict[int, int]]:
    """The images of the annotations for ``infer``, and the category of each label."""
    preset = presets.DetectionPresetEval(size=model.size)
    dataset = coco_utils.CocoEvalDataset(annotations, images_dir, preset, args.on_bad_image == "skip")
    return dataset, {label: category_id for category_id, label in annotations.label_of.items()}


def score(annotations: CocoAnnotations, found: Inference, scorer: str) -> coco_eval.Scores:
    """COCO's scores; among their counts the images ``skipped``, and the mean ``loss`` per positive, if known."""
    scores = coco_eval.score_detections(annotations, found.detections, scorer)
    scores.metrics["counts"]["skipped"] = len(found.faults)
    if found.losses is not None:
        *terms, positives = found.losses.sum(axis=0)
        means = {name: float(term / max(positives, 1)) for name, term in zip(LOSSES[:-1], terms, strict=True)}
        scores.metrics["loss"] = {"loss": sum(means.values()), **means}
    return scores


def describe(found: Inference, metrics: dict, seconds: float) -> str:
    """For the console: what was skipped, how long it took, the loss if known, COCO's table."""
    lines = [f"Skipped, and scored as an image without detections: {fault}" for fault in found.faults]
    num_images = len(found.image_ids)
    if found.seconds:
        lines.append(f"Detected in {found.seconds:.1f} s, {num_images / found.seconds:.1f} images/s")
    lines.append(f"Scored in {seconds:.2f} s, {num_images / seconds:.0f} images/s")
    if "loss" in metrics:
        lines.append("  ".join(f"{name}: {value:.4f}" for name, value in metrics["loss"].items()))
    return "\n".join([*lines, coco_eval.format_table(metrics)])


def load_model(
    checkpoint: str, model_name: str | None, input_scaling: str = "default"
) -> tuple[ssd.SSD, list[dict] | None]:
    """The model of a checkpoint (ours, torchvision's, a state dict, or an enum name).

    A name for ``model_name`` and an ``input_scaling`` are needed where the checkpoint does not tell.

    Returns:
        The model, and the classes that a checkpoint of ours tells (``CocoAnnotations.classes``), else None.

    Raises:
        ValueError: it cannot be read, or is of another model.
    """
    content = {} if ssd.is_enum_name(checkpoint) else ssd.load_file(checkpoint)
    if "categories" in content:
        model_name = ssd.told(content, "model")
    elif model_name is None and ssd.is_enum_name(checkpoint):
        model_name = checkpoint.partition("_Weights.")[0].lower()
    model_name = model_name or "ssd300_vgg16"
    if model_name not in list(ssd.MODELS):
        raise ValueError(f"{checkpoint}: is of a model that is not known here, {model_name!r}")
    model = ssd.MODELS[model_name](weights=checkpoint, weights_backbone=None, input_scaling=input_scaling)
    return model, content.get("categories")


def check_knows(model: ssd.SSD, classes: list[dict] | None, checkpoint: str, annotations: CocoAnnotations) -> None:
    """Raises ValueError unless the model of ``checkpoint`` was trained on the classes of ``annotations``."""
    if classes is not None:
        coco_annotations.check_same_classes(classes, checkpoint, annotations)
    if model.num_classes != annotations.num_classes:
        raise ValueError(
            f"{checkpoint}: predicts {model.num_classes} classes (background included), "
            f"but {annotations.path} needs {annotations.num_classes}"
        )


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", help="file, or SSD300_VGG16_Weights.COCO_V1")
    what.add_argument("--detections", metavar="FILE", help="score a file in COCO's results format, without a model")
    parser.add_argument("--images", metavar="PATH", help="an image or a folder of images to detect on, without scoring")
    parser.add_argument("--model", choices=list(ssd.MODELS), help="only for a bare state dict (default: ssd300_vgg16)")
    parser.add_argument("--scorer", choices=["pycocotools", "hotcoco"], default="pycocotools", help="same figures")
    parser.add_argument(
        "--pictures", type=flags.not_negative, default=0, metavar="N", help="draw N images with boxes, and charts"
    )
    parser.add_argument(
        "--pictures-by", choices=reports.ORDERS, default="first", help="which images (default: %(default)s)"
    )
    flags.add_common_arguments(parser)
    parser.set_defaults(batch_size=8)
    return parser


def open_model(args: argparse.Namespace, device: torch.device) -> tuple[ssd.SSD, list[dict] | None]:
    """``load_model`` as the flags have it, on ``device``."""
    with utils.main_first():  # so that weights are downloaded once
        model, classes = load_model(args.checkpoint, args.model, args.input_scaling)
    return model.to(device, memory_format=execution.memory_format(device)), classes


def infer_as_flagged(
    args: argparse.Namespace,
    model: ssd.SSD,
    dataset: Dataset,
    category_id_of: dict[int, int],
    after_batch: Callable[[], None] = lambda: None,
) -> Inference | None:
    """``infer`` with the values of the flags."""
    return infer(
        model,
        dataset,
        category_id_of,
        batch_size=args.batch_size,
        workers=args.workers,
        loader_timeout=args.loader_timeout,
        autocast=execution.make_autocast(model.default_boxes.device, args.amp),
        with_loss=args.val_loss,
        after_batch=after_batch,
    )


def read_detections(args: argparse.Namespace, annotations: CocoAnnotations) -> Inference | None:
    """What ``--detections`` holds, on the main process; None elsewhere."""
    if args.val_loss:
        raise ValueError("--val-loss needs a model: give --checkpoint instead of --detections")
    if not utils.is_main():
        return None
    detections = coco_eval.read_results(args.detections, annotations)
    print(f"Scoring {len(detections)} detections ({args.detections}) on {annotations.path}")
    return Inference(annotations.image_ids, detections, losses=None, faults=[])


def report(args: argparse.Namespace, annotations: CocoAnnotations, images_dir: Path, found: Inference) -> None:
    """Scores, prints, and writes ``--output-dir``."""
    start = time.perf_counter()
    scores = score(annotations, found, args.scorer)
    print(describe(found, scores.metrics, time.perf_counter() - start))
    print(coco_eval.format_class_table(scores.metrics))
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "metrics.json").write_text(json.dumps(scores.metrics, indent=2) + "\n")
    if args.detections is None:
        coco_eval.write_results(output_dir / "detections.json", found.detections)
    if args.pictures:
        diagnosis = coco_eval.diagnose(annotations, found.detections)
        rows = reports.choose_images(annotations, diagnosis, args.pictures, args.pictures_by)
        charts = reports.draw_charts(annotations, scores, diagnosis)
        drawn = reports.draw_images(annotations, images_dir, diagnosis, rows)
        reports.write_pictures(output_dir, itertools.chain(charts.items(), drawn))
    print(f"The results are in {output_dir}")


def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    """Scores ``--checkpoint`` or ``--detections`` on the validation set."""
    needs_images = args.checkpoint is not None or args.pictures > 0
    annotations, images_dir = flags.open_data(args, "val", needs_images)
    if args.detections is None:
        model, classes = open_model(args, device)
        check_knows(model, classes, args.checkpoint, annotations)
        utils.print_on_main(f"Evaluating {args.checkpoint} on {len(annotations.image_ids)} images ({annotations.path})")
        found = infer_as_flagged(args, model, *validation_set(args, model, annotations, images_dir))
    else:
        found = read_detections(args, annotations)
    if found is not None:
        report(args, annotations, images_dir, found)


def detect_on_images(args: argparse.Namespace, device: torch.device) -> None:
    """Writes what ``--checkpoint`` finds in ``--images``."""
    if args.checkpoint is None or args.val_loss or args.pictures:
        raise ValueError("--images has no ground truth and draws all: give --checkpoint, no --val-loss, no --pictures")
    output_dir = Path(args.output_dir)
    paths = own_images.find_images(args.images, output_dir)
    model, classes = open_model(args, device)
    names = own_images.class_names(classes, model.num_classes)
    preset = presets.DetectionPresetEval(size=model.size)
    dataset = own_images.ImageFiles(paths, preset, args.on_bad_image == "skip")
    found = infer_as_flagged(args, model, dataset, {label: label for label in names})
    if found is not None:
        own_images.report(output_dir, dataset, found.detections, found.faults, names)
        print(f"The detections on {len(dataset)} images are in {output_dir}")


def main(args: argparse.Namespace) -> None:
    device = utils.init_distributed(args.device, args.dist_timeout)
    run = evaluate if args.images is None else detect_on_images
    args.output_dir = args.output_dir or DEFAULT_OUTPUT_DIRS[run.__name__]
    run(args, device)
    utils.cleanup_distributed()


if __name__ == "__main__":
    with failures.one_line_errors():
        main(get_args_parser().parse_args())
