"""Layouts of data sets: which files a folder holds, found by looking."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import utils

from . import shapes, voc, yolo
from .annotations import JsonFile
from .images import is_image_name
from .index import HeldOut
from .rules import DataError
from .sources import Split

SHAPES_PATH = "data/shapes"
SPLITS = ("train", "val")
COCO_FILES = "annotations/instances_{name}2017.json {name}2017 images/{name}2017"  # the last as Ultralytics has them
VALIDATION_NAMES = ("val", "valid", "validation")
Splits = dict[str, Split]  # by name: both, or all as ``train`` where the data come in one


def coco_layout(root: Path) -> Splits:
    found = {}
    for name in SPLITS:
        file, images, others = (root / part for part in COCO_FILES.format(name=name).split())
        if file.is_file() or images.is_dir():
            found[name] = Split(images if images.is_dir() or not others.is_dir() else others, JsonFile(file))
    return found


def roboflow_layout(root: Path) -> Splits:
    files = {folder.name: folder / "_annotations.coco.json" for folder in root.iterdir() if folder.is_dir()}
    found = {name: Split(file.parent, JsonFile(file)) for name, file in files.items() if file.is_file()}
    return named(found)


def cvat_layout(root: Path) -> Splits:
    images = root / "images"
    if not images.is_dir():
        return {}
    found = {}
    for file in (root / "annotations").glob("instances_*.json"):
        name = file.stem.removeprefix("instances_")
        if not name.endswith("2017"):  # COCO's own
            found[name] = Split(images / name if (images / name).is_dir() else images, JsonFile(file))
    return named(found)


def label_studio_layout(root: Path) -> Splits:
    file, images = root / "result.json", root / "images"
    return {"train": Split(images, JsonFile(file))} if file.is_file() and images.is_dir() else {}


def yolo_layout(root: Path) -> Splits:
    return yolo.find_splits(root / "data.yaml") if (root / "data.yaml").is_file() else {}


def plain_layout(root: Path) -> Splits:
    files = [*root.glob("[!.]*.json"), *root.glob("annotations/[!.]*.json")]
    folders = [folder for folder in (root, *root.glob("[!.]*")) if folder.is_dir() and has_images(folder)]
    if (root / "images").is_dir():
        folders = [root / "images"]
    return {"train": Split(folders[0], JsonFile(files[0]))} if len(files) == len(folders) == 1 else {}


LAYOUTS: dict[str, tuple[str, Callable[[Path], Splits]]] = {
    "COCO": ("annotations/instances_{train,val}2017.json, train2017/, val2017/", coco_layout),
    "Roboflow": ("train/_annotations.coco.json, valid/_annotations.coco.json", roboflow_layout),
    "CVAT": ("annotations/instances_default.json, images/", cvat_layout),
    "Label Studio": ("result.json, images/", label_studio_layout),
    "YOLO": ("data.yaml", yolo_layout),
    "Pascal VOC": ("VOC2007/, VOC2012/, or Annotations/, JPEGImages/", voc.find_splits),
    "one annotation file": ("one *.json, one folder of images", plain_layout),
}


def named(found: Splits) -> Splits:
    """Splits under the names that they have here, from those of a program; one alone is the whole data set."""
    names = {name.lower(): name for name in found}
    if len(found) == 1:
        return {"train": next(iter(found.values()))}
    val = next((names[name] for name in VALIDATION_NAMES if name in names), None)
    if "train" not in names:
        return {}
    return {"train": found[names["train"]]} | ({"val": found[val]} if val else {})


def has_images(folder: Path) -> bool:
    return any(is_image_name(file.name) for file in folder.iterdir())


def find_layout(root: Path) -> tuple[str, Splits]:
    """Name and splits of the layout that a folder has.

    Raises:
        DataError: there is no such folder, or it has none of the layouts, or several.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; --data-path is the folder of a data set")
    try:
        found = {name: splits for name, (_, look) in LAYOUTS.items() if (splits := look(root))}
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if len(found) > 1:
        found.pop("one annotation file", None)
    if not found:
        looked_for = "; ".join(f"{name} ({files})" for name, (files, _) in LAYOUTS.items())
        raise DataError(f"{root}: holds no data set that is known here; looked for {looked_for}")
    if len(found) > 1:
        raise DataError(
            f"{root}: may be a data set of {' or '.join(found)}; name its annotation files and image folders"
        )
    return next(iter(found.items()))


