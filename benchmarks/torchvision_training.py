"""torchvision's SSD300-VGG16 in the loop of its references/detection, in our words, with the flags of train.py.

    python -m benchmarks.torchvision_training --data-path DIR --weights-backbone FILE --output-dir DIR [flags]

DIR is in COCO's layout. Of train.py's flags those count that the references have: their loop, transforms (v2), loader,
warm-up, schedule, fp16 with --amp, and evaluation after each epoch, here after each --eval-freq. Left out is what costs
them time and changes nothing here: masks, groups of aspect ratio, and the models of all epochs. --weights-backbone is a
file, or 'none'. Writes metrics.jsonl with train.py's keys, whose last line has the seconds from the first step on.
"""

import contextlib
import io
import json
import math
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from torchvision.models.detection import ssd300_vgg16
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

import evaluate
import train
from benchmarks.evaluation import ReferenceDataset, collate_to_tuples, run_reference
from coco import scoring

MEAN = (123.0, 117.0, 104.0)


class TrainingSet(ReferenceDataset):
    """Images that have objects, augmented as the preset ``ssd`` of the references does."""

    def __init__(self, images_dir: Path, annotations_file: Path):
        super().__init__(images_dir, annotations_file)
        self.ids = [image_id for image_id in self.ids if any(map(self.is_used, self._load_target(image_id)))]
        self.augment = v2.Compose(
            [
                v2.RandomPhotometricDistort(),
                v2.RandomZoomOut(fill=list(MEAN)),
                v2.RandomIoUCrop(),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.SanitizeBoundingBoxes(),
                v2.ToPureTensor(),
            ]
        )

    @staticmethod
    def is_used(annotation: dict) -> bool:
        return annotation["iscrowd"] == 0 and min(annotation["bbox"][2:]) > 1

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        image = self._load_image(self.ids[index])
        objects = [one for one in self._load_target(self.ids[index]) if one["iscrowd"] == 0]
        boxes = torch.tensor([one["bbox"] for one in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = BoundingBoxes(boxes, format="XYXY", canvas_size=(image.height, image.width))
        labels = torch.tensor([one["category_id"] for one in objects], dtype=torch.int64)
        return self.augment(image, {"boxes": v2.functional.clamp_bounding_boxes(boxes), "labels": labels})


def make_model(weights_backbone: str, num_classes: int) -> nn.Module:
    """With the first stage frozen, as torchvision freezes it of a backbone that comes with weights."""
    model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=num_classes)
    if weights_backbone == "none":
        return model
    vgg = torch.load(weights_backbone, map_location="cpu", weights_only=True)
    backbone = model.backbone
    with torch.no_grad():
        for key, value in vgg.items():
            _, layer, part = key.split(".")
            # conv5, of 24, 26 and 28 in VGG16, comes after a pool in a block of its own
            module = backbone.features[int(layer)] if int(layer) < 23 else backbone.extra[0][int(layer) - 23]
            getattr(module, part).copy_(value)
    for layer in (0, 2):
        backbone.features[layer].requires_grad_(False)
    return model


def make_optimizer(args: Namespace, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if args.opt == "adamw":
        return torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay)
    nesterov = args.opt == "sgd_nesterov"
    return torch.optim.SGD(parameters, args.lr, args.momentum, weight_decay=args.weight_decay, nesterov=nesterov)


def make_schedule(args: Namespace, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    if args.lr_scheduler == "cosineannealinglr":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, args.lr_steps, args.lr_gamma)


def train_one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    is_first: bool,
) -> list[float]:
    """The losses of all steps; the rate rises in the first epoch."""
    model.train()
    warmup, steps = None, min(1000, len(loader) - 1)
    if is_first:
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 1000, total_iters=steps)
    values = []
    for images, targets in loader:
        images = [image.to(device) for image in images]
        targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
        with torch.autocast(device.type, enabled=scaler.is_enabled()):
            losses = model(images, targets)
            loss = sum(losses.values())
        values.append(loss.item())
        if not math.isfinite(values[-1]):
            sys.exit(f"Loss is {values[-1]}, stopping training")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if warmup is not None:
            warmup.step()
        for value in (loss, *losses.values()):  # its log reads each in every step
            value.item()
    return values


def main() -> None:
    args = train.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(args.seed)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    splits = evaluate.find_splits(args, "train", "val")
    with contextlib.redirect_stdout(io.StringIO()):
        training_set = TrainingSet(splits["train"].images_dir, splits["train"].source.path)
        val_set = ReferenceDataset(splits["val"].images_dir, splits["val"].source.path)
    num_classes = 1 + max(training_set.coco.cats)
    model = make_model(args.weights_backbone, num_classes).to(device)
    optimizer = make_optimizer(args, model)
    schedule = make_schedule(args, optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp is not None)
    batches = BatchSampler(RandomSampler(training_set), args.batch_size, drop_last=True)
    loader = DataLoader(training_set, batch_sampler=batches, num_workers=args.workers, collate_fn=collate_to_tuples)
    val_loader = DataLoader(val_set, batch_size=1, num_workers=args.workers, collate_fn=collate_to_tuples)
    begin = time.perf_counter()
    with open(output_dir / "metrics.jsonl", "w") as log:
        for epoch in range(args.epochs):
            losses = train_one_epoch(model, optimizer, loader, scaler, device, is_first=epoch == 0)
            schedule.step()
            step = (epoch + 1) * len(loader)
            record = {"kind": "train", "step": step, "epoch": epoch, "loss": sum(losses) / len(losses)}
            print(json.dumps(record), file=log, flush=True)
            if epoch + 1 == args.epochs or (args.eval_freq and (epoch + 1) % args.eval_freq == 0):
                found = run_reference_on(model, val_loader, device)
                print(json.dumps({"kind": "val", "step": step, "epoch": epoch} | found), file=log, flush=True)
        seconds = time.perf_counter() - begin
        print(json.dumps({"kind": "end", "seconds": seconds}), file=log, flush=True)
    print(json.dumps({"seconds": seconds, "AP": found["AP"], "AP50": found["AP50"]}))


def run_reference_on(model: nn.Module, loader: DataLoader, device: torch.device) -> dict:
    found = run_reference(model, loader, num_threads=1, device=device)
    return {name: found[name] for name in scoring.METRICS}


if __name__ == "__main__":
    main()
