"""The embedded data set: coloured shapes on textured ground, drawn once, in COCO's layout with real JPEG files.

It lets the whole path run without a download. Objects range from small to large and overlap; some images are empty, and
some hold a crowd. The same seed draws the same pictures.
"""

import colorsys
import json
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CATEGORIES = {1: "circle", 2: "square", 3: "triangle", 4: "star", 5: "ring", 6: "cross"}
NUM_IMAGES = {"train2017": 480, "val2017": 100}
SUPERSAMPLING = 2  # outlines are drawn larger and shrunk, which smooths them
UPRIGHT = {"circle": 0, "square": 45, "triangle": -90, "star": -90, "ring": 0, "cross": 15}  # angle of the first corner
MAX_TILT = 15  # degrees
MAX_OVERLAP = 0.3  # of the smaller of two boxes


def draw_data_set(root: str | Path, seed: int = 0, num_images: dict[str, int] = NUM_IMAGES) -> None:
    """Draws the data set under ``root``, unless it is there. It appears all at once, so no other run sees a part."""
    root = Path(root)
    if (root / "annotations").is_dir():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{root.name}.", dir=root.parent))
    (unfinished / "annotations").mkdir()
    for number, (split, count) in enumerate(num_images.items()):
        (unfinished / split).mkdir()
        images, annotations = [], []
        for image_id in range(1, count + 1):
            picture, objects = draw_picture(np.random.default_rng((seed, number, image_id)))
            file_name = f"{image_id:06d}.jpg"
            picture.save(unfinished / split / file_name, quality=90)
            images.append({"id": image_id, "file_name": file_name, "width": picture.width, "height": picture.height})
            for fields in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **fields})
        content = {
            "info": {"description": "Coloured shapes on textured ground"},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name, "supercategory": "shape"} for i, name in CATEGORIES.items()],
        }
        (unfinished / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    try:
        unfinished.chmod(0o755)
        unfinished.rename(root)
    except OSError:
        shutil.rmtree(unfinished)
        if not (root / "annotations").is_dir():  # else another process was faster
            raise ValueError(f"{root}: is in the way of the embedded data set; choose another --data-path") from None


def draw_picture(rng: np.random.Generator) -> tuple[Image.Image, list[dict]]:
    """One picture and its objects: dicts of ``category_id``, ``bbox`` (xywh), ``area`` and ``iscrowd``."""
    width, height = (int(side) for side in rng.integers(240, 401, 2))
    picture = draw_ground(width, height, rng)
    objects = []
    num_objects = 0 if rng.random() < 0.05 else int(rng.integers(1, 7))
    for _ in range(num_objects):
        diameter = math.exp(rng.uniform(math.log(24), math.log(0.7 * min(width, height))))
        center = rng.uniform(0.3 * diameter, (width - 0.3 * diameter, height - 0.3 * diameter))
        category_id = int(rng.choice(list(CATEGORIES)))
        outline = shape_mask(
            (width, height), CATEGORIES[category_id], center, diameter, rng.uniform(-MAX_TILT, MAX_TILT)
        )
        add_object(picture, objects, outline, category_id, rng)
    if rng.random() < 0.05:
        add_object(picture, objects, crowd_mask((width, height), rng), category_id=1, rng=rng, is_crowd=True)
    return picture, objects


def draw_ground(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Soft blotches of muted colour with fine grain."""
    blotches = rng.integers(60, 180, (6, 6, 1)) + rng.integers(-20, 21, (6, 6, 3))
    blotches = Image.fromarray(blotches.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 10, (height, width, 1))
    return Image.fromarray((np.asarray(blotches) + grain).clip(0, 255).astype(np.uint8))


def shape_mask(size: tuple[int, int], name: str, center, diameter: float, tilt: float) -> Image.Image:
    """A mask of the image's ``size`` (width, height), 255 inside the shape; ``tilt`` in degrees."""
    mask = Image.new("L", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    for radius, inside in outlines(name):
        turns = np.linspace(0, 1, len(radius), endpoint=False) * 2 * math.pi + math.radians(UPRIGHT[name] + tilt)
        points = np.stack((np.cos(turns), np.sin(turns)), axis=1) * np.array(radius)[:, None] * diameter / 2
        draw.polygon([tuple(p) for p in ((points + center) * SUPERSAMPLING).tolist()], fill=255 if inside else 0)
    return mask.resize(size, Image.Resampling.BOX)


def outlines(name: str) -> list[tuple[list[float], bool]]:
    """A shape as polygons: radii at even angles, and whether the inside is filled or cut out."""
    arm = 0.35  # inner corners of the cross
    return {
        "circle": [([1.0] * 60, True)],
        "square": [([1.0] * 4, True)],
        "triangle": [([1.0] * 3, True)],
        "star": [([1.0, 0.4] * 5, True)],
        "ring": [([1.0] * 60, True), ([0.55] * 60, False)],
        "cross": [([1.0, arm, 1.0] * 4, True)],
    }[name]


def crowd_mask(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Many small circles close together."""
    middle = rng.uniform((40, 40), (size[0] - 40, size[1] - 40))
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    for _ in range(12):
        center = middle + rng.uniform(-40, 40, 2)
        mask = np.maximum(mask, np.asarray(shape_mask(size, "circle", center, 14, 0.0)))
    return Image.fromarray(mask)


def add_object(picture, objects: list[dict], mask: Image.Image, category_id: int, rng, is_crowd: bool = False) -> None:
    """Paints the masked shape and notes its box, unless it would cover too much of another object."""
    covered = np.asarray(mask) >= 128
    if not covered.any():
        return
    columns, rows = np.flatnonzero(covered.any(axis=0)), np.flatnonzero(covered.any(axis=1))
    x, y = int(columns[0]), int(rows[0])
    box = [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
    if any(overlap(box, other["bbox"]) > MAX_OVERLAP for other in objects):
        return
    color = tuple(round(255 * value) for value in colorsys.hsv_to_rgb(rng.random(), *rng.uniform(0.5, 1.0, 2)))
    picture.paste(color, mask=mask)
    area = int(covered.sum())
    objects.append({"category_id": category_id, "bbox": box, "area": area, "iscrowd": int(is_crowd)})


def overlap(box1: list[int], box2: list[int]) -> float:
    """Shared area of two boxes xywh, as a fraction of the smaller one."""
    width = min(box1[0] + box1[2], box2[0] + box2[2]) - max(box1[0], box2[0])
    height = min(box1[1] + box1[3], box2[1] + box2[3]) - max(box1[1], box2[1])
    return max(width, 0) * max(height, 0) / min(box1[2] * box1[3], box2[2] * box2[3])
