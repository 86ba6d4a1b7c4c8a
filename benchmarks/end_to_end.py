"""Training from files to weights: images per second of train.py, and how long its steps wait for images.

    python -m benchmarks.end_to_end [--batch-size N] [--steps N] [--files N] [--drawn DIR] [any flag of train.py]
    python -m benchmarks.end_to_end --batch-size 128 --workers 16 --amp --compile

Draws JPEG files of COCO's size, in DIR to be used again, and trains on them with train.py for one epoch, from memory
(--cache ram), where each image of the epoch takes 125 kB though it is one of few files. The second half of the log
counts. Waiting is the time that the process spends in the loader, of which a GPU that is still busy with earlier steps
notices nothing. The last line is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.coco_like import draw_coco_like_data
from engine import flags

ROOT = Path(__file__).parent.parent
NUM_LINES = 10  # of the log, in half of the steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("-b", "--batch-size", type=flags.positive, default=128 if on_gpu else 4)
    parser.add_argument("--steps", type=flags.positive, default=400 if on_gpu else 20)
    parser.add_argument("--files", type=flags.positive, default=500 if on_gpu else 50)
    parser.add_argument("--drawn", type=Path, help="where the files are, or go (default: away in the end)")
    args, train_flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        data, output = args.drawn or Path(folder) / "data", Path(folder) / "out"
        draw_coco_like_data(data, args.files, args.batch_size * args.steps)
        train_annotations = data / "annotations/instances_train2017.json"
        command = ["train.py", "--data-path", data, "--val-images", data / "train2017"]
        command += ["--val-annotations", train_annotations, "--weights-backbone", "none", "--cache", "ram"]
        command += ["--batch-size", args.batch_size, "--epochs", 1, "--eval-freq", 0, "--output-dir", output]
        command += ["--print-freq", max(1, args.steps // (2 * NUM_LINES)), "--lr", 1e-4, *train_flags]
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
        records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    counted = [record for record in records if record["kind"] == "train"]
    counted = counted[len(counted) // 2 :]
    rate = statistics.median(record["images/s"] for record in counted)
    waiting = sum(record["data"] for record in counted) / sum(record["time"] for record in counted)
    print(f"{rate:.1f} images/s; {100 * waiting:.1f} % of the time is spent in the loader")
    device = torch.cuda.get_device_name() if on_gpu and "cpu" not in train_flags else "cpu"
    print(json.dumps({"device": device, "flags": train_flags, "images/s": rate, "waiting": waiting}))


if __name__ == "__main__":
    main()
