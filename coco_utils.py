"""COCO-format data: annotations, datasets, the order of an epoch, results and scores.

The only room that knows COCO's file format and its API. COCO's boxes are xywh, all others xyxy, in pixels of the
original image.
"""

import contextlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler, default_collate

MAX_COCO_CATEGORY_ID = 90
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class DataError(ValueError):
    """A fault in the user's data, in one line that names the file, image or annotation and the remedy.

    A loader worker's exception is raised again in the main process with a traceback for message; only the line counts.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition("DataError: ")[2].strip())


@dataclass(frozen=True)
class CocoAnnotations:
    """A COCO annotation file as flat arrays; image ``i`` has the boxes ``offsets[i]`` to ``offsets[i + 1]``."""

    path: Path
    image_ids: ndarray  # int64 [images]
    file_names: list[str]
    sizes: ndarray  # int64 [images, 2], height and width
    offsets: ndarray  # int64 [images + 1]
    boxes: ndarray  # float64 [boxes, 4], xywh as in the file
    areas: ndarray  # float64 [boxes]
    category_ids: ndarray  # int64 [boxes]
    is_crowd: ndarray  # bool [boxes]
    annotation_ids: ndarray  # int64 [boxes]
    categories: dict[int, str]  # category id -> name

    @property
    def label_of(self) -> dict[int, int]:
        """Category id -> class label of the model.

        The id itself where all lie in 1 to 90, so that a model of COCO has torchvision's 91 outputs; else 1, 2, ...
        """
        if all(1 <= category_id <= MAX_COCO_CATEGORY_ID for category_id in self.categories):
            return {category_id: category_id for category_id in self.categories}
        return {category_id: label for label, category_id in enumerate(sorted(self.categories), start=1)}

    @property
    def num_classes(self) -> int:
        """Outputs that a model of these classes needs, background included."""
        return max(self.label_of.values()) + 1


def read_annotations(path: str | Path) -> CocoAnnotations:
    """Reads and checks an annotation file. Masks are neither needed nor read.

    Raises:
        DataError: the file is missing or not in COCO's format, or its content contradicts itself.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
        categories = {int(c["id"]): str(c["name"]) for c in content["categories"]}
        images = {int(image["id"]): image for image in content["images"]}
        annotations = content["annotations"]
        ids = np.array([a["id"] for a in annotations], dtype=np.int64)
        image_of = np.array([a["image_id"] for a in annotations], dtype=np.int64)
        category_ids = np.array([a["category_id"] for a in annotations], dtype=np.int64)
        boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(len(annotations), 4)
        is_crowd = np.array([a.get("iscrowd", 0) for a in annotations], dtype=bool)
        areas = np.array([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in annotations], dtype=np.float64)
        file_names = [str(image["file_name"]) for image in images.values()]
        sizes = np.array([(image["height"], image["width"]) for image in images.values()], dtype=np.int64)
    except OSError as error:
        raise DataError(f"{path}: cannot read the annotation file: {error.strerror}") from None
    except KeyError as error:
        raise DataError(f"{path}: not a COCO annotation file: {error} is missing somewhere") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not a COCO annotation file: {error}") from None

    if not images or not categories:
        raise DataError(f"{path}: lists no images or no categories")
    if len(images) != len(content["images"]):
        raise DataError(f"{path}: several images have the same id; give each its own")
    refuse(path, ids, ~np.isin(image_of, list(images)), "belongs to an image that the file does not list")
    refuse(path, ids, ~np.isin(category_ids, list(categories)), "has a category_id that is not in categories")
    refuse(path, ids, ~np.isfinite(boxes).all(axis=1), "has a box that is not finite")
    refuse(path, ids, (boxes[:, 2:] < 0).any(axis=1), "has a box of negative size; COCO boxes are x, y, width, height")
    repeated = np.ones(len(ids), dtype=bool)
    repeated[np.unique(ids, return_index=True)[1]] = False
    refuse(path, ids, repeated, "has an id that an earlier annotation has; pycocotools would score it wrongly")
    refuse(path, ids, ids == 0, "has id 0, which pycocotools takes for no match; start at 1")

    image_ids = np.array(list(images), dtype=np.int64)
    row_of = {image_id: row for row, image_id in enumerate(images)}
    rows = np.array([row_of[image_id] for image_id in image_of.tolist()], dtype=np.int64)
    order = np.argsort(rows, kind="stable")
    offsets = np.concatenate(([0], np.bincount(rows, minlength=len(images)).cumsum()))
    return CocoAnnotations(
        path=path,
        image_ids=image_ids,
        file_names=file_names,
        sizes=sizes,
        offsets=offsets,
        boxes=boxes[order],
        areas=areas[order],
        category_ids=category_ids[order],
        is_crowd=is_crowd[order],
        annotation_ids=ids[order],
        categories=categories,
    )


