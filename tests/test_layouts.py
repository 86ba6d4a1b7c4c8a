"""Data sets in the layouts that programs export, in the hands of the scripts."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import coco
import evaluate
import ssd
import train
from coco import DataError
from engine import check_data
from tests import layouts
from tests.tiny import MODEL, TINY


@pytest.fixture(params=layouts.ALL, ids=lambda one: one[1].__name__)
def layout(request, tmp_path):
    """Its name, its folder, and the flags that it needs beside."""
    name, make, is_split = request.param
    make(tmp_path / "data set")
    return name, tmp_path / "data set", [] if is_split else ["--val-fraction", "0.3"]


def parse(*arguments):
    return train.parse_args([str(argument) for argument in arguments])


def test_a_data_set_is_recognised_trained_and_evaluated(layout, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ssd.family.MODELS, "tiny", MODEL)
    name, root, flags = layout
    flags = ["--data-path", root, "--output-dir", tmp_path / "out", "--workers", 0, "--device", "cpu", *flags]
    train.main(parse(*TINY, *flags, "-b", 2, "--max-steps", 2, "--epochs", 1))
    console = capsys.readouterr().out
    assert console.startswith(f"{root}: the layout of {name}")
    assert "Done: 2 steps" in console
    evaluated = [str(flag) for flag in ["--checkpoint", tmp_path / "out/checkpoint.pth", *flags]]
    evaluate.main(evaluate.get_args_parser().parse_args(evaluated))
    console = capsys.readouterr().out
    assert console.startswith(f"{root}: the layout of {name}")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["counts"]["images"] in (1, 2, 3)
    assert ("VOC" in metrics) == (name == "Pascal VOC") == ("Pascal VOC         (AP) @[ IoU=0.50" in console)
    args = parse(*flags)
    check_data.check_data(evaluate.find_splits(args, "train", "val"), workers=0, loader_timeout=0)
    assert capsys.readouterr().out.endswith("No faults\n")


def opened(layout, tmp_path):
    """Both splits, and the folders of their images."""
    _, root, flags = layout
    splits = evaluate.find_splits(parse("--data-path", root, *flags), "train", "val")
    sets = coco.agree_on_groups(*(split.open(tmp_path / "index") for split in splits.values()))
    return list(zip(sets, (split.images_dir for split in splits.values()), strict=True))


def test_every_box_and_image_is_read(layout, tmp_path):
    numbers = []
    for annotations, images_dir in opened(layout, tmp_path):
        assert len(annotations.boxes) == len(annotations.image_ids)
        np.testing.assert_allclose(annotations.boxes, np.tile(layouts.BOX, (len(annotations.boxes), 1)), atol=1e-9)
        assert (annotations.sizes == layouts.SIZE[::-1]).all()
        for row in range(len(annotations.image_ids)):
            number = int(annotations.file_name(row)[-10:-4])
            expected = np.asarray(coco.images.Image.open(images_dir / annotations.file_name(row)).convert("RGB"))
            np.testing.assert_array_equal(coco.load_image(annotations, images_dir, row)[..., :3], expected)
            name = annotations.categories[annotations.category_ids[annotations.offsets[row]]]
            assert name in (layouts.NAMES[layouts.class_of(number)], ("snail", "slug")[layouts.class_of(number)])
            numbers.append(number)
    assert len(numbers) == len(set(numbers)) >= 6


def test_both_splits_have_the_same_classes(layout, tmp_path):
    (annotations, _), (val_annotations, _) = opened(layout, tmp_path)
    assert annotations.classes == val_annotations.classes
    assert "pets" not in annotations.categories.values()


def test_an_index_is_taken_until_a_file_changes(layout, tmp_path):
    for annotations, _ in opened(layout, tmp_path):
        taken = coco.index.open_index(annotations.index, annotations.path)
        assert taken.file_names.tolist() == annotations.file_names.tolist()
        files = [Path(file) for file in annotations.files]
        for file in (file for file in files if file.suffix in (".json", ".xml", ".txt", ".yaml")):
            times = file.stat()
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
            assert coco.index.open_index(annotations.index, annotations.path) is None
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert coco.index.open_index(annotations.index, annotations.path) is not None


def test_what_is_held_out_stays_so(tmp_path):
    layouts.plain(tmp_path / "data")
    file = tmp_path / "data/labels.json"
    held_out = {}
    for number_of_images in (9, 60):
        layouts.write_coco(file, tmp_path / "data/photographs", range(1, number_of_images + 1))
        whole = {layouts.image_name(number) for number in range(1, number_of_images + 1)}
        for fraction in (0.2, 0.5):
            flags = ["--data-path", tmp_path / "data", "--val-fraction", fraction]
            splits = evaluate.find_splits(parse(*flags), "train", "val")
            names = [
                {one.file_name(row) for row in range(len(one.image_ids))}
                for one in (split.open(tmp_path / "index") for split in splits.values())
            ]
            assert names[0] | names[1] == whole
            assert not names[0] & names[1]
            assert held_out.get(fraction, set()) <= names[1]
            held_out[fraction] = names[1]
            alone = evaluate.find_splits(parse(*flags), "val")["val"].open(tmp_path / "index")
            assert {alone.file_name(row) for row in range(len(alone.image_ids))} == names[1]
    assert held_out[0.2] < held_out[0.5]
    assert 5 <= len(held_out[0.2]) <= 20
    assert 20 <= len(held_out[0.5]) <= 40


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_each_side_has_an_image(tmp_path, fraction):
    layouts.write_coco(tmp_path / "a.json", tmp_path / "images", range(1, 3))
    splits = evaluate.find_splits(parse("--data-path", tmp_path, "--val-fraction", fraction), "train", "val")
    assert [len(split.open(tmp_path / "index").image_ids) for split in splits.values()] == [1, 1]
    layouts.write_coco(tmp_path / "a.json", tmp_path / "images", range(1, 2))
    with pytest.raises(DataError, match=r"a\.json: has too few images, or names of their files, to hold some out"):
        splits["val"].open(tmp_path / "index")


def test_the_fraction_goes_with_files_that_are_named(tmp_path):
    layouts.plain(tmp_path)
    files = ["images", tmp_path / "photographs", "annotations", tmp_path / "labels.json"]

    def flags(name: str) -> list:
        return [f"--{name}-{files[0]}", files[1], f"--{name}-{files[2]}", files[3], "--val-fraction", 0.3]

    train_split, val_split = evaluate.find_splits(parse(*flags("train")), "train", "val").values()
    assert evaluate.find_splits(parse(*flags("val")), "val")["val"] == val_split
    assert train_split.images_dir == val_split.images_dir
    assert train_split.part.is_held_out != val_split.part.is_held_out
    both = [*flags("train"), *flags("val")]
    with pytest.raises(DataError, match="--val-fraction: the data are split already"):
        evaluate.find_splits(parse(*both), "train", "val")


def test_one_set_of_files_may_be_named_beside_a_folder(tmp_path):
    layouts.coco(tmp_path / "data")
    layouts.write_coco(tmp_path / "other.json", tmp_path / "other", layouts.VAL)
    flags = ["--data-path", tmp_path / "data", "--val-annotations", tmp_path / "other.json"]
    split = evaluate.find_splits(parse(*flags), "train", "val")["val"]
    assert (split.source.path, split.images_dir) == (tmp_path / "other.json", tmp_path / "data/val2017")
    split = evaluate.find_splits(parse(*flags, "--val-images", tmp_path / "other"), "train", "val")["val"]
    assert split.images_dir == tmp_path / "other"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ([], r"holds no data set that is known here; looked for COCO \(annotations/instances_.*; Roboflow .*; YOLO "),
        (
            [layouts.coco, layouts.yolo],
            "may be a data set of COCO or YOLO; name its annotation files and image folders",
        ),
        ([layouts.cvat, layouts.label_studio], "may be a data set of CVAT or Label Studio"),
        ([layouts.plain], "comes in one; hold some of it out to validate on, with --val-fraction 0.2"),
        ([layouts.cvat], "comes in one; hold some of it out"),
    ],
)
def test_what_cannot_be_recognised_is_an_error(tmp_path, make, message):
    for one in make:
        one(tmp_path)
    with pytest.raises(DataError, match=re.escape(str(tmp_path)) + ": " + message):
        evaluate.find_splits(parse("--data-path", tmp_path), "train", "val")


def test_two_annotation_files_are_not_one(tmp_path):
    layouts.plain(tmp_path)
    shutil.copy(tmp_path / "labels.json", tmp_path / "more.json")
    with pytest.raises(DataError, match="holds no data set that is known here"):
        evaluate.find_splits(parse("--data-path", tmp_path, "--val-fraction", 0.2), "train", "val")


def test_a_split_data_set_is_not_split_again(tmp_path):
    layouts.yolo(tmp_path)
    for names in (["train", "val"], ["val"]):
        with pytest.raises(DataError, match="--val-fraction: the data are split already"):
            evaluate.find_splits(parse("--data-path", tmp_path, "--val-fraction", 0.2), *names)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder; --data-path is the folder of a data set"):
        evaluate.find_splits(parse("--data-path", tmp_path / "nowhere"), "train", "val")


def test_the_same_images_are_held_out_however_their_names_are_written(tmp_path):
    """Also where nobody needs the images, as with --detections."""
    held_out = set()
    for number, prefix in enumerate(["", "images\\", "images/", "./", f"{tmp_path}/4/images/"]):
        root = tmp_path / str(number)
        layouts.write_coco(root / "result.json", root / "images", range(1, 30), prefix=prefix)
        for needs_images in (True, False):
            flags = parse("--data-path", root, "--val-fraction", 0.3)
            split = evaluate.find_splits(flags, "val", needs_images=needs_images)["val"]
            held_out.add(tuple(split.open(tmp_path / "index", needs_images).image_ids.tolist()))
    assert len(held_out) == 1


def test_detections_need_no_images_though_a_folder_is_named(tmp_path):
    layouts.write_coco(tmp_path / "val.json", tmp_path / "aside", layouts.VAL)
    flags = parse("--data-path", tmp_path / "nowhere", "--val-annotations", tmp_path / "val.json")
    split = evaluate.find_splits(flags, "val", needs_images=False)["val"]
    assert len(split.open(tmp_path / "index", needs_images=False).image_ids) == 3


def test_half_a_coco_data_set(tmp_path):
    layouts.coco(tmp_path)
    shutil.rmtree(tmp_path / "val2017")
    (tmp_path / "annotations/instances_val2017.json").unlink()
    splits = evaluate.find_splits(parse("--data-path", tmp_path, "--val-fraction", 0.3), "train", "val")
    assert sum(len(split.open(tmp_path / "index").image_ids) for split in splits.values()) == len(layouts.TRAIN)


def test_images_below_a_folder_of_images(tmp_path):
    layouts.coco(tmp_path)
    for name in ("train2017", "val2017"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / "images" / name)
    splits = evaluate.find_splits(parse("--data-path", tmp_path), "train", "val")
    assert [split.images_dir.parent.name for split in splits.values()] == ["images", "images"]


def test_a_whole_data_set_lends_its_images_to_files_that_are_named(tmp_path):
    layouts.label_studio(tmp_path)
    split = evaluate.find_splits(parse("--data-path", tmp_path, "--val-annotations", tmp_path / "result.json"), "val")[
        "val"
    ]
    assert split.images_dir == tmp_path / "images"


def test_hidden_folders_are_no_part_of_it(tmp_path):
    for make, folder in ((layouts.plain, "."), (layouts.voc_whole, "Annotations"), (layouts.voc_whole, "JPEGImages")):
        root = tmp_path / f"{make.__name__}{folder}"
        make(root)
        copies = root / folder / ".ipynb_checkpoints"
        for file in [
            *root.glob("photographs/*1.jpg"),
            *root.glob("Annotations/*1.xml"),
            *root.glob("JPEGImages/*1.jpg"),
        ]:
            copies.mkdir(exist_ok=True)
            shutil.copy(file, copies / f"{file.stem}-checkpoint{file.suffix}")
        splits = evaluate.find_splits(parse("--data-path", root, "--val-fraction", 0.3), "train", "val")
        assert sum(len(split.open(tmp_path / "index").image_ids) for split in splits.values()) == 9


def test_a_fault_of_both_halves_is_listed_once(tmp_path, capsys):
    layouts.plain(tmp_path)
    content = json.loads((tmp_path / "labels.json").read_text())
    content["annotations"][0]["iscrowd"] = 7
    (tmp_path / "labels.json").write_text(json.dumps(content))
    splits = evaluate.find_splits(parse("--data-path", tmp_path, "--val-fraction", 0.3), "train", "val")
    assert len(list(check_data.find_faults(splits, workers=0, loader_timeout=0))) == 1


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """By who may not: root may read anything, so that it is told no."""
    layouts.plain(tmp_path)

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}: cannot be read (Permission denied)")):
        evaluate.find_splits(parse("--data-path", tmp_path), "train", "val")
