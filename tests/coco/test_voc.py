import unicodedata
from pathlib import Path

import pytest

import coco
from coco import DataError, voc
from tests import layouts


def sources(root):
    return {name: split.source for name, split in voc.find_splits(root).items()}


def test_the_paper_s_sets(tmp_path):
    """07+12: trainval of both to train on, the test of 2007 to validate on."""
    layouts.voc(tmp_path / "VOCdevkit")
    for root in (tmp_path, tmp_path / "VOCdevkit"):
        train, val = (coco.read_annotations(source) for source in sources(root).values())
        assert [train.file_name(row) for row in range(6)] == [
            *(f"VOC2007/JPEGImages/{number:06d}.jpg" for number in (1, 2, 3, 4)),
            *(f"VOC2012/JPEGImages/{number:06d}.jpg" for number in (5, 6)),
        ]
        assert [val.file_name(row)[-10:] for row in range(3)] == ["000007.jpg", "000008.jpg", "000009.jpg"]
        assert train.is_crowd.tolist() == [False, False, False, True, False, False]
        assert val.is_crowd.tolist() == [False, True, False]
        assert list(train.categories.values()) == list(val.categories.values()) == list(voc.CLASSES)
        assert train.num_classes == 21
        assert train.is_voc
        assert coco.is_object(train).tolist() == (~train.is_crowd).tolist()


def test_there_are_twenty_classes_in_alphabetical_order():
    assert len(voc.CLASSES) == 20
    assert list(voc.CLASSES) == sorted(voc.CLASSES)


def test_without_a_test_the_set_val_is_validated_on(tmp_path):
    layouts.write_voc(tmp_path / "VOC2012", {"train": [1, 2], "val": [3], "trainval": [1, 2, 3]})
    train, val = (coco.read_annotations(source) for source in sources(tmp_path).values())
    assert (len(train.image_ids), len(val.image_ids)) == (2, 1)


def test_the_test_of_2012_has_no_annotations(tmp_path):
    layouts.voc(tmp_path)
    (tmp_path / "VOC2012/ImageSets/Main/test.txt").write_text("2012_000001\n")
    assert sources(tmp_path)["val"].sets == (("VOC2007", "test"),)


def test_a_folder_has_the_same_classes_from_wherever_it_is_named(tmp_path, monkeypatch):
    layouts.write_voc(tmp_path / "VOC2012", {"train": [1, 2], "val": [3]})
    monkeypatch.chdir(tmp_path / "VOC2012")
    assert len(coco.read_annotations(sources(Path("."))["train"]).categories) == 20


def test_a_list_may_name_an_image_twice_and_begin_with_a_mark(tmp_path):
    layouts.voc_folder(tmp_path)
    file = tmp_path / "ImageSets/Main/train.txt"
    file.write_text("\ufeff000001\n000002\n000001\n", encoding="utf-8")
    assert len(coco.read_annotations(sources(tmp_path)["train"]).image_ids) == 2


def test_an_image_that_comes_later_is_seen(tmp_path):
    layouts.voc_folder(tmp_path)
    file = tmp_path / "JPEGImages/000001.jpg"
    file.rename(tmp_path / "aside.jpg")
    source = sources(tmp_path)["train"]
    assert coco.read_annotations(source, tmp_path / "index", tmp_path).file_name(0) == "JPEGImages/000001.jpg"
    (tmp_path / "aside.jpg").rename(file.with_suffix(".JPG"))
    assert coco.read_annotations(source, tmp_path / "index", tmp_path).file_name(0) == "JPEGImages/000001.JPG"


def test_no_objects_at_all(tmp_path):
    layouts.voc_folder(tmp_path)
    for file in (tmp_path / "Annotations").iterdir():
        file.write_text("<annotation></annotation>")
    with pytest.raises(DataError, match="lists no images or no categories"):
        coco.read_annotations(sources(tmp_path)["train"])


def test_trainval_alone_comes_in_one(tmp_path):
    layouts.write_voc(tmp_path / "VOC2007", {"trainval": [1, 2, 3]})
    assert sources(tmp_path).keys() == {"train"}


