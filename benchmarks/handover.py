"""Taking a batch over from a loader worker: what it costs the training process, by how many tensors it travels in.

    python -m benchmarks.handover [--batch-size N] [--batches N] [--rounds N]

Ours are the batches of ``coco_utils.collate``. The other variant sends the same numbers as a tensor for each thing that
is known of an image. Both are made once, in the worker, which then only hands them over; counted is the processor time
of the process that takes them over. (With a GPU each tensor is pinned, copied and recorded as well, which is not in
it.) They take turns, and the fastest round counts. The last line is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import coco_utils
import presets
import utils
from benchmarks.train_step import make_batch
from benchmarks.turns import take_turns
from engine import flags, loading

make_loader: Callable[[], DataLoader]  # of this process


def in_many_tensors(preset: presets.DetectionPresetTrain, batch: dict) -> dict:
    """The batch with each of its fields as a tensor of its own."""
    coverage, drawn = preset.split_parameters(batch["parameters"])
    boxes, labels = coco_utils.split_objects(batch["objects"])
    fields = {"image": batch["image"], "coverage": coverage, "boxes": boxes, "labels": labels, **drawn}
    return {name: value.contiguous() for name, value in fields.items()} | {"image_id": torch.tensor(batch["image_id"])}


VARIANTS = {"few tensors": lambda preset, batch: batch, "many tensors": in_many_tensors}


class Batches(IterableDataset):
    """The same batch again and again, each time as new tensors."""

    def __init__(self, name: str, batch_size: int, number: int):
        self.name, self.batch_size, self.number = name, batch_size, number

    def __iter__(self):
        preset = presets.DetectionPresetTrain(data_augmentation="ssd", size=300)
        batch = VARIANTS[self.name](preset, make_batch(preset, self.batch_size))
        for _ in range(self.number):
            yield {key: value.clone() if isinstance(value, Tensor) else list(value) for key, value in batch.items()}


def start(name: str, batch_size: int, number: int) -> None:
    global make_loader
    torch.set_num_threads(1)
    make_loader = partial(loading.make_loader, Batches(name, batch_size, number), 1, 300, batch_size=None)


def measure() -> float:
    """Milliseconds of this process for each batch after the first, which waits for the worker's start."""
    batches = iter(make_loader())
    next(batches)
    begin = time.process_time()
    number = sum(1 for batch in batches if utils.to_device(batch, torch.device("cpu")))
    return 1000 * (time.process_time() - begin) / number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=flags.positive, default=4)
    parser.add_argument("--batches", type=flags.positive, default=300)
    parser.add_argument("--rounds", type=flags.positive, default=5)
    args = parser.parse_args()
    variants = {name: (name, args.batch_size, args.batches) for name in VARIANTS}
    fastest = {name: min(times) for name, times in take_turns(start, measure, variants, args.rounds).items()}
    for name, milliseconds in fastest.items():
        print(f"{name:13} {milliseconds:.3f} ms of the training process per batch of {args.batch_size}")
    few, many = fastest.values()
    print(f"ratio {many / few:.2f}")
    print(json.dumps({"batch_size": args.batch_size, "ms": fastest, "ratio": many / few}))


if __name__ == "__main__":
    main()
