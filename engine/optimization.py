"""The optimizer and its learning rate."""

import bisect
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

WARMUP_STEPS = 1000
WARMUP_START = 1 / 1000
NORM_LAYERS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


def make_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    norm_weight_decay: float | None = None,
    fp16: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of what trains in ``model``.

    Args:
        model: on its device.
        name: ``sgd``, ``sgd_nesterov`` or ``adamw``.
        lr: learning rate after the warm-up.
        momentum: of SGD.
        weight_decay: of all parameters.
        norm_weight_decay: that of normalisation layers, if they have one of their own.
        fp16: whether a ``GradScaler`` may skip steps. PyTorch's fused SGD begins with momentum that nobody has set if
            the first steps are skipped, so that it is not used then.
    """
    groups = parameter_groups(model, weight_decay, norm_weight_decay)
    fused = not fp16 and groups[0]["params"][0].device.type in ("cpu", "cuda")
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, fused=fused)
    return torch.optim.SGD(groups, lr, momentum, nesterov=name == "sgd_nesterov", fused=fused)


def lr_scale(name: str, batch_ratio: float) -> float:
    """What a learning rate is multiplied by, when the global batch is ``batch_ratio`` times that which it is for.

    That ratio for SGD (Goyal et al., 2017, section 2.1), its square root for AdamW (Malladi et al., 2022, section 5).
    """
    return math.sqrt(batch_ratio) if name == "adamw" else batch_ratio


def parameter_groups(model: nn.Module, weight_decay: float, norm_weight_decay: float | None) -> list[dict]:
    """What trains, and its weight decay; normalisation layers are a group of their own if theirs is another."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if norm_weight_decay is None:
        return [{"params": trainable, "weight_decay": weight_decay}]
    norms = {parameter for layer in norm_layers(model) for parameter in layer.parameters()}
    return [
        {"params": [parameter for parameter in trainable if parameter not in norms], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter in norms], "weight_decay": norm_weight_decay},
    ]


def norm_layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, NORM_LAYERS)]


def lr_schedule(
    steps_per_epoch: int,
    name: str,
    *,
    epochs: int,
    milestones: Sequence[int],
    gamma: float,
    warmup_epochs: int | None = None,
    warmup_steps: int | None = None,
) -> Callable[[int], float]:
    """The learning rate as a function of the step, as a fraction of that after the warm-up.

    The warm-up is linear; then the rate falls at the beginning of an epoch, as in torchvision's references.

    Args:
        steps_per_epoch: steps of an epoch.
        name: ``multisteplr``, or ``cosineannealinglr`` over all ``epochs``.
        epochs: of the whole run.
        milestones: epochs after which the rate is multiplied by ``gamma``.
        gamma: the factor.
        warmup_epochs, warmup_steps: length of the warm-up, in either; by default ``WARMUP_STEPS`` steps, or fewer where
            the first epoch is shorter.

    Raises:
        ValueError: the warm-up would not end.
    """
    flag = "--lr-warmup-steps" if warmup_epochs is None else "--lr-warmup-epochs"
    if warmup_epochs is not None:
        warmup_steps = warmup_epochs * steps_per_epoch
    elif warmup_steps is None:
        warmup_steps = min(WARMUP_STEPS, steps_per_epoch - 1)
    if warmup_steps >= epochs * steps_per_epoch:
        raise ValueError(
            f"a warm-up of {warmup_steps} steps does not end in {epochs} epochs of {steps_per_epoch}: "
            f"raise --epochs, or lower {flag}"
        )

    def factor(step: int) -> float:
        epoch = step // steps_per_epoch
        if name == "cosineannealinglr":
            decay = (1 + math.cos(math.pi * epoch / epochs)) / 2
        else:
            decay = gamma ** bisect.bisect_right(sorted(milestones), epoch)
        warmup = 1.0 if step >= warmup_steps else WARMUP_START + (1 - WARMUP_START) * step / warmup_steps
        return warmup * decay

    return factor
