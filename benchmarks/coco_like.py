"""A data set with files like COCO's."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

BOXES_PER_IMAGE = 7


def draw_coco_like_data(root: Path, num_files: int, num_images: int | None = None) -> None:
    """Writes images of 640 x 480 pixels and about 125 kB, with seven boxes each, in COCO's layout, to train on.

    Args:
        root: the new folder.
        num_files: JPEG files to write.
        num_images: images that the annotations list, over and over the same files. By default each once.
    """
    rng = np.random.default_rng(0)
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    for number in range(num_files):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        pixels = (np.asarray(coarse) + rng.normal(0, 14, (480, 640, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"train2017/{number}.jpg", quality=88)
    images, annotations = [], []
    for image_id in range(1, (num_images or num_files) + 1):
        images.append({"id": image_id, "file_name": f"{image_id % num_files}.jpg", "width": 640, "height": 480})
        for _ in range(BOXES_PER_IMAGE):
            x, y = rng.uniform(0, 500), rng.uniform(0, 380)
            bbox = [x, y, rng.uniform(10, 640 - x), rng.uniform(10, 480 - y)]
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "bbox": bbox})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "annotations/instances_train2017.json").write_text(json.dumps(content))