def test_other_classes_are_those_of_all_records(tmp_path):
    layouts.write_voc(tmp_path / "VOC2007", {"trainval": [1, 3], "test": [2]}, names=("snail", "car"))
    for source in sources(tmp_path).values():
        assert coco.read_annotations(source).categories == {1: "car", 2: "snail"}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("<xmin>13</xmin>", "", "object 1 has the xmin ''; it must be a number"),
        ("<xmin>13</xmin>", "<xmin>left</xmin>", "object 1 has the xmin 'left'"),
        (
            "<xmin>13</xmin>",
            "<xmin>nan</xmin>",
            "object 1 has the corners [nan, 10.0, 60.0, 45.0]; they must be finite",
        ),
        ("<xmax>60</xmax>", "<xmax>3</xmax>", "object 1 has the corners [13.0, 10.0, 3.0, 45.0]; they must be finite"),
        ("<name>dog</name>", "<name> </name>", "object 1 has the name ''; it must be a text in one line"),
        ("<difficult>0</difficult>", "<difficult>2</difficult>", "object 1 has difficult 2; it must be 0 or 1"),
        ("<annotation>", "<annotation", "cannot be read as XML"),
        ("<annotation>", '<?xml version="1.0" encoding="foo"?><annotation>', "cannot be read as XML"),
        ("<annotation>", '<annotation xmlns="http://x">', "is no record of Pascal VOC: it begins with {http://x}annot"),
    ],
)
def test_faulty_records_are_named(tmp_path, old, new, says):
    layouts.voc(tmp_path)
    file = tmp_path / "VOC2007/Annotations/000001.xml"
    file.write_text(file.read_text().replace(old, new, 1))
    (fault,) = coco.parse_annotations(sources(tmp_path)["train"])[1]
    assert fault.startswith(f"{file}: {says}")
    assert "\n" not in fault


def test_a_missing_record_is_named(tmp_path):
    layouts.voc(tmp_path)
    file = tmp_path / "VOC2007/Annotations/000001.xml"
    file.unlink()
    with pytest.raises(DataError, match=r"000001\.xml: no such file, though .* lists it"):
        coco.read_annotations(sources(tmp_path)["train"])


def test_fields_that_may_be_missing_or_written_otherwise(tmp_path):
    layouts.voc(tmp_path)
    file = tmp_path / "VOC2007/Annotations/000001.xml"
    text = file.read_text()
    changes = [
        ("<difficult>0</difficult>", ""),
        ("<difficult>0</difficult>", "<difficult></difficult>"),
        ("<xmin>13</xmin>", "<xmin>13.0</xmin>"),
        ("<size><width>96</width><height>72</height><depth>3</depth></size>", ""),
        ("<width>96</width>", "<width>0</width>"),
        ("<width>96</width>", "<width>96.0</width>"),
        ("<name>dog</name>", "<name> dog\n</name>"),
        ("000001.jpg", "C:\\photographs\\other.jpg"),
    ]
    for old, new in changes:
        assert old in text
        file.write_text(text.replace(old, new, 1))
        a = coco.read_annotations(sources(tmp_path)["train"], images_dir=tmp_path)
        assert a.boxes[0].tolist() == list(layouts.BOX)
        assert a.sizes[0].tolist() == [72, 96]
        assert not a.is_crowd[0]


def test_an_image_may_be_of_another_kind(tmp_path):
    layouts.voc_folder(tmp_path)
    (tmp_path / "JPEGImages/000001.jpg").rename(tmp_path / "JPEGImages/000001.png")
    a = coco.read_annotations(sources(tmp_path)["train"], images_dir=tmp_path)
    assert a.file_name(0) == "JPEGImages/000001.png"
    assert coco.load_image(a, tmp_path, 0).shape == (72, 96, 4)


def test_names_of_a_list_may_be_spelled_otherwise(tmp_path):
    layouts.voc_folder(tmp_path)
    composed, decomposed = (unicodedata.normalize(form, "\u00e9") for form in ("NFC", "NFD"))
    for folder, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (tmp_path / folder / "sub").mkdir()
        (tmp_path / folder / f"000001.{suffix}").rename(tmp_path / folder / f"sub/{decomposed}.{suffix}")
        (tmp_path / folder / f"._000002.{suffix}").write_bytes(b"\0\5\x16\7")
    file = tmp_path / "ImageSets/Main/train.txt"
    for name in (f"sub/{composed}", f"sub\\{composed}", f"sub/{decomposed}"):
        file.write_text(f"{name}\n000002\n000003\n000004\n")
        a = coco.read_annotations(sources(tmp_path)["train"], images_dir=tmp_path)
        assert coco.load_image(a, tmp_path, 0).shape == (72, 96, 4)
        assert len(a.boxes) == 4


def test_a_missing_image_is_named(tmp_path):
    layouts.voc_folder(tmp_path)
    (tmp_path / "JPEGImages/000001.jpg").unlink()
    a = coco.read_annotations(sources(tmp_path)["train"], images_dir=tmp_path)
    assert "JPEGImages/000001.jpg (image id 1): no such file" in coco.fault_of_image(a, tmp_path, 0)
