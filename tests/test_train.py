"""The training step of train.py; test_scripts.py has the runs."""

import contextlib

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import coco_utils
import presets
import ssd
import train
import transforms
import utils
from engine import execution
from engine.training_state import TrainingState
from tests import tiny

NUM_CLASSES = 5
NUM_SLOTS = 6


def make_batch(preset: presets.DetectionPresetTrain, num_boxes: tuple[int, ...] = (1, 4)) -> dict:
    """An image of noise for each of ``num_boxes``, with so many objects."""
    rng = np.random.default_rng(0)
    samples = []
    for image_id, number in enumerate(num_boxes):
        corners = rng.uniform(0, 60, (number, 2))
        boxes = np.concatenate((corners, corners + rng.uniform(20, 40, (number, 2))), axis=1).astype(np.float32)
        image = rng.integers(0, 256, (100, 100, 4), dtype=np.uint8)
        sample = preset(image, boxes, rng.integers(1, NUM_CLASSES, number), rng)
        samples.append(sample | {"image_id": image_id + 10 * number})
    return coco_utils.collate(samples, NUM_SLOTS)


def make_batch_losses(amp: bool = False, make_model=ssd.family.MODELS["ssd300_resnet18"]) -> train.BatchLosses:
    torch.manual_seed(0)
    model = make_model(weights_backbone=None, num_classes=NUM_CLASSES).train()
    model.to(memory_format=execution.memory_format(torch.device("cpu")))
    preset = presets.DetectionPresetTrain(data_augmentation="ssd", size=model.size)
    return train.BatchLosses(model, preset, torch.autocast("cpu", torch.bfloat16, enabled=amp))


def losses_and_gradients(batch_losses: train.BatchLosses, batch: dict) -> tuple[dict, dict]:
    batch_losses.zero_grad()
    losses = batch_losses(batch)
    losses["loss"].backward()
    return losses, {name: parameter.grad.clone() for name, parameter in batch_losses.model.named_parameters()}


class StaysOnMeta(TorchDispatchMode):
    """Lets no operation touch a tensor of the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.device.type == "meta" for tensor in tensors), f"{function} reads or writes the host's memory"
        return result


def run_step_on_meta() -> None:
    batch_losses = make_batch_losses()
    batch = utils.to_device(make_batch(batch_losses.preset), torch.device("meta"))
    batch_losses.to("meta")
    with StaysOnMeta():
        batch_losses(batch)["loss"].backward()


def test_losses_and_gradients_never_make_the_host_wait():
    """Tensors without values show it: no value is read, and nothing is copied between host and device."""
    run_step_on_meta()


@pytest.mark.parametrize(
    "constants", [lambda values, device: torch.tensor(values).view(3, 1, 1).to(device), lambda values, device: 1.0]
)
def test_the_check_for_waits_finds_copies(monkeypatch, constants):
    monkeypatch.setattr(transforms, "channel_constants", constants)
    is_copied = isinstance(constants((0, 1, 2), "cpu"), torch.Tensor)
    with pytest.raises(AssertionError, match="host's memory") if is_copied else contextlib.nullcontext():
        run_step_on_meta()


@pytest.mark.parametrize(
    ("amp", "make_model"), [(False, ssd.family.MODELS["ssd300_resnet18"]), (True, tiny.MODEL)], ids=["", "bf16"]
)
def test_one_graph_serves_all_batches_with_the_losses_and_gradients_of_eager_mode(amp, make_model):
    """The numbers of boxes differ between batches; a second graph, or one in parts, is an error.

    ``--amp`` with a tiny model, for it concerns each layer by itself, and takes long on a CPU that has no bfloat16.
    """
    torch._dynamo.reset()
    batch_losses, compiled = make_batch_losses(amp, make_model), make_batch_losses(amp, make_model)
    compiled.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_boxes in ((1, 4), (NUM_SLOTS, 0)):
            batch = make_batch(batch_losses.preset, num_boxes)
            losses, gradients = losses_and_gradients(batch_losses, batch)
            compiled_losses, compiled_gradients = losses_and_gradients(compiled, batch)
            # a sum of 1e4 terms in another order is off by up to 1e-5; objects of another batch make another loss
            torch.testing.assert_close(compiled_losses, losses, rtol=1e-4, atol=0)
            for name, gradient in gradients.items():
                torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_bf16_gives_the_losses_and_gradients_of_float32():
    """Roughly, as the weights are random; benchmarks/precision.py compares each layer of a real VGG."""
    plain, half = make_batch_losses(), make_batch_losses(amp=True)
    batch = make_batch(plain.preset, (3, 5))
    losses, gradients = losses_and_gradients(plain, batch)
    half_losses, half_gradients = losses_and_gradients(half, batch)
    # bfloat16 rounds by up to 0.2 % in each layer, of which 0.13 % are left on average, and a cosine of 0.99
    torch.testing.assert_close(half_losses, losses, rtol=0.02, atol=0)
    all_gradients = [torch.cat([one[name].flatten() for name in gradients]) for one in (gradients, half_gradients)]
    assert F.cosine_similarity(*all_gradients, dim=0) > 0.95


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_first_step_that_overflows_in_fp16_leaves_nothing_behind(opt, monkeypatch):
    """Memory that nobody has set must not become momentum."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(1e30))
    model = torch.nn.Linear(1, 1, bias=False)
    args = train.parse_args(["--opt", opt, "--amp", "fp16", "--lr", "0.1", "--weight-decay", "0", "--momentum", "0.9"])
    optimizer = train.make_optimizer(args, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state = TrainingState(model, optimizer, schedule, torch.amp.GradScaler("cpu"), steps_per_epoch=9)
    before = model.weight.item()
    for factor in (float("inf"), 1.0):
        state.backward(factor * model.weight.sum())
        state.optimizer_step()
    assert model.weight.item() == pytest.approx(before - 0.1)
