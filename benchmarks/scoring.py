"""Scoring: seconds and memory for the twelve numbers of COCO, with hotcoco, with pycocotools and as torchvision does.

    python -m benchmarks.scoring [--images N] [--detections N] [--rounds N]

It makes annotations of val2017's size, some 36,000 boxes of 80 classes in 5,000 images, among them crowds and images
without boxes, and 180 detections per image, some of them near a box of their class. Three ways to score them:

* pycocotools per image: torchvision's references/detection, which match each image's detections when they come;
* pycocotools: scoring.score_detections, all images at once;
* hotcoco: the same with the other scorer.

Each measurement is a process of its own, with the annotations read and the detections in memory: seconds until the
twelve numbers are there, the memory that this added, and the most that the process ever had, PyTorch included. The
fastest round counts, and the numbers of all three are compared. The last line is one JSON object.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy import ndarray

import coco
from benchmarks.memory import peak_memory, resident_memory
from benchmarks.torchvision_scorer import PerImageScorer, largest_difference
from benchmarks.turns import in_new_process
from coco import scoring
from engine import flags

NUM_CLASSES = 80
WIDTH, HEIGHT = 640, 480
BOXES_PER_IMAGE = 7.3
SHARE_EMPTY = 0.01  # of the images
SHARE_CROWDS = 0.012  # of the boxes
# the side of a square of an object's area is distributed so that 41 % of the objects are small, 24 % are large
LOG_SIDE, LOG_SIDE_DEVIATION = 3.73, 1.18
SHARE_FOUND = 0.7  # of the boxes
JITTER = 0.12  # of a side
TOLERANCE = 1e-12


def draw_boxes(rng: np.random.Generator, num_boxes: int) -> tuple[ndarray, ndarray]:
    """Boxes [N, 4], xywh, with the sizes of COCO's, and the area of the object in each."""
    side = np.exp(rng.normal(LOG_SIDE, LOG_SIDE_DEVIATION, num_boxes))
    filled = rng.uniform(0.4, 0.9, num_boxes)  # by the object
    stretch = np.exp(rng.normal(0, 0.4, num_boxes))
    sizes = np.stack((side * stretch, side / stretch), axis=1) / np.sqrt(filled)[:, None]
    sizes = sizes.clip(2, (WIDTH, HEIGHT))
    corners = rng.uniform(0, 1, (num_boxes, 2)) * ((WIDTH, HEIGHT) - sizes)
    return np.concatenate((corners, sizes), axis=1).round(2), (sizes.prod(axis=1) * filled).round(2)


def draw_classes(rng: np.random.Generator, number: int) -> ndarray:
    """A few of them are frequent."""
    weights = 1 / np.arange(1, NUM_CLASSES + 1)
    return rng.choice(np.arange(1, NUM_CLASSES + 1), number, p=weights / weights.sum())


