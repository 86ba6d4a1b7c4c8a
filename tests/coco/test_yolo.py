import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import coco
from coco import DataError, yolo
from coco.yolo import YoloLabels
from tests import layouts


def read(root):
    split = yolo.find_splits(root / "data.yaml")["train"]
    return coco.read_annotations(split.source, images_dir=split.images_dir)


def faults(root) -> list[str]:
    return coco.parse_annotations(YoloLabels(root / "data.yaml", "train"))[1]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("2 0.5 0.5 0.1 0.1", "is of class 2, which names does not have"),
        ("-1 0.5 0.5 0.1 0.1", "is of class -1, which"),
        ("0.5 0.5 0.5 0.1 0.1", "is of class 0.5, which"),
        ("nan 0.5 0.5 0.1 0.1", "is of class nan, which"),
        ("0 0.5 0.5 0.1", "has 4 numbers; expected a class and 4"),
        ("0 0.5 0.5 0.1 0.1 0.9", "has 6 numbers; expected"),
        ("0", "has 1 numbers; expected"),
        ("0 48 36 10 10", "has numbers that are no fractions of the image, 0 to 1"),
        ("0 0.5 0.5 -0.1 0.1", "has numbers that are no fractions of the image"),
        ("0 0.5 nan 0.1 0.1", "has numbers that are no fractions of the image"),
        ("cat 0.5 0.5 0.1 0.1", "has something that is no number"),
    ],
)
def test_faulty_lines_are_named(tmp_path, line, says):
    layouts.yolo(tmp_path)
    file = tmp_path / "labels/train/000002.txt"
    file.write_text(f"0 0.5 0.5 0.1 0.1\n\n{line}\n")
    (fault,) = faults(tmp_path)
    assert fault.startswith(f"{file}: line 3: {says}")
    with pytest.raises(DataError, match="line 3"):
        read(tmp_path)


def test_class_numbers_may_be_floats_and_files_empty_or_missing(tmp_path):
    layouts.yolo(tmp_path)
    (tmp_path / "labels/train/000001.txt").write_text("1.0 0.5 0.5 1.005 0.5\r\n")
    (tmp_path / "labels/train/000002.txt").write_text("")
    (tmp_path / "labels/train/000003.txt").unlink()
    a = read(tmp_path)
    assert a.category_ids.tolist()[0] == 1
    assert a.boxes[0].tolist() == pytest.approx([96 * (0.5 - 1.005 / 2), 18, 96 * 1.005, 36])
    assert len(a.boxes) == 4
    assert a.notes == [f"{tmp_path / 'data.yaml'}: 1 images have no label file: taken as images without objects"]


def test_hidden_files_are_no_images(tmp_path):
    layouts.yolo(tmp_path)
    (tmp_path / "images/train/._000001.jpg").write_bytes(b"\0\5\x16\7")
    assert len(read(tmp_path).image_ids) == len(layouts.TRAIN)


def test_a_bad_image_is_a_fault(tmp_path):
    layouts.yolo(tmp_path)
    file = tmp_path / "images/train/000004.jpg"
    file.write_bytes(b"")
    assert faults(tmp_path) == [f"{file}: is empty; replace the file or remove the image"]


def test_boxes_are_of_the_upright_image(tmp_path):
    """As the programs see it that read such labels."""
    layouts.yolo(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "images/train/000001.jpg"
    Image.open(file).save(file, exif=exif)
    a = read(tmp_path)
    assert a.sizes[0].tolist() == [96, 72]
    assert coco.load_image(a, tmp_path / "images/train", 0).shape == (96, 72, 4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("train: images/train\nval: images/val\n", "has no list of names of the classes"),
        ("train: images/train\nnames: [cat, '']\n", r"names has 1: ''; it must give each class number once a text"),
        ("train: images/train\nnames: {zero: cat}\n", "names has 'zero': 'cat'"),
        ("train: images/train\nnames: [no, yes]\n", "names has 0: False"),
        ("train: images/train\nnames: {0: null}\n", "names has 0: None"),
        ("train: images/train\nnames: [[a], b]\n", r"names has 0: \['a'\]"),
        ('train: images/train\nnames: {0: a, "0": b}\n', "names has '0': 'b'"),
        ("train: nowhere\nnames: [cat, dog]\n", r"'nowhere' is not there, neither from its path nor from"),
        ("train: labels/train\nnames: [cat, dog]\n", "train 'labels/train' holds no images"),
        ("[1, 2]", "is no data.yaml"),
        ("train: [", "cannot be read as YAML"),
        ("train: !!python/object/apply:os.system [true]\n", "cannot be read as YAML"),
    ],
)
def test_a_faulty_data_yaml_is_named(tmp_path, settings, says):
    layouts.yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(settings)
    with pytest.raises(DataError, match=rf"data\.yaml: {says}") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_classes_that_are_named_alike_are_a_fault(tmp_path):
    layouts.yolo(tmp_path)
    settings = (tmp_path / "data.yaml").read_text()
    (tmp_path / "data.yaml").write_text(settings.replace("dog", "cat"))
    with pytest.raises(DataError, match="category 1 has name 'cat'; it must be a text in one line that no earlier"):
        read(tmp_path)


