"""torchvision's SSD300 in the loop of its references/detection, in our words, with the flags of train.py.

    python -m benchmarks.torchvision_training --data-path DIR --weights-backbone FILE --output-dir DIR [flags]

DIR is in COCO's layout, FILE has VGG16's weights or is 'none'; --model ssd300_resnet18 hands our ResNet-18 to its SSD,
without weights. Images and boxes are read as their first version does,
and augmented by their second, transforms v2. Left out is what costs them time and changes nothing here: masks, groups
of aspect ratio, and the models of all epochs. A recipe's values count as far as the references have such a flag; flags
that would make another training of it are refused. --amp is fp16, as there. Writes metrics.jsonl with train.py's keys,
whose last line has the seconds from the first step on.
"""

import contextlib
import io
import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from torchvision.models import vgg16
from torchvision.models.detection import ssd300_vgg16
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD, _vgg_extractor
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

import evaluate
import ssd
import train
from benchmarks.evaluation import ReferenceDataset, collate_to_tuples, run_reference
from coco import scoring
from ssd.default_boxes import guess_default_boxes
from ssd.model import grid_sizes

MEAN = [123.0, 117.0, 104.0]
# what of train.py's flags has few values here
FIXED = {
    "model": ("ssd300_resnet18", "ssd300_vgg16"),
    "weights": (None, "none"),
    "data_augmentation": ("ssd",),
    "trainable_backbone_layers": (None, 4),
    "freeze_backbone": (False,),
    "norm_weight_decay": (None,),
    "accumulate": (1,),
    "max_steps": (None,),
}


class TrainingSet(ReferenceDataset):
    """Images that have boxes of some size, augmented as the preset ``ssd`` of the references does."""

    def __init__(self, images_dir: Path, annotations_file: Path):
        super().__init__(images_dir, annotations_file)
        self.ids = [image_id for image_id in self.ids if self.has_boxes(self._load_target(image_id))]
        self.augment = v2.Compose(
            [
                v2.RandomPhotometricDistort(),
                v2.RandomZoomOut(fill=MEAN),
                v2.RandomIoUCrop(),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.SanitizeBoundingBoxes(),
                v2.ToPureTensor(),
            ]
        )

    @staticmethod
    def has_boxes(annotations: list[dict]) -> bool:
        """Of crowds too, which are not trained on."""
        return any(min(one["bbox"][2:]) > 1 for one in annotations)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        image, boxes, labels = self.load(index)
        boxes = BoundingBoxes(boxes, format="XYXY", canvas_size=(image.height, image.width))
        return self.augment(image, {"boxes": v2.functional.clamp_bounding_boxes(boxes), "labels": labels})


class ResNetOfOurs(nn.Module):
    """Our extractor as torchvision's SSD wants a backbone, and its default boxes."""

    def __init__(self):
        super().__init__()
        model = ssd.get_model("ssd300_resnet18", weights_backbone=None)
        self.backbone, self.size = model.backbone, (model.size, model.size)
        guessed = guess_default_boxes(grid_sizes(self.backbone, model.size))
        self.default_boxes = DefaultBoxGenerator(guessed.aspect_ratios, scales=guessed.scales)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {str(number): features for number, features in enumerate(self.backbone(images))}


def make_model(name: str, weights_backbone: str, num_classes: int) -> nn.Module:
    """With the first stage of VGG16 frozen where it has weights, as torchvision does it."""
    if name == "ssd300_resnet18":
        backbone = ResNetOfOurs()
        return SSD(backbone, backbone.default_boxes, backbone.size, num_classes)
    model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=num_classes)
    if weights_backbone != "none":
        backbone, prefix = vgg16(), "features."
        weights = torch.load(weights_backbone, map_location="cpu", weights_only=True)
        features = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        backbone.features.load_state_dict(features)
        model.backbone = _vgg_extractor(backbone, highres=False, trainable_layers=4)
    return model