def find_splits(
    dataset: str,
    data_path: str | None,
    files: dict[str, tuple[str | None, str | None]],
    val_fraction: float | None = None,
    needs_images: bool = True,
) -> Splits:
    """The files of a data set, and a line of what was found by looking.

    Args:
        dataset: ``coco``, or ``shapes`` for the embedded data set, which is drawn where it is not there yet.
        data_path: the folder of a data set; of shapes by default ``SHAPES_PATH``.
        files: for ``train`` and ``val``, as far as they are wanted, the image folder and the annotation file, where
            they are not those that the folder has.
        val_fraction: which fraction is held out of data that come in one.
        needs_images: annotations without an image folder are not enough.

    Raises:
        ValueError: files are neither named nor found, or the fraction is of data that are split already.
    """
    if dataset == "shapes":
        data_path = data_path or SHAPES_PATH
        with utils.main_first():
            shapes.draw_data_set(data_path)
    found = {}
    is_complete = all(annotations and (images or not needs_images) for images, annotations in files.values())
    if data_path is not None and not is_complete:
        layout, found = find_layout(Path(data_path))
        utils.print_on_main(describe(layout, Path(data_path), found))
    splits = {name: with_files(found, name, *files.get(name, (None, None))) for name in SPLITS}
    if val_fraction is not None:
        is_split = "val" in found or (files.keys() == {*SPLITS} and splits["val"] is not None)
        splits = hold_out(splits, val_fraction, is_split)
    for name in files:
        if splits[name] is None or (needs_images and splits[name].images_dir is None):
            raise DataError(what_is_missing(name, data_path if splits[name] is None and found else None))
    return {name: splits[name] for name in files}


def what_is_missing(name: str, data_path: str | None) -> str:
    """That there is no split of this name, in the data set of ``data_path`` or because none is named (None)."""
    flags = f"--{name}-images and --{name}-annotations"
    if data_path is None:
        return f"--data-path is missing: give the folder of a data set, or {flags}; --dataset shapes needs neither"
    if name == "train":
        return f"{data_path}: has nothing to train on; name its files with {flags}"
    remedy = "hold some of it out to validate on, with --val-fraction 0.2"
    return f"{data_path}: comes in one; {remedy}, or name more files with {flags}"


def describe(layout: str, root: Path, splits: Splits) -> str:
    """What was found in a folder, in a line."""
    places = [
        f"{name} has {os.path.relpath(split.source.path, root)}, images in {os.path.relpath(split.images_dir, root)}"
        for name, split in splits.items()
    ]
    whole = "" if "val" in splits else " (not split)"
    return f"{root}: the layout of {layout}{whole}: {'; '.join(places)}"


def with_files(found: Splits, name: str, images: str | None, annotations: str | None) -> Split | None:
    """The split of that name, with files that are named in the place of those that were found."""
    split = found.get(name)
    if annotations is not None:
        whole = split or found.get("train")
        return Split(Path(images) if images else whole and whole.images_dir, JsonFile(Path(annotations)))
    return replace(split, images_dir=Path(images)) if split is not None and images else split


def hold_out(splits: dict[str, Split | None], fraction: float, is_split: bool) -> dict[str, Split | None]:
    """Both parts of a data set that comes in one, be it as the one split or as the other."""
    if is_split:
        raise DataError("--val-fraction: the data are split already; it is for data that come in one")
    whole = splits["val"] or splits["train"]
    return {name: whole and replace(whole, part=HeldOut(fraction, name == "val")) for name in SPLITS}
