"""Why a training on few images collapses: its first steps as published and with each suspect changed alone.

    python -m benchmarks.collapse --data-path DIR --weights-backbone FILE [--steps N] [--only NAME ...] [flags]

SSD300-VGG16 on batches of 4 images of DIR, the same for all variants, from VGG16's weights in FILE; the other flags are
train.py's. Every tenth step it looks, on four images to validate on, at each layer: the deviation of its activations
over an image, the share of its units that are zero everywhere, and the norms of its weights and gradients. Draws them
to --picture. After each variant comes one JSON object with all that is known.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import coco
import evaluate
import ssd
import train
from coco_utils import CocoEvalDataset, CocoTrainDataset, EpochBatchSampler, collate
from engine import execution, flags
from presets import DetectionPresetEval, DetectionPresetTrain
from view import charts, pictures

BATCH_SIZE = 4
NUM_WATCHED = 4
MEASURES = ("deviation over an image", "share of dead units", "norm of the weights", "norm of the gradient")
LOGARITHMIC, LEAST_SHOWN = (0, 3), 1e-4  # which of them are drawn so, and what stands for all that is less
PUBLISHED = ["--recipe", "lr_scheme", "--lr", "0.001"]


@dataclass(frozen=True)
class Variant:
    """Flags of train.py, and what has no flag there: a change of the model, and a largest norm of all gradients."""

    flags: list[str]
    change: Callable[[ssd.SSD], None] | None = None
    clip: float | None = None


def shrink_activations(model: ssd.SSD, factor: float) -> None:
    """Multiplies all activations of the layers with weights of ImageNet; that of conv4_3 is normalised all the same."""
    backbone = model.backbone
    convs = [layer for layer in (*backbone.features, *backbone.extra[0][:-1]) if isinstance(layer, nn.Conv2d)]
    for weight in (convs[0].weight, *(conv.bias for conv in convs)):
        weight.data.mul_(factor)


def fix_fc(model: ssd.SSD) -> None:
    model.backbone.extra[0][-1].requires_grad_(False)


VARIANTS = {
    "as published": Variant(PUBLISHED),
    "rate 0.0001": Variant([*PUBLISHED, "--lr", "0.0001"]),
    "warm-up of 200 steps": Variant([*PUBLISHED, "--lr-warmup-steps", "200"]),
    "gradients clipped to 2": Variant(PUBLISHED, clip=2.0),
    "predictions x 0.1": Variant([*PUBLISHED, "--weight-init", "small_head"]),
    "activations x 0.1": Variant(PUBLISHED, change=partial(shrink_activations, factor=0.1)),
    "fc6 and fc7 fixed": Variant(PUBLISHED, change=fix_fc),
    "AdamW, rate 0.0001": Variant([*PUBLISHED, "--opt", "adamw", "--lr", "0.0001"]),
    "recipe small": Variant(["--recipe", "small"]),
}


def layers_of(backbone: ssd.SSDFeatureExtractorVGG) -> dict[str, tuple[nn.Conv2d, nn.Module]]:
    """A convolution and the layer whose output is its activation, by the paper's names."""
    conv5, fc = backbone.extra[0][1:-1], backbone.extra[0][-1]
    found = {"conv4_3": backbone.features[-2:], "conv5_3": conv5[-2:], "fc6": fc[1:3], "fc7": fc[3:5]}
    found |= {f"conv{number}_2": block[-2:] for number, block in enumerate(backbone.extra[1:], start=8)}
    return {name: tuple(pair) for name, pair in found.items()}


def look(model: ssd.SSD, images: Tensor, layers: dict) -> dict[str, list[float]]:
    """Of each layer the ``MEASURES``; those of the gradients are of the last step."""
    found = {}

    def take(name: str, module: nn.Module, inputs, activation: Tensor) -> None:
        cells = activation.flatten(2).float()
        spread = cells.std(dim=2).mean().item() if cells.shape[2] > 1 else None
        found[name] = [spread, (cells <= 0).all(dim=2).all(dim=0).float().mean().item()]

    hooks = [relu.register_forward_hook(partial(take, name)) for name, (_, relu) in layers.items()]
    model.eval()
    with torch.no_grad():
        model(images)
    model.train()
    for hook in hooks:
        hook.remove()
    for name, (conv, _) in layers.items():
        norms = [None if value is None else value.norm().item() for value in (conv.weight, conv.weight.grad)]
        found[name] += norms
    return found