def write_annotations(path: Path, num_images: int) -> None:
    rng = np.random.default_rng(0)
    num_boxes = np.where(rng.random(num_images) < SHARE_EMPTY, 0, rng.geometric(1 / BOXES_PER_IMAGE, num_images))
    image_ids = np.repeat(np.arange(1, num_images + 1), num_boxes)
    boxes, areas = draw_boxes(rng, len(image_ids))
    is_crowd = (rng.random(len(image_ids)) < SHARE_CROWDS).astype(int)
    columns = (np.arange(1, len(image_ids) + 1), image_ids, draw_classes(rng, len(image_ids)), boxes, areas, is_crowd)
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    rows = zip(*(column.tolist() for column in columns), strict=True)
    content = {
        "images": [
            {"id": i, "file_name": f"{i:012d}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(1, num_images + 1)
        ],
        "annotations": [dict(zip(keys, row, strict=True)) for row in rows],
        "categories": [{"id": i, "name": f"thing {i}"} for i in range(1, NUM_CLASSES + 1)],
    }
    path.write_text(json.dumps(content))


def draw_detections(annotations: coco.CocoAnnotations, per_image: int) -> ndarray:
    """The best ``per_image`` detections of each image, [N, 7]: some near a box of their class, the rest anywhere."""
    rng = np.random.default_rng(1)
    image_of_box = np.repeat(annotations.image_ids, np.diff(annotations.offsets))
    found = np.flatnonzero(rng.random(len(image_of_box)) < SHARE_FOUND)
    near = annotations.boxes[found]
    near = near + rng.normal(0, JITTER, near.shape) * near[:, [2, 3, 2, 3]]
    near[:, 2:] = near[:, 2:].clip(1)
    image_ids = np.repeat(annotations.image_ids, per_image)
    anywhere, _ = draw_boxes(rng, len(image_ids))
    scores = np.concatenate((rng.beta(2, 2, len(near)), 0.01 + 0.99 * rng.beta(1, 15, len(anywhere))))
    detections = np.column_stack(
        [
            np.concatenate((image_of_box[found], image_ids)),
            np.concatenate((near, anywhere)),
            scores.astype(np.float32),  # a model's
            np.concatenate((annotations.category_ids[found], draw_classes(rng, len(anywhere)))),
        ]
    )
    detections = detections[np.lexsort((-detections[:, 5], detections[:, 0]))]
    first_of_image = np.searchsorted(detections[:, 0], detections[:, 0])
    return detections[np.arange(len(detections)) - first_of_image < per_image]


def write_data(folder: Path, num_images: int, per_image: int) -> dict[str, int]:
    """What the measurements read: annotations, their index, and detections. Returns how many of each there are."""
    write_annotations(folder / "instances.json", num_images)
    annotations = coco.read_annotations(folder / "instances.json", folder)
    detections = draw_detections(annotations, per_image)
    np.save(folder / "detections.npy", detections)
    num_crowds, num_empty = int(annotations.is_crowd.sum()), int((np.diff(annotations.offsets) == 0).sum())
    counts = {"images": len(annotations.image_ids), "without_boxes": num_empty}
    return counts | {"boxes": len(annotations.boxes), "crowds": num_crowds, "detections": len(detections)}


def measure(score: Callable[[], dict]) -> dict:
    before = resident_memory()
    start = time.perf_counter()
    metrics = score()
    seconds = time.perf_counter() - start
    metrics = {name: metrics[name] for name in scoring.METRICS}
    return {"seconds": seconds, "added_MiB": peak_memory() - before, "peak_MiB": peak_memory(), "metrics": metrics}


def measure_ours(folder: Path, scorer: str) -> dict:
    annotations = coco.read_annotations(folder / "instances.json", folder)
    detections = np.load(folder / "detections.npy")
    return measure(lambda: scoring.score_detections(annotations, detections, scorer).metrics)


def measure_per_image(folder: Path) -> dict:
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(folder / "instances.json")
    detections = np.load(folder / "detections.npy")

    def score() -> dict:
        scorer = PerImageScorer(coco)
        until = np.searchsorted(detections[:, 0], coco.getImgIds(), side="right")
        for image_id, rows in zip(coco.getImgIds(), np.split(detections, until[:-1]), strict=True):
            results = [
                {"image_id": image_id, "category_id": int(category_id), "bbox": box, "score": score}
                for _, *box, score, category_id in rows.tolist()
            ]
            scorer.update(image_id, results)
        return scorer.metrics()

    return measure(score)


VARIANTS = {
    "pycocotools per image": (measure_per_image,),
    "pycocotools": (measure_ours, "pycocotools"),
    "hotcoco": (measure_ours, "hotcoco"),
}


def measure_variants(folder: Path, num_rounds: int) -> dict[str, dict]:
    """The fastest round of each variant, with the seconds of all."""
    rounds = {name: [] for name in VARIANTS}
    for _ in range(num_rounds):
        for name, (function, *arguments) in VARIANTS.items():
            rounds[name].append(in_new_process(function, folder, *arguments))
    return {
        name: min(results, key=lambda one: one["seconds"]) | {"all_seconds": [one["seconds"] for one in results]}
        for name, results in rounds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=flags.positive, default=5000)
    parser.add_argument("--detections", type=flags.positive, default=180, help="of each image")
    parser.add_argument("--rounds", type=flags.positive, default=1, help="they take minutes (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = in_new_process(write_data, Path(folder), args.images, args.detections)
        print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
        results = measure_variants(Path(folder), args.rounds)
    ours = results["hotcoco"]
    differences, ratios = {}, {}
    for name, result in results.items():
        print(
            f"{name:22} {result['seconds']:7.2f} s   {result['added_MiB']:6.0f} MiB added, "
            f"{result['peak_MiB']:6.0f} MiB at most   AP {result['metrics']['AP']:.6f}"
        )
        if result is not ours:
            ratios[f"{name} / hotcoco"] = {key: result[key] / ours[key] for key in ("seconds", "peak_MiB")}
            differences[f"{name}, hotcoco"] = largest_difference(result["metrics"], ours["metrics"])
    for name, ratio in ratios.items():
        print(f"{name:32} {ratio['seconds']:5.1f} times the seconds, {ratio['peak_MiB']:4.1f} times the memory")
    for names, difference in differences.items():
        verdict = "equal" if difference <= TOLERANCE else "NOT EQUAL"
        print(f"largest difference of the twelve numbers of {names}: {difference:.1e}, {verdict} to {TOLERANCE}")
    print(json.dumps({"data": counts, "variants": results, "ratios": ratios, "differences": differences}))


if __name__ == "__main__":
    main()
