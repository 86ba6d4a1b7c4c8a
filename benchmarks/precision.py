"""Mixed precision and compilation against plain float32: losses and gradients of two batches, and curves of the loss.

    python -m benchmarks.precision --data-path DIR --weights-backbone FILE [--steps 200]

First, on photographs of DIR: the loss, and for every layer the cosine of its gradient with that of float32, where the
gradients of two batches are added as with --accumulate. Then three runs of train.py of --steps steps each: float32 with
two seeds, and --amp bf16 --compile with the first of them. Its curve should lie as near to that of float32 as the other
seed's does. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import coco
import coco_utils
import presets
import train
import utils
from engine import execution, flags
from engine.training_state import TrainingState

ROOT = Path(__file__).parent.parent
SMOOTHING = 20  # steps


def losses_and_gradients(
    args: argparse.Namespace, batches: list[dict], num_classes: int, amp: str | None, mode: str | None
) -> tuple[list[float], dict[str, Tensor]]:
    """The loss of each batch, and the gradients of all together, on the CPU."""
    torch._dynamo.reset()
    device = torch.device(args.device)
    model = train.make_model(args, device, num_classes).train()
    preset = presets.DetectionPresetTrain(data_augmentation="ssd", size=model.size)
    batch_losses = train.BatchLosses(model, preset, execution.make_autocast(device, amp))
    if mode is not None:
        execution.compile_whole(batch_losses, mode)
    optimizer = train.make_optimizer(args, model)
    scaler = torch.amp.GradScaler(args.device, enabled=False)
    state = TrainingState(model, optimizer, LambdaLR(optimizer, lambda step: 1.0), scaler, 1, accumulate=len(batches))
    losses = []
    for _ in range(2 if mode else 1):  # a CUDA graph is recorded in the first round and replayed in the second
        optimizer.zero_grad(set_to_none=False)
        for batch in batches:
            loss = batch_losses(utils.to_device(batch, device))["loss"]
            state.backward(loss)
            losses.append(loss.item())
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.requires_grad}
    return losses[-len(batches) :], gradients


def cosine(one: Tensor, other: Tensor) -> float:
    """Of the angle between two gradients; 1 where neither has any, as of a map without positives and hard negatives."""
    if not one.any() and not other.any():
        return 1.0
    return F.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0).item()


def compare_one_step(args: argparse.Namespace) -> dict[str, dict]:
    """variant -> its largest relative error of a loss, and the layer whose gradient's direction is the worst."""
    annotations = coco.read_annotations(args.data_path / "annotations/instances_train2017.json")
    preset = presets.DetectionPresetTrain(data_augmentation="ssd", size=300)
    dataset = coco_utils.CocoTrainDataset(annotations, args.data_path / "train2017", preset, seed=0)
    sampler = coco_utils.EpochBatchSampler(len(dataset), args.batch_size, seed=0, accumulate=2)
    keys = list(sampler)[:2]
    batches = [coco_utils.collate([dataset[key] for key in batch], dataset.max_boxes) for batch in keys]
    for batch in batches:
        del batch["fault"]  # text, which train.py's log takes out
    flags = ["--weights-backbone", args.weights_backbone, "--device", args.device, "--lr", str(args.lr)]
    training_args = train.parse_args(flags)

    def run(amp: str | None, mode: str | None):
        torch.manual_seed(0)
        return losses_and_gradients(training_args, batches, annotations.num_classes, amp, mode)

    torch.backends.cudnn.allow_tf32 = False
    modes = ["default", *(["reduce-overhead"] if args.device == "cuda" else [])]
    expected_losses, expected = run(None, None)
    report = {}
    for amp, mode in [(None, mode) for mode in modes] + [("bf16", mode) for mode in [None, *modes]]:
        losses, gradients = run(amp, mode)
        error = max(abs(a - b) / b for a, b in zip(losses, expected_losses, strict=True))
        cosines = {name: cosine(gradients[name], expected[name]) for name in expected}
        worst = min(cosines, key=cosines.get)
        name = " ".join(filter(None, (amp or "fp32", mode and f"compiled ({mode})")))
        report[name] = {"loss_error": error, "worst_cosine": cosines[worst], "worst_layer": worst}
        print(f"{name:30} loss error {error:.2e}   worst cosine of {len(cosines)}: {cosines[worst]:.6f} ({worst})")
    return report


def loss_curve(args: argparse.Namespace, seed: int, *flags: str) -> ndarray:
    """The loss of each step of a run of train.py, smoothed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--data-path", args.data_path.resolve(), "--device", args.device]
        command += ["--weights-backbone", Path(args.weights_backbone).resolve(), "--batch-size", args.batch_size]
        command += ["--lr", args.lr, "--seed", seed, "--max-steps", args.steps, "--eval-freq", 0, "--print-freq", 1]
        command += ["--output-dir", folder, *flags]
        result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        if result.returncode != 0:
            sys.exit(result.stdout + result.stderr)
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    return np.convolve(losses, np.full(SMOOTHING, 1 / SMOOTHING), mode="valid")


def compare_curves(args: argparse.Namespace) -> dict[str, float]:
    """Mean distances of the smoothed curves: of bf16 compiled, and of another seed, from float32."""
    curves = {
        "fp32, seed 0": loss_curve(args, 0),
        "fp32, seed 1": loss_curve(args, 1),
        "bf16 compiled, seed 0": loss_curve(args, 0, "--amp", "bf16", "--compile"),
    }
    for name, curve in curves.items():
        points = curve[:: max(1, len(curve) // 8)]
        print(f"{name:25}", "  ".join(f"{value:.3f}" for value in points))
    reference, seed, bf16 = curves.values()
    distances = {"bf16 compiled": np.abs(bf16 - reference).mean(), "another seed": np.abs(seed - reference).mean()}
    for name, distance in distances.items():
        print(f"mean distance of {name:15} from fp32: {distance:.4f}")
    return distances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True, help="folder in COCO's layout")
    parser.add_argument("--weights-backbone", required=True, help="VGG16's")
    parser.add_argument("--steps", type=flags.not_negative, default=200, help="of each run; 0 for none")
    parser.add_argument("--batch-size", type=flags.positive, default=4)
    parser.add_argument("--lr", type=float, default=0.0005)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if 0 < args.steps < 2 * SMOOTHING:
        parser.error(f"--steps: at least {2 * SMOOTHING}, since curves are smoothed over {SMOOTHING} steps")
    report = {"device": args.device, "one_step": compare_one_step(args)}
    if args.steps:
        report["distances"] = compare_curves(args)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
