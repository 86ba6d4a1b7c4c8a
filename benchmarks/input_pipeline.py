"""Input pipeline: images per second and core, against decoding alone and against torchvision's reference pipeline.

    python benchmarks/input_pipeline.py [--data-path DIR] [--images N] [--rounds N]

Without --data-path it makes JPEG files of COCO's size and texture by itself. The variants take turns in every round, on
the same files and in one thread, so that a noisy machine slows all alike; the median round counts. The last line is one
JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))

import coco_utils
import presets

BATCH_SIZE = 8
SIZE = 300


def make_coco_like_data(root: Path, num_images: int) -> None:
    """JPEG files of 640 x 480 pixels and about 170 kB, with seven boxes each, in COCO's layout."""
    rng = np.random.default_rng(0)
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        pixels = (np.asarray(coarse) + rng.normal(0, 14, (480, 640, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"train2017/{image_id}.jpg", quality=88)
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "width": 640, "height": 480})
        for _ in range(7):
            x, y = rng.uniform(0, 500), rng.uniform(0, 380)
            bbox = [x, y, rng.uniform(10, 640 - x), rng.uniform(10, 480 - y)]
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "bbox": bbox})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "annotations/instances_train2017.json").write_text(json.dumps(content))


def reference_pipeline():
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

    def process(path: Path, boxes: np.ndarray, labels: np.ndarray) -> torch.Tensor:
        image = Image.open(path).convert("RGB")
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(image.height, image.width)),
            "labels": torch.from_numpy(labels),
        }
        pixels, target = augment(image, target)
        mean = torch.tensor([0.48235, 0.45882, 0.40784]).view(3, 1, 1)
        return F.interpolate(((pixels - mean) * 255)[None], size=(SIZE, SIZE), mode="bilinear")[0]

    return process


def variants(root: Path) -> dict:
    """Name -> function that processes all images of the data set once."""
    annotations = coco_utils.read_annotations(root / "annotations/instances_train2017.json")
    preset = presets.DetectionPresetTrain(data_augmentation="ssd", size=SIZE)
    dataset = coco_utils.CocoTrainDataset(annotations, root / "train2017", preset, seed=0)
    reference = reference_pipeline()

    def decode() -> None:
        for row in dataset.rows:
            coco_utils.load_image(annotations, dataset.images_dir, row)

    def run_reference() -> None:
        for row in dataset.rows:
            boxes = np.arange(*annotations.offsets[row : row + 2])
            boxes = boxes[dataset.is_object[boxes]]
            path = dataset.images_dir / annotations.file_names[row]
            reference(path, dataset.boxes[boxes], dataset.labels[boxes])

    def batches(epoch: int) -> list[dict]:
        starts = range(0, len(dataset), BATCH_SIZE)
        return [
            coco_utils.collate([dataset[epoch, i] for i in range(start, min(start + BATCH_SIZE, len(dataset)))])
            for start in starts
        ]

    def ours() -> None:
        batches(epoch=0)

    def ours_with_device_stage() -> None:
        for batch in batches(epoch=0):
            preset.on_device(batch)

    functions = {"decode": decode, "reference": run_reference, "ours": ours, "ours + device": ours_with_device_stage}
    return {"num_images": len(dataset), "functions": functions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, help="folder in COCO's layout; its training images are used")
    parser.add_argument("--images", type=int, default=60, help="how many to make where no path is given")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = args.data_path or Path(folder) / "data"
        if args.data_path is None:
            make_coco_like_data(root, args.images)
        measured = variants(root)
        seconds = {name: [] for name in measured["functions"]}
        for _ in range(args.rounds + 1):
            for name, function in measured["functions"].items():
                start = time.process_time()
                function()
                seconds[name].append(time.process_time() - start)
    rates = {name: measured["num_images"] / statistics.median(times[1:]) for name, times in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:15} {rate:7.1f} images/s per core   {1000 / rate:6.2f} ms per image")
    ratios = {
        "ours / reference": rates["ours"] / rates["reference"],
        "ours / decode": rates["ours"] / rates["decode"],
        "ours + device / reference": rates["ours + device"] / rates["reference"],
    }
    for name, ratio in ratios.items():
        print(f"{name:26} {ratio:.2f}")
    print(json.dumps({"images_per_second_per_core": rates, **ratios}))


if __name__ == "__main__":
    main()