def refuse(path: Path, annotation_ids: ndarray, is_bad: ndarray, fault: str) -> None:
    """Raises a DataError that names the first bad annotation, if there is one."""
    if is_bad.any():
        others = f" (and {is_bad.sum() - 1} more)" if is_bad.sum() > 1 else ""
        raise DataError(f"{path}: annotation {annotation_ids[is_bad][0]}{others} {fault}")


def load_image(annotations: CocoAnnotations, images_dir: Path, row: int) -> ndarray:
    """Decodes an image to uint8 [H, W, 3], RGB. EXIF rotation is ignored, since COCO's boxes are not rotated.

    Raises:
        DataError: the file is missing, damaged, outside ``images_dir``, or of another size than the annotations say.
    """
    where = f"{images_dir / annotations.file_names[row]} (image id {annotations.image_ids[row]})"
    path = (images_dir / annotations.file_names[row]).resolve()
    if not path.is_relative_to(images_dir.resolve()):
        raise DataError(f"{where}: lies outside the image folder; correct file_name in {annotations.path}")
    height, width = annotations.sizes[row].tolist()
    try:
        with Image.open(path, formats=["JPEG", "PNG"]) as image:
            if image.size == (width, height):
                return np.array(image.convert("RGB"))
            size = image.size
    except FileNotFoundError:
        raise DataError(f"{where}: no such file; check the image folder") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: cannot be decoded ({error}); replace the file or remove the image") from None
    raise DataError(f"{where}: is {size[0]}x{size[1]} pixels, but {annotations.path} says {width}x{height}")


class CocoTrainDataset(Dataset):
    """Training samples by ``(epoch, index)``; all randomness of a sample comes from ``(seed, epoch, index)``.

    As in the reference, crowd boxes and boxes without area are left out, boxes are clipped to the image, and images
    without boxes are not trained on.

    Args:
        annotations: what to train on.
        images_dir: folder of the images.
        preset: ``(image, boxes, labels, rng) -> sample``.
        seed: seed of the run.

    Raises:
        DataError: no image has a box to train on.
    """

    def __init__(self, annotations: CocoAnnotations, images_dir: str | Path, preset, seed: int):
        self.annotations = annotations
        self.images_dir = Path(images_dir)
        self.preset = preset
        self.seed = seed
        num_images = len(annotations.image_ids)
        image_of_box = np.repeat(np.arange(num_images), np.diff(annotations.offsets))
        size = annotations.sizes[:, ::-1][image_of_box]  # width and height
        corners = annotations.boxes[:, :2], annotations.boxes[:, :2] + annotations.boxes[:, 2:]
        boxes = np.concatenate([corner.clip(0, size) for corner in corners], axis=1).astype(np.float32)
        self.boxes = boxes
        self.labels = np.array([annotations.label_of[c] for c in annotations.category_ids.tolist()], dtype=np.int64)
        self.is_object = ~annotations.is_crowd & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        self.rows = np.flatnonzero(np.bincount(image_of_box, weights=self.is_object, minlength=num_images))
        if len(self.rows) == 0:
            raise DataError(f"{annotations.path}: no image has a box to train on")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_boxes(self) -> int:
        return int(self.is_object.sum())

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        row = self.rows[index]
        image = load_image(self.annotations, self.images_dir, row)
        boxes = np.arange(*self.annotations.offsets[row : row + 2])
        boxes = boxes[self.is_object[boxes]]
        rng = np.random.default_rng((self.seed, epoch, index))
        sample = self.preset(image, self.boxes[boxes], self.labels[boxes], rng)
        return sample | {"image_id": int(self.annotations.image_ids[row])}


class CocoEvalDataset(Dataset):
    """Every image of the annotations, resized for the model, with its id and original size.

    Args:
        annotations: the images.
        images_dir: folder of the images.
        preset: ``image -> Tensor``.
        rows: which images to serve, as rows of the annotations; a rank's share of them.
    """

    def __init__(self, annotations: CocoAnnotations, images_dir: str | Path, preset, rows: range):
        self.annotations = annotations
        self.images_dir = Path(images_dir)
        self.preset = preset
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        return {
            "image": self.preset(load_image(self.annotations, self.images_dir, row)),
            "image_id": int(self.annotations.image_ids[row]),
            "size": torch.from_numpy(self.annotations.sizes[row]),
        }


