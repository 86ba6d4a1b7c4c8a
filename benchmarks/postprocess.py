"""Post-processing: from predictions to detections, ours against torchvision's loop over images and classes.

    python -m benchmarks.postprocess [--batch-size N ...] [--device cpu|cuda] [--rounds N]

Predictions are random, as an untrained model's, where nearly every score is over the threshold, or like a trained
model's: some 2,000 scores per image over it, around a few objects, with confused classes; or, if --predictions asks for
it, like those of a model that has collapsed. Both sides get the same, and their detections are compared. Each has a
process of its own; they take turns, and the fastest round counts. The last line
is one JSON object of all that is known.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.models.detection import ssd300_vgg16

import ssd
from benchmarks.turns import take_turns
from engine import flags

NUM_CLASSES = 91
SIZE = 300
STEPS = {"cpu": 2, "cuda": 3}  # torchvision needs a second for a batch of 128
# logits of a trained model, chosen so that some 2,000 scores per image are over the threshold
BACKGROUND_LOGIT, NOISE, OBJECT_LOGIT, CONFUSED_LOGIT = 7.6, 0.8, 15.0, 9.0
NEAR_IOU = 0.3

postprocess: Callable[[], list[dict[str, Tensor]]]  # of this process
device: torch.device


def random_predictions(model: ssd.SSD, batch_size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, len(model.default_boxes))
    return {
        "cls_logits": torch.randn(*shape, NUM_CLASSES, generator=generator),
        "bbox_regression": torch.randn(*shape, 4, generator=generator),
    }


def trained_predictions(model: ssd.SSD, batch_size: int) -> dict[str, Tensor]:
    """A few objects in each image, and two other classes that each is confused with."""
    generator = torch.Generator().manual_seed(0)
    predictions = random_predictions(model, batch_size)
    logits, offsets = NOISE * predictions["cls_logits"], 0.3 * predictions["bbox_regression"]
    logits[..., 0] += BACKGROUND_LOGIT
    for i in range(batch_size):
        number = int(torch.randint(3, 12, (1,), generator=generator))
        corners = 220 * torch.rand(number, 2, generator=generator)
        ends = (corners + 20 + 100 * torch.rand(number, 2, generator=generator)).clamp(max=SIZE)
        objects, labels = torch.cat((corners, ends), dim=1), torch.randint(1, 91, (number,), generator=generator)
        iou, slots = ssd.pairwise_iou(objects, model.default_boxes).max(dim=0)
        near = (iou > NEAR_IOU).nonzero().squeeze(1)
        iou, slots = iou[near], slots[near]
        offsets[i, near] += model.box_coder.encode(objects[slots], model.default_boxes[near])
        logits[i, near, labels[slots]] += OBJECT_LOGIT * iou
        for shift in (7, 14):
            logits[i, near, (labels[slots] + shift - 1) % 90 + 1] += CONFUSED_LOGIT * iou
    return {"cls_logits": logits, "bbox_regression": offsets}


def collapsed_predictions(model: ssd.SSD, batch_size: int) -> dict[str, Tensor]:
    """Nearly the same box with nearly the same scores everywhere, so that all candidates must be tried."""
    predictions = random_predictions(model, batch_size)
    boxes = torch.tensor([30.0, 40, 250, 260]) + 2 * predictions["bbox_regression"]
    return {
        "cls_logits": 0.01 * predictions["cls_logits"],
        "bbox_regression": model.box_coder.encode(boxes, model.default_boxes),
    }


PREDICTIONS = {"random": random_predictions, "trained": trained_predictions, "collapsed": collapsed_predictions}


def start(side: str, kind: str, device_name: str, batch_size: int) -> None:
    global postprocess, device
    device = torch.device(device_name)
    model = ssd.get_model("ssd300_vgg16", weights_backbone=None, num_classes=NUM_CLASSES)
    outputs = {name: value.to(device) for name, value in PREDICTIONS[kind](model, batch_size).items()}
    model = model.to(device)
    if side == "ours":
        sizes = torch.full((batch_size, 2), SIZE, device=device)
        postprocess = torch.no_grad()(lambda: model.postprocess_detections(outputs, sizes))
    else:
        peer = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
        sizes, anchors = [(SIZE, SIZE)] * batch_size, [model.default_boxes] * batch_size
        postprocess = torch.no_grad()(lambda: peer.postprocess_detections(outputs, anchors, sizes))
    postprocess()


def measure() -> dict:
    begin = time.perf_counter()
    for _ in range(STEPS[device.type]):
        detections = postprocess()
    if device.type == "cuda":
        torch.cuda.synchronize()
    milliseconds = 1000 * (time.perf_counter() - begin) / STEPS[device.type] / len(detections)
    return {"ms": milliseconds, "detections": [{k: v.cpu() for k, v in one.items()} for one in detections]}


def count_differences(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> int:
    """Images whose detections are not the same: labels equal, boxes within 0.001 pixels, scores within 0.00001."""
    return sum(
        not torch.equal(a["labels"], b["labels"])
        or bool((a["boxes"] - b["boxes"]).abs().max() > 1e-3)
        or bool((a["scores"] - b["scores"]).abs().max() > 1e-5)
        for a, b in zip(first, second, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=flags.positive, nargs="+", default=[1, 16])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=flags.positive, default=5)
    parser.add_argument("--predictions", choices=list(PREDICTIONS), nargs="+", default=["random", "trained"])
    args = parser.parse_args()
    report = {"device": args.device}
    for kind in args.predictions:
        for batch_size in args.batch_size:
            variants = {side: (side, kind, args.device, batch_size) for side in ("ours", "torchvision")}
            rounds = take_turns(start, measure, variants, args.rounds)
            ours, theirs = (min(one["ms"] for one in rounds[side]) for side in variants)
            differences = count_differences(rounds["ours"][0]["detections"], rounds["torchvision"][0]["detections"])
            print(
                f"{kind:8} batch {batch_size:3}: ours {ours:7.2f} ms per image, torchvision {theirs:7.2f}, "
                f"ratio {theirs / ours:.2f}; images with other detections: {differences}"
            )
            report[f"{kind}, batch {batch_size}"] = {"ours": ours, "torchvision": theirs, "ratio": theirs / ours}
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