def test_places_of_another_machine_are_found_by_their_ends(tmp_path):
    layouts.yolo(tmp_path)
    expected = read(tmp_path).file_names.tolist()
    for base, place in [
        ("/content/pets", "/content/pets/images/train"),
        ("", "pets/images/train"),
        ("", "C:\\\\pets\\\\images\\\\train"),
        (str(tmp_path), "images/train"),
        ("", f"[{tmp_path / 'images/train'}]"),
    ]:
        place = place if place.startswith("[") else f'"{place}"'
        (tmp_path / "data.yaml").write_text(f"path: {base}\ntrain: {place}\nnames: [cat, dog]\n")
        assert read(tmp_path).file_names.tolist() == expected


def test_a_list_may_be_of_another_machine_or_system(tmp_path):
    layouts.yolo_whole(tmp_path)
    expected = read(tmp_path)
    for prefix in ("photographs/", ".\\photographs\\", "/content/pets/photographs/", "C:\\pets\\photographs\\"):
        names = [f"{prefix}{layouts.image_name(number)}\n" for number in [*layouts.TRAIN, *layouts.VAL]]
        (tmp_path / "train.txt").write_text("".join(names))
        assert read(tmp_path).file_names.tolist() == expected.file_names.tolist()
        assert read(tmp_path).boxes.tolist() == expected.boxes.tolist()
    (tmp_path / "train.txt").write_text("photographs/missing.jpg\n")
    with pytest.raises(DataError, match=r"train\.txt: 'photographs/missing\.jpg' is not there"):
        read(tmp_path)


def test_labels_are_found_however_letters_are_spelled(tmp_path):
    layouts.yolo(tmp_path)
    names = [unicodedata.normalize(form, "\u00e9") for form in ("NFC", "NFD")]
    (tmp_path / "images/train/000001.jpg").rename(tmp_path / f"images/train/{names[0]}.jpg")
    (tmp_path / "labels/train/000001.txt").rename(tmp_path / f"labels/train/{names[1]}.txt")
    assert len(read(tmp_path).boxes) == len(layouts.TRAIN)


def test_keypoints_are_no_polygon(tmp_path):
    layouts.yolo(tmp_path)
    with (tmp_path / "data.yaml").open("a") as file:
        file.write("kpt_shape: [2, 2]\n")
    (tmp_path / "labels/train/000001.txt").write_text("0 0.5 0.5 0.4 0.4 0.45 0.45 0.55 0.55\n")
    assert read(tmp_path).boxes[0].tolist() == pytest.approx([28.8, 21.6, 38.4, 28.8])


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_half_turned_images_are_turned_too(tmp_path, orientation):
    layouts.yolo(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "images/train/000001.jpg"
    Image.open(file).save(file, exif=exif, quality=95)
    np.testing.assert_array_equal(coco.load_image(read(tmp_path), file.parent, 0), coco.load_upright(file))


def test_files_in_other_encodings(tmp_path):
    """A mark of the byte order, as Windows writes it; and what is no text at all."""
    layouts.yolo_whole(tmp_path)
    expected = read(tmp_path)
    for file in (tmp_path / "train.txt", tmp_path / "photographs/000001.txt", tmp_path / "data.yaml"):
        file.write_text("\ufeff" + file.read_text(), encoding="utf-8")
    assert read(tmp_path).boxes.tolist() == expected.boxes.tolist()
    (tmp_path / "train.txt").write_bytes(b"./photographs/\xe9.jpg\n")
    with pytest.raises(DataError, match=r"train\.txt: cannot be read as a list of images"):
        read(tmp_path)


def test_places_may_be_absolute_and_relative(tmp_path, monkeypatch):
    layouts.yolo(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    places = f"[images/train, {tmp_path / 'set/images/val'}]"
    (tmp_path / "set/data.yaml").write_text(f"train: {places}\nnames: [cat, dog]\n")
    assert len(read(Path("set")).image_ids) == len([*layouts.TRAIN, *layouts.VAL])


def test_labels_may_lie_beside_images_in_a_folder_of_that_name(tmp_path):
    layouts.yolo(tmp_path)
    for file in (tmp_path / "labels/train").iterdir():
        file.rename(tmp_path / "images/train" / file.name)
    assert len(read(tmp_path).boxes) == len(layouts.TRAIN)


def test_what_comes_later_is_seen(tmp_path):
    """By an index of before: labels, images of a new folder, and another list."""

    def indexed(root):
        split = yolo.find_splits(root / "data.yaml")["train"]
        return coco.read_annotations(split.source, tmp_path / "index", split.images_dir)

    layouts.yolo(tmp_path / "a")
    (tmp_path / "a/labels").rename(tmp_path / "a/aside")
    assert len(indexed(tmp_path / "a").boxes) == 0
    (tmp_path / "a/aside").rename(tmp_path / "a/labels")
    assert len(indexed(tmp_path / "a").boxes) == len(layouts.TRAIN)
    layouts.save_image(tmp_path / "a/images/train/new", 20)
    assert len(indexed(tmp_path / "a").image_ids) == len(layouts.TRAIN) + 1
    layouts.yolo_whole(tmp_path / "b")
    assert len(indexed(tmp_path / "b").image_ids) == 9
    (tmp_path / "b/train.txt").write_text("photographs/000001.jpg\n")
    assert len(indexed(tmp_path / "b").image_ids) == 1


def test_a_place_in_the_folder_and_outside_is_ambiguous(tmp_path):
    layouts.yolo_roboflow(tmp_path / "set")
    layouts.yolo_roboflow(tmp_path)
    with pytest.raises(DataError, match=r"'\.\./train/images' may be .*set/train/images or .*/train/images; write one"):
        read(tmp_path / "set")
