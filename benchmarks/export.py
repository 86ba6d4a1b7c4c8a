"""What export costs: exported files beside the checkpoint that they were made from.

    python -m benchmarks.export --checkpoint out/best.pth --data-path photos [flags of evaluate.py]

Exports both parts in both formats, and detects with each file and with PyTorch on the validation set, from resized
images in memory to detections, on the CPU. Each has a process of its own; they take turns, and the fastest round
counts. Detections of a file are compared with those of PyTorch: each with the one of its class that is nearest, which
must be within a pixel. The last line is one JSON object of all that is known.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

import evaluate
import ssd
from benchmarks.turns import Variants
from coco import CocoAnnotations, scoring
from engine import checkpoints, inference
from engine.exported import ExportedDetector

NEAR = 1.0  # pixels
PYTORCH = "PyTorch"

model: ssd.SSD | ExportedDetector  # of this process
batches: list[tuple[Tensor, Tensor]]  # images and their sizes
image_ids: list[int]
category_id_of: dict[int, int]


def open_annotations(args: argparse.Namespace, classes: list[dict] | None) -> tuple[CocoAnnotations, Path]:
    split = evaluate.find_splits(args, "val")["val"]
    annotations = split.open(Path(args.output_dir) / "annotations", needs_images=True, needs_annotations=True)
    return checkpoints.check_knows(model, classes, args.checkpoint or args.detector, annotations), split.images_dir


def start(args: argparse.Namespace) -> None:
    global model, batches, image_ids, category_id_of
    model, classes = evaluate.open_model(args, torch.device("cpu"))
    model.eval()
    annotations, images_dir = open_annotations(args, classes)
    dataset = evaluate.make_validation_set(args, model, annotations, images_dir)
    samples = [dataset[row] for row in range(len(dataset))]
    images, sizes = (torch.stack([sample[key] for sample in samples]) for key in ("image", "size"))
    batches = list(zip(images.split(args.batch_size), sizes.split(args.batch_size), strict=True))
    image_ids = [sample["image_id"] for sample in samples]
    category_id_of = annotations.category_id_of


@torch.inference_mode()
def measure() -> tuple[float, ndarray]:
    """Seconds, and detections [N, 7]."""
    begin = time.perf_counter()
    found = []
    for images, sizes in batches:
        outputs = inference.predict(model, images, len(batches[0][0]))
        found += model.postprocess_detections(outputs, sizes)
    seconds = time.perf_counter() - begin
    pairs = zip(image_ids, found, strict=True)
    return seconds, np.concatenate([scoring.detections_to_array(i, one, category_id_of) for i, one in pairs])


def compare(detections: ndarray, expected: ndarray) -> dict:
    """The largest differences of boxes, in pixels, and of scores; and how many detections have no like."""
    boxes, scores, alone = [0.0], [0.0], 0
    for some, others, is_first in ((expected, detections, True), (detections, expected, False)):
        for image_id, category_id in np.unique(some[:, [0, 6]], axis=0):
            one, other = (x[(x[:, 0] == image_id) & (x[:, 6] == category_id)] for x in (some, others))
            gaps = np.abs(one[:, None, 1:6] - other[None, :, 1:6])  # [N, M, x, y, width, height and score]
            # in pixels, and of boxes that are as near the one whose score is
            distance = gaps[..., :4].max(axis=2, initial=0) + gaps[..., 4]
            nearest = distance.argmin(axis=1) if len(other) else np.zeros(len(one), int)
            is_near = distance.min(axis=1, initial=np.inf) < NEAR
            alone += int((~is_near).sum())
            if is_first and is_near.any():
                gaps = gaps[is_near, nearest[is_near]]
                boxes.append(gaps[:, :4].max())
                scores.append(gaps[:, 4].max())
    return {"box difference": max(boxes), "score difference": max(scores), "without like": alone}


def export_all(args: argparse.Namespace, folder: Path) -> dict[str, argparse.Namespace]:
    """What each variant gets, by name."""
    variants = {PYTORCH: args}
    of_files = {"checkpoint": None, "input_scaling": "default", "default_boxes": "default", "model": None}
    for part in ssd.EXPORT_OUTPUTS:
        for suffix in (".onnx", ".pt2"):
            file = folder / f"{part}{suffix}"
            evaluate.export(argparse.Namespace(**vars(args) | {"export": str(file), "export_part": part}))
            variants[file.name] = argparse.Namespace(**vars(args) | of_files | {"detector": str(file)})
    return variants


def main() -> None:
    global model
    parser = evaluate.get_args_parser()
    parser.description = __doc__
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        variants = export_all(args, Path(folder))
        with Variants(start, {name: (one,) for name, one in variants.items()}) as started:
            rounds = started.take_turns(measure, args.rounds)
        model, classes = evaluate.open_model(args, torch.device("cpu"))
        annotations, _ = open_annotations(args, classes)
        expected = rounds[PYTORCH][0][1]
        report = {}
        for name, measured in rounds.items():
            size = Path(args.checkpoint if name == PYTORCH else variants[name].detector).stat().st_size
            seconds = min(seconds for seconds, _ in measured)
            detections = measured[0][1]
            report[name] = {
                "MB": size / 1e6,
                "images/s": len(annotations.image_ids) / seconds,
                "times PyTorch's speed": min(one for one, _ in rounds[PYTORCH]) / seconds,
                "AP": scoring.score_detections(annotations, detections, "hotcoco").metrics["AP"],
                "detections": len(detections),
                **compare(detections, expected),
            }
            print(f"{name:16}", "  ".join(f"{key} {value:.4g}" for key, value in report[name].items()))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
