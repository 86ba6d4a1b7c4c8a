"""Matching and loss alone: from the heads' outputs to their gradients, ours against torchvision's.

    python -m benchmarks.loss [--batch-size N] [--device cpu|cuda] [--rounds N]

Images have 8 to 90 boxes, a hard case (COCO has 7 on average); ours gets them padded to as many slots as the image with
most boxes needs. Each variant has a process of its own; they take turns, and the fastest round counts. The last line is
one JSON object.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection import ssd300_vgg16
from torchvision.ops import box_iou

import ssd
from benchmarks.turns import take_turns
from engine import flags

NUM_CLASSES = 91
BOXES_PER_IMAGE = (8, 90)
STEPS = {"cpu": 3, "cuda": 50}

losses_of_variant: Callable[[], dict[str, Tensor]]  # of this process
predictions: list[Tensor]
device: torch.device


def make_objects(batch_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Boxes and labels of each image."""
    generator = torch.Generator().manual_seed(0)
    low, high = BOXES_PER_IMAGE
    boxes, labels = [], []
    for number in torch.randint(low, high + 1, (batch_size,), generator=generator).tolist():
        corners = torch.rand(number, 2, generator=generator) * 200
        sides = 10 + torch.rand(number, 2, generator=generator) * 90
        boxes.append(torch.cat((corners, corners + sides), dim=1).to(device))
        labels.append(torch.randint(1, NUM_CLASSES, (number,), generator=generator).to(device))
    return boxes, labels


def ours(outputs: dict[str, Tensor], boxes: list[Tensor], labels: list[Tensor], compiled: bool) -> Callable:
    model = ssd.get_model("ssd300_vgg16", weights_backbone=None, num_classes=NUM_CLASSES).to(device)
    compute_loss = torch.compile(model.compute_loss, fullgraph=True) if compiled else model.compute_loss
    boxes, labels = pad_sequence(boxes, batch_first=True), pad_sequence(labels, batch_first=True)
    return lambda: compute_loss(outputs, boxes, labels)


def peer(outputs: dict[str, Tensor], boxes: list[Tensor], labels: list[Tensor]) -> Callable:
    model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=NUM_CLASSES)
    default_boxes = ssd.get_model("ssd300_vgg16", weights_backbone=None, num_classes=NUM_CLASSES).default_boxes.to(
        device
    )
    targets = [{"boxes": b, "labels": n} for b, n in zip(boxes, labels, strict=True)]

    def losses() -> dict[str, Tensor]:
        matches = [model.proposal_matcher(box_iou(target["boxes"], default_boxes)) for target in targets]
        return model.compute_loss(targets, outputs, [default_boxes] * len(targets), matches)

    return losses


VARIANTS = {"ours": partial(ours, compiled=False), "ours compiled": partial(ours, compiled=True), "peer": peer}


def start(name: str, device_name: str, batch_size: int) -> None:
    global losses_of_variant, predictions, device
    device = torch.device(device_name)
    generator = torch.Generator().manual_seed(1)
    num_boxes = 8732
    predictions = [
        torch.randn(batch_size, num_boxes, columns, generator=generator).to(device).requires_grad_()
        for columns in (NUM_CLASSES, 4)
    ]
    outputs = dict(zip(("cls_logits", "bbox_regression"), predictions, strict=True))
    losses_of_variant = VARIANTS[name](outputs, *make_objects(batch_size))
    step()


def step() -> Tensor:
    """The loss of one forward and backward pass."""
    loss = sum(losses_of_variant().values())
    loss.backward()
    for prediction in predictions:
        prediction.grad = None
    return loss.detach()


def measure() -> dict[str, float]:
    begin = time.perf_counter()
    for _ in range(STEPS[device.type]):
        loss = step()
    loss = loss.item()  # waits for the device
    return {"ms": 1000 * (time.perf_counter() - begin) / STEPS[device.type], "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=flags.positive, default=32)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=flags.positive, default=7)
    args = parser.parse_args()
    names = [name for name in VARIANTS if name != "ours compiled" or args.device == "cuda" or shutil.which("g++")]
    variants = {name: (name, args.device, args.batch_size) for name in names}
    rounds = take_turns(start, measure, variants, args.rounds)
    fastest = {name: min(one["ms"] for one in rounds[name]) for name in names}
    for name in names:
        print(f"{name:15} {fastest[name]:8.2f} ms   loss {rounds[name][0]['loss']:.6f}")
    ratios = {f"{name} / peer": fastest["peer"] / fastest[name] for name in names if name != "peer"}
    for name, ratio in ratios.items():
        print(f"{name:25} {ratio:.2f} times as fast")
    print(json.dumps({"device": args.device, "batch_size": args.batch_size, "ms": fastest, **ratios}))


if __name__ == "__main__":
    main()
