"""Learning: train.py and torchvision's references on the same images, with the same flags, several seeds each.

    python -m benchmarks.side_by_side --quick [--seeds N] [flags]
    python -m benchmarks.side_by_side --data-path DIR --weights-backbone FILE [--seeds N] [--at-once N] [flags]

--quick trains an SSD300 with ResNet-18 on the drawn shapes, with the published augmentation, in less than an hour on
two cores. Else SSD300-VGG16 is trained on DIR, in COCO's layout, from VGG16's weights in FILE or from 'none'; the other
flags are train.py's, of which torchvision_training.py says what the references make of them. Both sides see as many
images. --at-once runs that many trainings beside each other, whose times then say little. What they print and write
goes to --output-dir, as do both learning curves. After each training comes one JSON object with all that is known.
"""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from torch import Tensor

import train
from engine import flags
from view import charts, pictures

ROOT = Path(__file__).parent.parent
SIDES = {"ours": ["train.py"], "torchvision": ["-m", "benchmarks.torchvision_training"]}
COLORS = {"ours": charts.BLUE, "torchvision": charts.ORANGE}
QUICK = shlex.split(
    "--dataset shapes --model ssd300_resnet18 --weights-backbone none --opt adamw --lr 0.001 --batch-size 8 --epochs 8 "
    "--lr-steps 6 --eval-freq 2 --workers 1"
)


def run(side: str, seed: int, output_dir: Path, train_flags: list[str]) -> dict:
    """The last metrics, those of all evaluations, the mean losses of the epochs, and the seconds from the start of
    the process to its end, with the images trained on in each.

    Raises:
        SystemExit: it has failed, or evaluated nothing.
    """
    folder = output_dir / f"{side}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *SIDES[side], *train_flags, "--seed", str(seed), "--output-dir", str(folder)]
    begin = time.monotonic()
    with open(folder / "console.txt", "w") as console:
        code = subprocess.run(command, cwd=ROOT, stdout=console, stderr=subprocess.STDOUT).returncode
    if code != 0:
        last_line = (folder / "console.txt").read_text().strip().rpartition("\n")[-1]
        sys.exit(f"{side}, seed {seed}: exit code {code}, {folder / 'console.txt'} ends with: {last_line}")
    seconds = time.monotonic() - begin
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(one["epoch"] + 1, one["AP"], one["AP50"]) for one in records if one["kind"] == "val"]
    if not curve:
        sys.exit(f"{side}, seed {seed}: has evaluated nothing; leave out --eval-freq 0")
    losses, step = {}, 0
    for one in records:
        if one["kind"] == "train":
            losses.setdefault(one["epoch"] + 1, []).extend([one["loss"]] * (one["step"] - step))
            step = one["step"]
    last_step = max(one["step"] for one in records if one["kind"] == "val")
    return {
        "AP": curve[-1][1],
        "AP50": curve[-1][2],
        "seconds": seconds,
        "images/s": last_step * train.parse_args(train_flags).batch_size / seconds,
        "curve": curve,
        "losses": [(epoch, statistics.mean(ones)) for epoch, ones in losses.items()],
    }


def summary(results: list[dict]) -> dict:
    """Means, and the standard error of the mean AP, None of one run."""
    aps = [one["AP"] for one in results]
    means = {name: statistics.mean(one[name] for one in results) for name in ("AP", "AP50", "seconds", "images/s")}
    error = statistics.stdev(aps) / math.sqrt(len(aps)) if len(aps) > 1 else None
    return {**means, "standard error of AP": error, "runs": results}


def compare(ours: dict, theirs: dict) -> dict:
    """Of two summaries."""
    found = {"difference of AP": ours["AP"] - theirs["AP"], "times as long": theirs["seconds"] / ours["seconds"]}
    errors = [one["standard error of AP"] for one in (ours, theirs)]
    if None not in errors:
        found["standard error of the difference"] = math.hypot(*errors)
    return found


def draw(results: dict[str, list[dict]]) -> Tensor:
    """Mean loss and AP over the epochs, a line for each training."""
    figure = charts.new_figure(8.6, 6.4)
    grid = figure.subplots(2, 1, sharex=True)
    for axes, key, label in zip(grid, ("losses", "curve"), ("loss", "AP"), strict=True):
        for side, ones in results.items():
            for number, one in enumerate(ones):
                name = None if number else f"{side}, {len(ones)} seeds"
                epochs, values, *_ = zip(*one[key], strict=True)
                axes.plot(epochs, values, color=COLORS[side], label=name, marker="o", markersize=3, linewidth=1.3)
        axes.set_ylabel(label)
        charts.clear_frame(axes)
    grid[0].legend(frameon=False)
    grid[1].set(xlabel="epochs", ylim=(0, None))
    return charts.to_picture(figure)


def get_args() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=flags.positive, default=3)
    parser.add_argument("--at-once", type=flags.positive, default=1)
    parser.add_argument("--output-dir", type=Path, default=Path("out/side_by_side"))
    args, train_flags = parser.parse_known_args()
    if any(flag.split("=")[0] == "--seed" for flag in train_flags):
        parser.error("--seed: seeds are 0 to --seeds")
    return args, (QUICK if args.quick else []) + train_flags


def main() -> None:
    args, train_flags = get_args()
    jobs = [(side, seed) for seed in range(args.seeds) for side in SIDES]
    results = {side: [] for side in SIDES}
    report = {"flags": train_flags, "at once": args.at_once}
    with ThreadPoolExecutor(args.at_once) as threads:
        running = {threads.submit(run, *job, args.output_dir, train_flags): job for job in jobs}
        for future in as_completed(running):
            side, seed = running[future]
            try:
                found = future.result()
            except SystemExit:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
            results[side].append(found)
            print(f"{side}, seed {seed}: AP {found['AP']:.3f}, AP50 {found['AP50']:.3f}, {found['seconds']:.1f} s")
            report |= {name: summary(ones) for name, ones in results.items() if ones}
            if all(results.values()):
                report |= compare(*(report[name] for name in SIDES))
            pictures.save_png(draw(results), args.output_dir / "learning_curves.png")
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
