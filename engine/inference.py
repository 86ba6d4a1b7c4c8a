"""Detecting on every image once, whatever the number of processes, and what comes of it."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

import coco_utils
import ssd
import utils
from coco import CocoAnnotations, scoring, voc_scoring

from . import collapse, loading
from .exported import ExportedDetector

LOSSES = ("bbox_regression", "classification", "positives")


@dataclass
class Inference:
    """What a model predicts on images."""

    image_ids: ndarray  # int64 [n]
    detections: ndarray  # float64 [N, 7], see ``scoring.detections_to_array``
    losses: ndarray | None  # float64 [n, 3], the columns of ``LOSSES``, if asked for
    faults: list[str]  # of images that were skipped, which have no detections
    seconds: float = 0.0
    dependence: list[float] | None = None  # of the predictions on the image, see ``collapse.image_dependence``


@dataclass(frozen=True)
class Settings:
    """How each process loads images, and runs a model on them."""

    batch_size: int
    workers: int
    loader_timeout: float  # seconds
    autocast: AbstractContextManager  # for the forward pass


@dataclass
class Predicted:
    """A batch and what a model says of it."""

    batch: dict  # of the loader
    images: Tensor  # [B, 3, size, size], on the model's device
    outputs: dict[str, Tensor]  # of the model
    detections: list[dict[str, Tensor]]  # of each image, in its pixels

    def by_image(self, category_id_of: dict[int, int]) -> Iterator[tuple[int, str, ndarray]]:
        """Of each image its id, its fault, and its detections [N, 7]: none where it has a fault."""
        for image_id, fault, found in zip(self.batch["image_id"], self.batch["fault"], self.detections, strict=True):
            yield image_id, fault, scoring.detections_to_array(image_id, found, {} if fault else category_id_of)


@torch.inference_mode()
def predict_batches(
    model: ssd.SSD | ExportedDetector, loader: DataLoader, autocast: AbstractContextManager
) -> Iterator[Predicted]:
    """Runs ``model`` over the batches of ``loader``.

    Raises:
        FloatingPointError: the model predicts boxes or scores that are not finite.
    """
    model.eval()
    for batch in loader:
        images = batch["image"].to(model.device, non_blocking=True)
        with autocast:
            outputs = predict(model, images, loader.batch_size)
        try:
            detections = model.postprocess_detections(outputs, batch["size"].to(model.device))
        except ssd.NotFiniteError as error:
            broken = [batch["image_id"][row] for row in error.rows]
            raise FloatingPointError(
                f"the model's predictions are not finite on images {broken}: its weights are broken"
            ) from None
        yield Predicted(batch, images, outputs, detections)


@torch.inference_mode()
def detect(
    model: ssd.SSD | ExportedDetector,
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
    start = time.perf_counter()
    image_ids, detections, losses, faults = [np.zeros(0, np.int64)], [np.zeros((0, 7))], [np.zeros((0, 3))], []
    watched = collapse.Watched(len(loader.dataset))
    for predicted in predict_batches(model, loader, autocast):
        batch = predicted.batch
        if model.boxes_per_map:
            watched.add(predicted.images, predicted.outputs["cls_logits"], batch["fault"])
        if with_loss:
            objects = coco_utils.split_objects(batch["objects"].to(model.device))
            sums = model.sum_losses(predicted.outputs, *objects)
            losses.append(torch.stack([sums[name] for name in LOSSES], dim=1).double().cpu().numpy())
        image_ids.append(np.array(batch["image_id"], np.int64))
        faults += filter(None, batch["fault"])
        detections += [found for _, _, found in predicted.by_image(category_id_of)]
        after_batch()
    losses = np.concatenate(losses) if with_loss else None
    seconds = time.perf_counter() - start
    dependence = watched.dependence(model.boxes_per_map)
    return Inference(np.concatenate(image_ids), np.concatenate(detections), losses, faults, seconds, dependence)


def predict(model: ssd.SSD | ExportedDetector, images: Tensor, batch_size: int) -> dict[str, Tensor]:
    """What the model says of images [N, 3, size, size], which it gets as a whole batch.

    Rounding may depend on a batch's size. If the last batch were smaller, results would depend on how many processes
    share the images.
    """
    num_images = len(images)
    if num_images < batch_size:
        images = F.pad(images, (0, 0) * 3 + (0, batch_size - num_images))
    return {name: output[:num_images] for name, output in model(images).items()}


def infer(
    model: ssd.SSD | ExportedDetector,
    dataset: Dataset,
    category_id_of: dict[int, int],
    settings: Settings,
    with_loss: bool = False,
    after_batch: Callable[[], None] = lambda: None,
) -> Inference | None:
    """Detects on every image of ``dataset`` once, shared among all processes.

    Args:
        model: predicts the labels of ``category_id_of``.
        dataset: samples as those of ``coco_utils.CocoEvalDataset``, and their ``image_ids``.
        category_id_of: the category of each label; other labels are left out.
        settings: of each process.
        with_loss: compute the loss too.
        after_batch: called equally often by all processes, after each of their batches.

    Returns:
        On the main process what all have found, by image in the order of their ids; None elsewhere.
    """
    loader, most_batches = share_images(model, dataset, settings)
    found = detect(model, loader, category_id_of, settings.autocast, with_loss, after_batch)
    for _ in range(most_batches - len(loader)):
        after_batch()
    shares = utils.gather_to_main(found)
    return None if shares is None else merge(shares, dataset.image_ids)


def infer_in_turn(
    model: ssd.SSD | ExportedDetector,
    dataset: Dataset,
    category_id_of: dict[int, int],
    settings: Settings,
    finish: Callable[[int, str, ndarray], object],
) -> Iterator[list]:
    """Detects like ``infer``, but hands over what was found as soon as all processes have done a batch.

    Args:
        model, dataset, category_id_of, settings: as of ``infer``.
        finish: makes of an image's id, its fault and its detections [N, 7] what is handed over, where it was detected.

    Yields:
        On the main process that of the next images, in the order of the data set; elsewhere nothing.
    """
    loader, most_batches = share_images(model, dataset, settings)
    batches = predict_batches(model, loader, settings.autocast)
    for _ in range(most_batches):
        predicted = next(batches, None)
        finished = [] if predicted is None else [finish(*one) for one in predicted.by_image(category_id_of)]
        shares = utils.gather_to_main(finished)
        if shares is not None:
            yield [one for turn in itertools.zip_longest(*shares) for one in turn if one is not None]


def share_images(model: ssd.SSD | ExportedDetector, dataset: Dataset, settings: Settings) -> tuple[DataLoader, int]:
    """Loads every so many-th image, for this process, and says how many batches the process with most of them has."""
    share = Subset(dataset, range(utils.rank(), len(dataset), utils.world_size()))
    loader = loading.make_loader(
        share,
        settings.workers,
        settings.loader_timeout,
        pin_memory=model.device.type == "cuda",
        batch_size=settings.batch_size,
        collate_fn=coco_utils.collate,
    )
    return loader, math.ceil(math.ceil(len(dataset) / utils.world_size()) / settings.batch_size)


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
        shares[0].dependence,
    )


def score(annotations: CocoAnnotations, found: Inference, scorer: str) -> scoring.Scores:
    """COCO's scores, and as ``VOC`` those of Pascal VOC for its data sets.

    Among them the images ``skipped`` in ``counts``, and the mean ``loss`` per positive, if known.
    """
    scores = scoring.score_detections(annotations, found.detections, scorer)
    scores.metrics["counts"]["skipped"] = len(found.faults)
    if annotations.is_voc:
        scores.metrics["VOC"] = voc_scoring.score_detections(annotations, found.detections)
    if found.losses is not None:
        *terms, positives = found.losses.sum(axis=0)
        means = {name: float(term / max(positives, 1)) for name, term in zip(LOSSES[:-1], terms, strict=True)}
        scores.metrics["loss"] = {"loss": sum(means.values()), **means}
    return scores


def skipped(found: Inference) -> list[str]:
    """A line for each image that could not be read."""
    return [f"Skipped, and scored as an image without detections: {fault}" for fault in found.faults]


def warnings(found: Inference, metrics: dict) -> list[str]:
    """What nobody may miss who reads the scores: what is amiss with the model, and what was skipped."""
    return [*collapse.describe(found.dependence, metrics["per_class"]), *skipped(found)]


def describe(found: Inference, metrics: dict, seconds: float) -> str:
    """For the console: what was skipped, how long it took, the loss if known, COCO's table, and what is amiss."""
    lines = skipped(found)
    num_images = len(found.image_ids)
    if found.seconds:
        lines.append(f"Detected in {found.seconds:.1f} s, {num_images / found.seconds:.1f} images/s")
    lines.append(f"Scored in {seconds:.2f} s, {num_images / seconds:.0f} images/s")
    if "loss" in metrics:
        lines.append("  ".join(f"{name}: {value:.4f}" for name, value in metrics["loss"].items()))
    lines.append(scoring.format_table(metrics))
    if "VOC" in metrics:
        lines.append(voc_scoring.format_lines(metrics["VOC"]))
    lines += collapse.describe(found.dependence, metrics["per_class"])
    return "\n".join(lines)