class EpochBatchSampler(Sampler):
    """This rank's batches of ``(epoch, index)`` keys. Incomplete batches at the end of an epoch are dropped.

    The order of an epoch depends on the seed and the epoch alone, and a step's global batch on nothing else but its
    size. ``select`` says which epoch comes next, and which of its steps.

    Raises:
        DataError: the data set is smaller than one global batch.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.steps_per_epoch = num_images // (batch_size * world_size)
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{num_images} training images do not fill one batch of {batch_size} on {world_size} process(es): "
                "lower --batch-size"
            )
        self.select(epoch=0)

    def select(self, epoch: int, first_step: int = 0, last_step: int | None = None) -> None:
        """Lets the next iteration yield the steps ``first_step`` to ``last_step`` (exclusive) of ``epoch``."""
        self.epoch = epoch
        self.first_step = first_step
        self.last_step = self.steps_per_epoch if last_step is None else min(last_step, self.steps_per_epoch)

    def __len__(self) -> int:
        return self.last_step - self.first_step

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_images)
        for step in range(self.first_step, self.last_step):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, int(index)) for index in order[start : start + self.batch_size]]


def collate(samples: list[dict]) -> dict:
    """Stacks samples; boxes and labels are padded to [B, G, 4] and [B, G], where label 0 marks an empty slot."""
    padded = {key: [sample.pop(key) for sample in samples] for key in ("boxes", "labels") if key in samples[0]}
    batch = default_collate(samples)
    return batch | {key: pad_sequence(tensors, batch_first=True) for key, tensors in padded.items()}


def detections_to_array(image_id: int, detections: dict[str, Tensor], category_id_of: dict[int, int]) -> ndarray:
    """One image's detections as COCO's array format: float64 [N, 7] of image id, x, y, w, h, score, category id.

    Detections of labels without category (11 of the 90 of a COCO model) are left out; COCO's API would ignore them.
    """
    labels = detections["labels"].tolist()
    kept = [i for i, label in enumerate(labels) if label in category_id_of]
    boxes, scores = (detections[key].double().cpu().numpy()[kept] for key in ("boxes", "scores"))
    category_ids = [category_id_of[labels[i]] for i in kept]
    return np.column_stack(
        [np.full(len(kept), image_id), boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores, category_ids]
    )


def write_results(path: str | Path, detections: ndarray) -> None:
    """Writes an array of detections [N, 7] in COCO's results format."""
    results = [
        {"image_id": int(image_id), "category_id": int(category_id), "bbox": box, "score": score}
        for image_id, *box, score, category_id in detections.tolist()
    ]
    Path(path).write_text(json.dumps(results))


def ground_truth(annotations: CocoAnnotations) -> dict:
    """The annotations as COCO's API wants them for scoring boxes."""
    image_of_box = np.repeat(annotations.image_ids, np.diff(annotations.offsets))
    columns = (annotations.annotation_ids, image_of_box, annotations.category_ids, annotations.boxes)
    columns = [column.tolist() for column in (*columns, annotations.areas, annotations.is_crowd.astype(int))]
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    return {
        "images": [{"id": image_id} for image_id in annotations.image_ids.tolist()],
        "annotations": [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)],
        "categories": [{"id": category_id, "name": name} for category_id, name in annotations.categories.items()],
    }


def score_detections(annotations: CocoAnnotations, detections: ndarray, scorer: str) -> dict:
    """Scores an array of detections [N, 7] as COCO does.

    Args:
        annotations: the ground truth, crowds and images without boxes included.
        detections: what ``detections_to_array`` made, for all images.
        scorer: ``pycocotools``, which gives the published figure, or ``hotcoco``, which gives the same much faster.

    Returns:
        The twelve COCO metrics by name (None where there is no ground truth to measure), ``per_class`` AP by category
        name, and ``counts`` of images, boxes (crowds included) and detections.
    """
    if scorer == "hotcoco":
        from hotcoco import COCO, COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    truth = ground_truth(annotations)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_of(COCO, truth)
        results = coco.loadRes(detections) if len(detections) else coco_of(COCO, truth | {"annotations": []})
        evaluator = COCOeval(coco, results, "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    precision = evaluator.eval["precision"][:, :, :, 0, -1]  # IoUs, recalls, categories; all areas, 100 detections
    per_class = {
        annotations.categories[category_id]: known_or_none(precision[:, :, k].mean())
        for k, category_id in enumerate(evaluator.params.catIds)
    }
    metrics = {name: known_or_none(value) for name, value in zip(METRICS, evaluator.stats, strict=True)}
    counts = {"images": len(annotations.image_ids), "boxes": len(annotations.boxes), "detections": len(detections)}
    return metrics | {"per_class": per_class, "counts": counts}


def format_table(metrics: dict) -> str:
    """The twelve metrics as COCO's own code prints them."""
    kinds = {"AP": "Average Precision  (AP)", "AR": "Average Recall     (AR)"}
    areas = {"s": "small", "m": "medium", "l": "large"}
    lines = []
    for name in METRICS:
        kind, detail = kinds[name[:2]], name[2:]
        iou = f"0.{detail}" if detail in ("50", "75") else "0.50:0.95"
        max_detections = detail if detail in ("1", "10") else "100"
        value = "n/a" if metrics[name] is None else f"{metrics[name]:.3f}"
        lines.append(
            f" {kind} @[ IoU={iou:9} | area={areas.get(detail, 'all'):>6} | maxDets={max_detections:>3} ] = {value}"
        )
    return "\n".join(lines)


def coco_of(coco_class, content: dict):
    """A COCO object of either library from a dict; ``pycocotools`` takes only a file in its constructor."""
    coco = coco_class()
    coco.dataset = content
    coco.createIndex()
    return coco


def known_or_none(value: float) -> float | None:
    """COCO says -1 where there is nothing to measure; no average should ever include it."""
    return None if value == -1 or math.isnan(value) else float(value)
