"""Input pipeline: images per second and core, against decoding alone and against torchvision's reference pipeline.

    python -m benchmarks.input_pipeline [--data-path DIR] [--images N] [--rounds N] [--workers N]

Without --data-path it makes JPEG files of COCO's size and texture by itself. Each variant runs in one thread of its own
process, as a loader worker does. They take turns in every round, on the same files; the fastest round of each counts,
by processor time, since a noisy machine only adds to it. Last comes a DataLoader with --workers processes: images per
second by the clock, and the memory that a worker has for itself. The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

import coco
import coco_utils
import presets
from benchmarks.coco_like import draw_coco_like_data
from benchmarks.memory import private_memory
from benchmarks.turns import take_turns
from coco_utils import CocoTrainDataset
from engine import flags, loading

BATCH_SIZE = 8
SIZE = 300
SEED = 0


def open_data_set(root: Path) -> CocoTrainDataset:
    annotations = coco.read_annotations(root / "annotations/instances_train2017.json")
    preset = presets.DetectionPresetTrain(data_augmentation="ssd", size=SIZE)
    return CocoTrainDataset(annotations, root / "train2017", preset, SEED)


def decode(dataset: CocoTrainDataset) -> None:
    for row in dataset.rows:
        coco.load_image(dataset.annotations, dataset.images_dir, row)


def reference(dataset: CocoTrainDataset) -> None:
    """torchvision's ``ssd`` preset with transforms v2 on PIL images, and the resize and normalisation of its model."""
    fill = {tv_tensors.Image: (123.0, 117.0, 104.0), Image.Image: (123, 117, 104), "others": 0}
    augment = v2.Compose(
        [
            v2.RandomPhotometricDistort(),
            v2.RandomZoomOut(fill=fill),
            v2.RandomIoUCrop(),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float, scale=True),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )
    mean = torch.tensor([0.48235, 0.45882, 0.40784]).view(3, 1, 1)
    for row in dataset.rows:
        image = Image.open(dataset.images_dir / dataset.annotations.file_name(row)).convert("RGB")
        boxes, labels = coco.objects_of_image(dataset.annotations, row)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(image.height, image.width)),
            "labels": torch.from_numpy(labels),
        }
        pixels, target = augment(image, target)
        F.interpolate(((pixels - mean) * 255)[None], size=(SIZE, SIZE), mode="bilinear")


def batches(dataset: CocoTrainDataset) -> Iterator[dict]:
    keys = [(0, index) for index in range(len(dataset))]
    for start in range(0, len(keys), BATCH_SIZE):
        yield coco_utils.collate([dataset[key] for key in keys[start : start + BATCH_SIZE]])


def ours(dataset: CocoTrainDataset) -> None:
    for _ in batches(dataset):
        pass


def ours_with_device_stage(dataset: CocoTrainDataset) -> None:
    for batch in batches(dataset):
        dataset.preset.on_device(batch)


# name -> what it runs, and whether its process keeps freed memory, as our loader workers do
VARIANTS = {
    "decode": (decode, True),
    "reference": (reference, False),
    "reference, keeping memory": (reference, True),
    "ours": (ours, True),
    "ours + device stage": (ours_with_device_stage, True),
}

one_pass: Callable[[CocoTrainDataset], None]  # of this process
data: CocoTrainDataset


def start(name: str, root: Path) -> None:
    global one_pass, data
    torch.set_num_threads(1)
    one_pass, keeps_memory = VARIANTS[name]
    if keeps_memory:
        loading.keep_freed_memory()
    data = open_data_set(root)


def measure() -> float:
    """Processor time of one pass over the data set."""
    begin = time.process_time()
    one_pass(data)
    return time.process_time() - begin


def measure_variants(root: Path, rounds: int) -> dict[str, float]:
    """Images per second and core of each variant."""
    seconds = take_turns(start, measure, {name: (name, root) for name in VARIANTS}, rounds)
    return {name: len(open_data_set(root)) / min(times) for name, times in seconds.items()}


def measure_loader(root: Path, workers: int, rounds: int) -> dict[str, float]:
    """A DataLoader as in train.py: images per second by the clock, and the private memory of its largest worker."""
    dataset = open_data_set(root)
    sampler = coco_utils.EpochBatchSampler(len(dataset), BATCH_SIZE, SEED)
    loader = loading.make_loader(
        dataset, workers, 300, batch_sampler=sampler, collate_fn=coco_utils.collate, persistent_workers=True
    )
    rates = []
    for epoch in range(rounds + 1):
        sampler.select(epoch)
        start = time.perf_counter()
        num_images = sum(len(batch["image"]) for batch in loader)
        rates.append(num_images / (time.perf_counter() - start))
    memory = max(private_memory(process.pid) for process in multiprocessing.active_children())
    return {"images_per_second": statistics.median(rates[1:]), "private_MiB_per_worker": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, help="folder in COCO's layout; its training images are used")
    parser.add_argument("--images", type=int, default=60, help="how many to make where no path is given")
    parser.add_argument("--rounds", type=flags.positive, default=10)
    parser.add_argument("--workers", type=flags.positive, default=2, help="of the DataLoader")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = args.data_path or Path(folder) / "data"
        if args.data_path is None:
            draw_coco_like_data(root, args.images)
        rates = measure_variants(root, args.rounds)
        loader = measure_loader(root, args.workers, args.rounds)
    for name, rate in rates.items():
        print(f"{name:26} {rate:7.1f} images/s per core   {1000 / rate:6.2f} ms per image")
    ratios = {
        f"{one} / {other}": rates[one] / rates[other]
        for one in ("ours", "ours + device stage")
        for other in ("reference", "reference, keeping memory", "decode")
    }
    for name, ratio in ratios.items():
        print(f"{name:46} {ratio:.2f}")
    print(
        f"loader with {args.workers} workers: {loader['images_per_second']:.1f} images/s, "
        f"{loader['private_MiB_per_worker']:.0f} MiB for each worker alone"
    )
    print(json.dumps({"images_per_second_per_core": rates, **ratios, "loader": {"workers": args.workers, **loader}}))


if __name__ == "__main__":
    main()
