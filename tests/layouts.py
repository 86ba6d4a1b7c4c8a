"""Tiny data sets in the layouts that programs export: the same photographs and boxes in each."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("cat", "dog")
SIZE = (96, 72)
TRAIN, VAL = range(1, 7), range(7, 10)
BOX = (12, 9, 48, 36)  # xywh


def image_name(number: int) -> str:
    return f"{number:06d}.jpg"


def class_of(number: int) -> int:
    """0 or 1."""
    return number % 2


def save_image(folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / image_name(number))


def write_coco(file: Path, images_dir: Path, numbers, prefix: str = "", first_id: int = 1) -> None:
    for number in numbers:
        save_image(images_dir, number)
    fields = {"width": SIZE[0], "height": SIZE[1]}
    content = {
        "images": [{"id": n, "file_name": prefix + image_name(n), **fields} for n in numbers],
        "categories": [{"id": first_id + i, "name": name} for i, name in enumerate(NAMES)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": first_id + class_of(n), "bbox": BOX, "area": 1728, "iscrowd": 0}
            for n in numbers
        ],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def coco(root: Path) -> None:
    for name, numbers in (("train2017", TRAIN), ("val2017", VAL)):
        write_coco(root / f"annotations/instances_{name}.json", root / name, numbers)


def roboflow(root: Path) -> None:
    """With a row that groups the classes, and a third set."""
    for name, numbers in (("train", TRAIN), ("valid", VAL), ("test", VAL)):
        file = root / name / "_annotations.coco.json"
        write_coco(file, root / name, numbers)
        content = json.loads(file.read_text())
        for one in content["categories"]:
            one["supercategory"] = "pets"
        content["categories"].insert(0, {"id": 0, "name": "pets", "supercategory": "none"})
        file.write_text(json.dumps(content))


def roboflow_whole(root: Path) -> None:
    write_coco(root / "train/_annotations.coco.json", root / "train", [*TRAIN, *VAL])


def cvat(root: Path) -> None:
    write_coco(root / "annotations/instances_default.json", root / "images", [*TRAIN, *VAL])


def cvat_subsets(root: Path) -> None:
    for name, numbers in (("Train", TRAIN), ("Validation", VAL)):
        write_coco(root / f"annotations/instances_{name}.json", root / "images" / name, numbers)


def label_studio(root: Path) -> None:
    """With the image folder in front of the names, ids from 0, and the separators of Windows."""
    write_coco(root / "result.json", root / "images", [*TRAIN, *VAL], prefix="images\\", first_id=0)


def plain(root: Path) -> None:
    write_coco(root / "labels.json", root / "photographs", [*TRAIN, *VAL])


def label(number: int) -> str:
    x, y, w, h = (value / side for value, side in zip(BOX, SIZE * 2, strict=True))
    if number == 1:  # as a polygon
        return f"{class_of(number)} {x} {y} {x + w} {y} {x + w} {y + h} {x} {y + h}\n"
    return f"{class_of(number)} {x + w / 2} {y + h / 2} {w} {h}\n"


def write_yolo(root: Path, folders: dict[str, str], settings: str) -> None:
    for name, numbers in (("train", TRAIN), ("val", VAL)):
        for number in numbers:
            save_image(root / folders[name], number)
            file = (root / folders[name].replace("images", "labels") / image_name(number)).with_suffix(".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(label(number))
    (root / "data.yaml").write_text(settings)


def yolo(root: Path) -> None:
    """As Ultralytics has them, with a path of another machine."""
    settings = "path: ../datasets/pets\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n"
    write_yolo(root, {"train": "images/train", "val": "images/val"}, settings)


def yolo_roboflow(root: Path) -> None:
    settings = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['cat', 'dog']\n"
    write_yolo(root, {"train": "train/images", "val": "valid/images"}, settings)


def yolo_whole(root: Path) -> None:
    """A list of images, whose labels lie beside them."""
    for number in [*TRAIN, *VAL]:
        save_image(root / "photographs", number)
        (root / "photographs" / image_name(number)).with_suffix(".txt").write_text(label(number))
    (root / "train.txt").write_text("".join(f"./photographs/{image_name(n)}\n" for n in [*TRAIN, *VAL]))
    (root / "data.yaml").write_text("train: train.txt\nnames: [cat, dog]\n")


def record(number: int, name: str, difficult: int = 0) -> str:
    x, y, w, h = BOX
    corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
    box = "".join(f"<{corner}>{value}</{corner}>" for corner, value in corners.items())
    size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height><depth>3</depth></size>"
    part = f"<part><name>head</name><bndbox>{box}</bndbox></part>"
    thing = f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox>{part}</object>"
    return f"<annotation><filename>{image_name(number)}</filename>{size}{thing}</annotation>"


def write_voc(folder: Path, sets: dict[str, list[int]], names=NAMES, difficult=()) -> None:
    for number in sorted({number for numbers in sets.values() for number in numbers}):
        save_image(folder / "JPEGImages", number)
        file = folder / "Annotations" / f"{number:06d}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(record(number, names[class_of(number)], int(number in difficult)))
    for name, numbers in sets.items():
        file = folder / f"ImageSets/Main/{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{number:06d}\n" for number in numbers))


def voc(root: Path) -> None:
    write_voc(root / "VOC2007", {"trainval": [1, 2, 3, 4], "test": [*VAL]}, difficult=[4, 8])
    write_voc(root / "VOC2012", {"trainval": [5, 6], "train": [5], "val": [6]})


def voc_folder(root: Path) -> None:
    """Classes that are not VOC's, which differ between the sets."""
    write_voc(root, {"train": [1, 2, 3, 4], "val": [5, 7]}, names=("snail", "slug"))


def voc_whole(root: Path) -> None:
    write_voc(root, {}, names=("snail", "slug"))
    for number in [*TRAIN, *VAL]:
        write_voc(root, {"aside": [number]}, names=("snail", "slug"))
    (root / "ImageSets/Main/aside.txt").unlink()


SPLIT = {"COCO": [coco], "Roboflow": [roboflow], "CVAT": [cvat_subsets], "YOLO": [yolo, yolo_roboflow]}
SPLIT |= {"Pascal VOC": [voc, voc_folder]}
WHOLE = {"Roboflow": [roboflow_whole], "CVAT": [cvat], "Label Studio": [label_studio], "YOLO": [yolo_whole]}
WHOLE |= {"Pascal VOC": [voc_whole], "one annotation file": [plain]}
ALL = [
    (name, make, is_split)
    for layouts, is_split in ((SPLIT, True), (WHOLE, False))
    for name, makers in layouts.items()
    for make in makers
]
