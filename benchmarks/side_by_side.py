"""Learning: train.py and torchvision's references on the same photographs, with the same flags, several seeds each.

    python -m benchmarks.side_by_side --data-path DIR --weights-backbone FILE [--seeds N] [--at-once N] [flags]
    python -m benchmarks.side_by_side --data-path DIR --weights-backbone FILE --recipe small --amp --at-once 6

DIR is in COCO's layout, FILE has VGG16's weights or is 'none'; the other flags are train.py's, of which
torchvision_training.py says what the references make of them. Both sides see as many images. --at-once runs that many
trainings beside each other, whose times then say little. What they print and write goes to --output-dir. The last line
is one JSON object.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine import flags

ROOT = Path(__file__).parent.parent
SIDES = {"ours": ["train.py"], "torchvision": ["-m", "benchmarks.torchvision_training"]}


def run(side: str, seed: int, output_dir: Path, train_flags: list[str]) -> dict:
    """The metrics of the last evaluation, those of all, and the seconds from the start of the process to its end."""
    folder = output_dir / f"{side}_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *SIDES[side], *train_flags, "--seed", str(seed), "--output-dir", str(folder)]
    begin = time.monotonic()
    with open(folder / "console.txt", "w") as console:
        subprocess.run(command, cwd=ROOT, env=os.environ, stdout=console, stderr=subprocess.STDOUT, check=True)
    seconds = time.monotonic() - begin
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(one["step"], one["AP"], one["AP50"]) for one in records if one["kind"] == "val"]
    print(f"{side}, seed {seed}: AP {curve[-1][1]:.3f}, AP50 {curve[-1][2]:.3f}, {seconds:.1f} s", flush=True)
    return {"AP": curve[-1][1], "AP50": curve[-1][2], "seconds": seconds, "curve": curve}


def summary(results: list[dict]) -> dict:
    """Means, and the standard error of the mean AP, None of one run."""
    aps = [one["AP"] for one in results]
    means = {name: statistics.mean(one[name] for one in results) for name in ("AP", "AP50", "seconds")}
    error = statistics.stdev(aps) / math.sqrt(len(aps)) if len(aps) > 1 else None
    return {**means, "standard error of AP": error, "runs": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=flags.positive, default=3)
    parser.add_argument("--at-once", type=flags.positive, default=1)
    parser.add_argument("--output-dir", type=Path, default=Path("out/side_by_side"))
    args, train_flags = parser.parse_known_args()
    jobs = [(side, seed) for seed in range(args.seeds) for side in SIDES]
    with ThreadPoolExecutor(args.at_once) as threads:
        found = list(threads.map(lambda job: run(*job, args.output_dir, train_flags), jobs))
    report = {"flags": train_flags, "at once": args.at_once}
    for side in SIDES:
        report[side] = summary([one for (name, _), one in zip(jobs, found, strict=True) if name == side])
        print(f"{side}: AP {report[side]['AP']:.3f}, AP50 {report[side]['AP50']:.3f}, {report[side]['seconds']:.1f} s")
    ours, theirs = report["ours"], report["torchvision"]
    report["difference of AP"] = ours["AP"] - theirs["AP"]
    if args.seeds > 1:
        errors = math.hypot(ours["standard error of AP"], theirs["standard error of AP"])
        report["standard error of the difference"] = errors
    report["times as long"] = theirs["seconds"] / ours["seconds"]
    print(f"ours is {report['difference of AP']:+.3f} AP above, in 1/{report['times as long']:.2f} of the time")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