def make_optimizer(args: Namespace, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {"lr": train.base_lr(args), "weight_decay": args.weight_decay}
    if args.opt == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    return torch.optim.SGD(parameters, momentum=args.momentum, nesterov=args.opt == "sgd_nesterov", **settings)


def make_schedule(args: Namespace, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Of the epochs."""
    if args.lr_scheduler == "cosineannealinglr":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, args.lr_steps, args.lr_gamma)


def make_warm_up(optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Of the steps of the first epoch."""
    steps = min(1000, steps_per_epoch - 1)
    return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 1000, total_iters=steps)


def make_scaler(device: torch.device, amp: bool) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device.type, enabled=amp and device.type == "cuda")


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    amp: bool,
    images: list[Tensor],
    targets: list[dict[str, Tensor]],
) -> float:
    """The step of the references' engine.py; returns the loss.

    ``--amp`` names no type there: it is fp16 on a GPU, bf16 on a CPU.
    """
    with torch.autocast(images[0].device.type, enabled=amp):
        losses = model(images, targets)
        loss = sum(losses.values())
    value = loss.item()
    if not math.isfinite(value):
        sys.exit(f"Loss is {value}, stopping training")
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    for one in (loss, *losses.values()):  # its log reads each in every step
        one.item()
    return value


def move(batches: DataLoader, device: torch.device) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """Tensor by tensor, as the references do."""
    for images, targets in batches:
        moved = [{name: value.to(device) for name, value in target.items()} for target in targets]
        yield [image.to(device) for image in images], moved


def refuse_other_trainings(args: Namespace) -> None:
    """
    Raises:
        SystemExit: a flag has a value with which this would be another training than that of train.py.
    """
    for name, values in FIXED.items():
        if getattr(args, name) not in values:
            known = " or ".join(map(str, values))
            sys.exit(f"--{name.replace('_', '-')} {getattr(args, name)}: torchvision's side has {known}")
    if args.weights_backbone == "default" or (args.model == "ssd300_resnet18" and args.weights_backbone != "none"):
        sys.exit("--weights-backbone: must be 'none', or a file of VGG16's weights")


def main() -> None:
    args = train.parse_args()
    args.world_size = 1
    refuse_other_trainings(args)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(args.seed)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    splits = evaluate.find_splits(args, "train", "val")
    with contextlib.redirect_stdout(io.StringIO()):
        training_set = TrainingSet(splits["train"].images_dir, splits["train"].source.path)
        val_set = ReferenceDataset(splits["val"].images_dir, splits["val"].source.path)
    num_classes = 1 + max(training_set.coco.cats)
    model = make_model(args.model, args.weights_backbone, num_classes).to(device)
    optimizer = make_optimizer(args, model)
    schedule = make_schedule(args, optimizer)
    scaler = make_scaler(device, amp=args.amp is not None)
    settings = {"num_workers": args.workers, "collate_fn": collate_to_tuples}
    num_samples = max(len(training_set), args.epoch_samples)
    batches = BatchSampler(RandomSampler(training_set, num_samples=num_samples), args.batch_size, drop_last=True)
    loader = DataLoader(training_set, batch_sampler=batches, **settings)
    val_loader = DataLoader(val_set, batch_size=1, **settings)
    begin = time.perf_counter()
    with open(output_dir / "metrics.jsonl", "w") as log:

        def write(**record) -> None:
            print(json.dumps(record), file=log, flush=True)

        for epoch in range(args.epochs):
            warm_up = make_warm_up(optimizer, len(loader)) if epoch == 0 else None
            model.train()
            losses = []
            for images, targets in move(loader, device):
                losses.append(take_step(model, optimizer, scaler, args.amp is not None, images, targets))
                if warm_up is not None:
                    warm_up.step()
            schedule.step()
            place = {"step": (epoch + 1) * len(loader), "epoch": epoch}
            write(kind="train", **place, loss=sum(losses) / len(losses))
            if epoch + 1 == args.epochs or (args.eval_freq and (epoch + 1) % args.eval_freq == 0):
                found = run_reference(model, val_loader, num_threads=1, device=device)
                write(kind="val", **place, **{name: found[name] for name in scoring.METRICS})
        seconds = time.perf_counter() - begin
        write(kind="end", seconds=seconds)
    print(json.dumps({"seconds": seconds, "AP": found["AP"], "AP50": found["AP50"]}))


if __name__ == "__main__":
    main()
