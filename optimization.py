"""The optimizer and its learning rate, as the flags name them."""

import argparse
import bisect
import math
from collections.abc import Callable

import torch
from torch import nn

WARMUP_STEPS = 1000
WARMUP_START = 1 / 1000
NORM_LAYERS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


def base_lr(args: argparse.Namespace) -> float:
    """The learning rate after the warm-up: ``--lr``, with ``--scale-lr`` in proportion to the global batch."""
    return args.lr * global_batch(args) / args.tuned_for_batch if args.scale_lr else args.lr


def global_batch(args: argparse.Namespace) -> int:
    """Images of a step, of all processes together."""
    return args.batch_size * args.world_size * args.accumulate


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(args, model)
    # Not for fp16: where the first steps overflow and are skipped, PyTorch's fused SGD begins with momentum that nobody
    # has set.
    fused = args.amp != "fp16" and groups[0]["params"][0].device.type in ("cpu", "cuda")
    if args.opt == "adamw":
        return torch.optim.AdamW(groups, base_lr(args), fused=fused)
    nesterov = args.opt == "sgd_nesterov"
    return torch.optim.SGD(groups, base_lr(args), args.momentum, nesterov=nesterov, fused=fused)


def parameter_groups(args: argparse.Namespace, model: nn.Module) -> list[dict]:
    """What trains, and its weight decay; with ``--norm-weight-decay`` normalisation layers are a group of their own."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if args.norm_weight_decay is None:
        return [{"params": trainable, "weight_decay": args.weight_decay}]
    norms = {parameter for layer in norm_layers(model) for parameter in layer.parameters()}
    others = [parameter for parameter in trainable if parameter not in norms]
    norms = [parameter for parameter in trainable if parameter in norms]
    return [
        {"params": others, "weight_decay": args.weight_decay},
        {"params": norms, "weight_decay": args.norm_weight_decay},
    ]


def norm_layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, NORM_LAYERS)]


def lr_schedule(args: argparse.Namespace, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate as a function of the step, as a fraction of ``base_lr``.

    Linear warm-up, over ``--lr-warmup-epochs`` or at most ``WARMUP_STEPS`` within the first, then the reference's decay
    per epoch.
    """
    warmup_steps = min(WARMUP_STEPS, steps_per_epoch - 1)
    if args.lr_warmup_epochs is not None:
        warmup_steps = args.lr_warmup_epochs * steps_per_epoch

    def factor(step: int) -> float:
        epoch = step // steps_per_epoch
        if args.lr_scheduler == "cosineannealinglr":
            decay = (1 + math.cos(math.pi * epoch / args.epochs)) / 2
        else:
            decay = args.lr_gamma ** bisect.bisect_right(sorted(args.lr_steps), epoch)
        warmup = 1.0 if step >= warmup_steps else WARMUP_START + (1 - WARMUP_START) * step / warmup_steps
        return warmup * decay

    return factor