def make_batches(args: argparse.Namespace, steps: int) -> tuple[list[dict], Tensor, int, int]:
    """The batches of the first steps, the images to watch, the number of classes and that of steps per epoch."""
    splits = evaluate.find_splits(args, "train", "val")
    annotations, val = coco.open_splits(splits, Path(args.output_dir) / "annotations")
    preset = DetectionPresetTrain(data_augmentation=args.data_augmentation, size=300)
    dataset = CocoTrainDataset(annotations, splits["train"].images_dir, preset, args.seed)
    sampler = EpochBatchSampler(len(dataset), BATCH_SIZE, args.seed)
    batches = []
    while len(batches) < steps:
        sampler.select(epoch=len(batches) // sampler.steps_per_epoch)
        batches += [collate([dataset[key] for key in keys]) for keys in sampler]
    watched = CocoEvalDataset(val, splits["val"].images_dir, DetectionPresetEval(size=300))
    images = torch.stack([watched[i]["image"] for i in range(min(NUM_WATCHED, len(watched)))])
    return batches[:steps], images, annotations.num_classes, sampler.steps_per_epoch


def train_and_look(
    args: argparse.Namespace,
    variant: Variant,
    batches: list[dict],
    watched: Tensor,
    num_classes: int,
    epoch_steps: int,
    every: int,
) -> list[dict]:
    """What ``look`` finds before the first step and after ``every`` few, with the step and the mean loss till then."""
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = train.make_model(args, device, num_classes)
    if variant.change is not None:
        variant.change(model)
    preset = DetectionPresetTrain(data_augmentation=args.data_augmentation, size=model.size)
    batch_losses = train.BatchLosses(model.train(), preset, execution.make_autocast(device, args.amp))
    optimizer = train.make_optimizer(args, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, train.make_schedule(args, epoch_steps))
    layers, watched = layers_of(model.backbone), watched.to(device)
    records, losses = [{"step": 0, "layers": look(model, watched, layers)}], []
    for step, batch in enumerate(batches, start=1):
        optimizer.zero_grad()
        loss = batch_losses({name: batch[name].to(device) for name in ("image", "parameters", "objects")})["loss"]
        loss.backward()
        if variant.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), variant.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % every == 0:
            records.append({"step": step, "loss": float(np.mean(losses)), "layers": look(model, watched, layers)})
            losses.clear()
    return records


def curve(records: list[dict], layer: str, place: int) -> tuple[list[int], list[float]]:
    """Steps, and a measure of a layer as it is drawn, where it is known."""
    points = [(one["step"], one["layers"][layer][place]) for one in records]
    known = [(step, value) for step, value in points if value is not None]
    least = LEAST_SHOWN if place in LOGARITHMIC else 0.0
    return [step for step, _ in known], [max(value, least) for _, value in known]


def draw(found: dict[str, list[dict]]) -> Tensor:
    """A row for all layers of the first and one for those of the last variant, and one for fc7 of all of them."""
    names = list(found)
    rows = [
        (f"{name}, all layers", {layer: (name, layer) for layer in found[name][0]["layers"]})
        for name in dict.fromkeys((names[0], names[-1]))
    ]
    rows.append(("fc7 of all variants", {name: (name, "fc7") for name in found}))
    figure = charts.new_figure(17, 3.6 * len(rows))
    grid = figure.subplots(len(rows), len(MEASURES), sharex=True, squeeze=False, gridspec_kw={"wspace": 0.28})
    for (title, lines), row in zip(rows, grid, strict=True):
        for place, (axes, measure) in enumerate(zip(row, MEASURES, strict=True)):
            for number, (label, (name, layer)) in enumerate(lines.items()):
                steps, values = curve(found[name], layer, place)
                if steps:
                    axes.plot(steps, values, label=label, color=f"C{number}", linewidth=1.6)
            axes.set_title(f"{title}: {measure}" if place == 0 else measure, loc="left", fontsize=9)
            if place in LOGARITHMIC:
                axes.set_yscale("log")
                axes.set_ylim(bottom=LEAST_SHOWN)
            charts.clear_frame(axes)
        row[-1].legend(*row[1].get_legend_handles_labels(), fontsize=8, frameon=False, bbox_to_anchor=(1.0, 1.0))
    for axes in grid[-1]:
        axes.set_xlabel("steps")
    return charts.to_picture(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=flags.positive, default=200)
    parser.add_argument("--every", type=flags.positive, default=10)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--picture", type=Path, default=Path("out/collapse.png"))
    own, common = parser.parse_known_args()
    common += ["--batch-size", str(BATCH_SIZE), "--epochs", str(own.steps + 1), "--lr-steps", str(own.steps + 1)]
    batches, watched, num_classes, epoch_steps = make_batches(train.parse_args(common), own.steps)
    found = {}
    for name in own.only:
        args = train.parse_args([*VARIANTS[name].flags, *common])
        args.world_size = 1
        found[name] = train_and_look(args, VARIANTS[name], batches, watched, num_classes, epoch_steps, own.every)
        last = found[name][-1]
        deviation, dead = last["layers"]["fc7"][:2]
        print(f"{name}: loss {last.get('loss', 0):.2f}, deviation of fc7 {deviation:.4f}, dead {dead:.0%}", flush=True)
        own.picture.parent.mkdir(parents=True, exist_ok=True)
        pictures.save_png(draw(found), own.picture)
        print(json.dumps({"measures": MEASURES, "variants": found}), flush=True)


if __name__ == "__main__":
    main()
