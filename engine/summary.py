"""What a run says about itself when it begins: lines for the console."""

from collections.abc import Iterator

import ssd
from coco import CocoAnnotations
from coco_utils import CocoTrainDataset

from .optimization import norm_layers


def describe_run(
    flags: dict, base_lr: float, last_step: int, model: ssd.SSD, dataset: CocoTrainDataset, val: CocoAnnotations
) -> Iterator[str]:
    """All of it.

    Args:
        flags: of train.py, by their names in Python.
        base_lr: the learning rate after the warm-up.
        last_step: of the run.
        model: what is trained.
        dataset: what it is trained on.
        val: what it is evaluated on.
    """
    yield from describe_data(dataset, val, flags["epoch_samples"])
    yield from describe_model(model, flags["model"], flags["weights"])
    has_fc = isinstance(model.backbone, ssd.SSDFeatureExtractorVGG)
    yield from describe_flags(flags, base_lr, has_norm=bool(norm_layers(model)), has_fc=has_fc)
    if flags["ema"] is not None:
        yield describe_average(flags["ema"], last_step)


def describe_data(dataset: CocoTrainDataset, val: CocoAnnotations, epoch_samples: int) -> Iterator[str]:
    """What is trained and evaluated on, and the classes."""
    train = dataset.annotations
    yield f"Training on {len(dataset)} of {len(train.image_ids)} images ({train.path}) with {dataset.num_boxes} boxes"
    if len(dataset) < epoch_samples:
        yield f"These are fewer than --epoch-samples {epoch_samples}: an epoch passes over them more than once"
    yield f"Evaluating on {len(val.image_ids)} images ({val.path}) with {len(val.boxes)} boxes"
    names = list(train.categories.values())
    yield f"Classes ({len(names)}): {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"


def describe_model(model: ssd.SSD, name: str, weights: str | None) -> Iterator[str]:
    """Its size, what of it trains, what comes from ``weights`` of a whole model, and what was assumed of weights."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trainable = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    yield f"Model {name}: {total:,} parameters, of which {trainable:,} train; input scaling {model.input_scaling}"
    if model.initialised_anew == []:
        yield f"Kept from {weights}: all weights, for {model.num_classes} classes (background included)"
    elif model.initialised_anew:
        yield (
            f"Kept from {weights}: all weights but those for its classes; initialised anew, for "
            f"{model.num_classes} classes (background included): {', '.join(model.initialised_anew)}"
        )
    yield from model.notes


def describe_flags(flags: dict, base_lr: float, has_norm: bool, has_fc: bool) -> Iterator[str]:
    """What has no effect of train.py's ``flags``, by their names in Python, and the learning rate after the warm-up."""
    if flags["sync_bn"] and not has_norm:
        yield f"--sync-bn has no effect: {flags['model']} has no batch norm"
    if flags["norm_weight_decay"] is not None and not has_norm:
        yield f"--norm-weight-decay has no effect: {flags['model']} has no batch norm"
    if flags["subsample_fc"] and not has_fc:
        yield f"--subsample-fc has no effect: {flags['model']} has no fc6 and fc7"
    processes, batch_size, accumulate = (flags[name] for name in ("world_size", "batch_size", "accumulate"))
    batch, recipe_batch = processes * batch_size * accumulate, flags["tuned_for_batch"]
    parts = f"{processes} x {batch_size} images" + (f" x {accumulate}" if accumulate > 1 else "")
    scaled = f" = {flags['lr']:g} x {base_lr / flags['lr']:g} (--scale-lr)" if flags["scale_lr"] else ""
    yield (
        f"Learning rate {base_lr:g}{scaled} for a global batch of {batch} ({parts}); "
        f"the recipe {flags['recipe']} is tuned for {recipe_batch}"
    )
    if flags["aspect_ratio_group_factor"] is not None:
        yield "--aspect-ratio-group-factor has no effect: SSD resizes every image to a square"


def describe_average(decay: float, last_step: int) -> str:
    """How far back the average of the weights reaches, and whether that is too far for a run of so many steps."""
    text = f"Evaluated is the average of the weights over about {1 / (1 - decay):,.0f} steps (--ema {decay})"
    of_first = decay ** (last_step - 1)
    if of_first >= 0.01:
        text += f"; after the {last_step:,} of this run {of_first:.0%} of it are still those of the first: lower --ema"
    return text
