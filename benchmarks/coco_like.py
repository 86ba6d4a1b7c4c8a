"""A data set with files like COCO's.

python -m benchmarks.coco_like FOLDER [--files N]
"""

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

BOXES_PER_IMAGE = 7  # COCO's mean
MAX_BOXES = 93  # COCO's largest number in an image of train2017; here the first has so many
CATEGORY_IDS = range(1, 91)


def draw_coco_like_data(root: Path, num_files: int, num_images: int | None = None) -> None:
    """Writes images of 640 x 480 pixels and about 125 kB in COCO's layout, with as many boxes and classes, to train on.

    Args:
        root: the folder. Images that it has are not drawn again.
        num_files: JPEG files to write.
        num_images: images that the annotations list, over and over the same files. By default each once.
    """
    (root / "train2017").mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    paths = [root / f"train2017/{number}.jpg" for number in range(num_files)]
    missing = [path for path in paths if not path.exists()]
    if missing:
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit the locks of PyTorch's threads
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), spawn) as pool:
            list(pool.map(draw_image, missing, chunksize=8))
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for image_id in range(1, (num_images or num_files) + 1):
        images.append({"id": image_id, "file_name": f"{image_id % num_files}.jpg", "width": 640, "height": 480})
        for _ in range(MAX_BOXES if image_id == 1 else BOXES_PER_IMAGE):
            x, y = rng.uniform(0, 500), rng.uniform(0, 380)
            bbox = [x, y, rng.uniform(10, 640 - x), rng.uniform(10, 480 - y)]
            number = len(annotations) + 1
            category_id = CATEGORY_IDS[number % len(CATEGORY_IDS)]
            annotations.append({"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox})
    categories = [{"id": category_id, "name": f"thing {category_id}"} for category_id in CATEGORY_IDS]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations/instances_train2017.json").write_text(json.dumps(content))


def draw_image(path: Path) -> None:
    """Soft colours under noise; what it shows depends on the file's name alone. It appears whole or not at all."""
    rng = np.random.default_rng(int(path.stem))
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
    pixels = (np.asarray(coarse) + rng.normal(0, 14, (480, 640, 3))).clip(0, 255).astype(np.uint8)
    partial = path.with_suffix(f".{os.getpid()}")
    Image.fromarray(pixels).save(partial, format="JPEG", quality=88)
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=500)
    args = parser.parse_args()
    draw_coco_like_data(args.folder, args.files)
    print(f"{args.files} files in {args.folder}")


if __name__ == "__main__":
    main()
