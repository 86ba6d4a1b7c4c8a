"""Annotation files: what is read, what is refused, and the index that processes share."""

import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pytest

import coco
from coco import CocoAnnotations, DataError, read_annotations
from coco.index import ARRAYS
from tests.conftest import annotation, image


def test_annotations_are_grouped_by_image(write):
    a = read_annotations(write([annotation(5, 3), annotation(6, 1), annotation(7, 3, 7), annotation(8, 1, 7)]))
    assert a.image_ids.tolist() == [1, 2, 3]
    assert a.offsets.tolist() == [0, 2, 2, 4]
    assert a.annotation_ids.tolist() == [6, 8, 5, 7]
    assert a.category_ids.tolist() == [3, 7, 3, 7]
    assert [a.file_name(row) for row in range(3)] == ["1.png", "2.png", "3.png"]


def test_names_need_not_be_ascii(write):
    a = read_annotations(
        write([], images=[image(1) | {"file_name": "Größe 猫.jpg"}], categories=[{"id": 1, "name": "猫"}])
    )
    assert a.file_name(0) == "Größe 猫.jpg"
    assert a.categories == {1: "猫"}


@pytest.mark.parametrize(
    ("ids", "labels", "num_classes"),
    [([1, 90], {1: 1, 90: 90}, 91), ([5], {5: 5}, 6), ([0, 4], {0: 1, 4: 2}, 3), ([200, 91], {91: 1, 200: 2}, 3)],
)
def test_labels_are_the_ids_where_torchvisions_outputs_can_hold_them(write, ids, labels, num_classes):
    a = read_annotations(write([], categories=[{"id": i, "name": str(i)} for i in ids]))
    assert a.label_of == labels
    assert a.num_classes == num_classes


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([annotation(1.5)], r"annotation number 1 of the list has id 1\.5; it must be a positive integer"),
        ([annotation(True)], "annotation number 1 of the list has id True"),
        ([annotation([1])], r"annotation number 1 of the list has id \[1\]"),
        ([annotation(4, image_id=9)], "annotation 4 has image_id 9; it must be the id of an image"),
        ([annotation(4, image_id=1.5)], r"annotation 4 has image_id 1\.5; it must be the id of an image"),
        ([annotation(4, image_id="1.0")], r"annotation 4 has image_id '1\.0'; it must be the id of an image"),
        ([annotation(4, image_id="one")], "annotation 4 has image_id 'one'; it must be the id of an image"),
        ([annotation(4, image_id=True)], "annotation 4 has image_id True; it must be the id of an image"),
        ([annotation(4, iscrowd=0.5)], r"annotation 4 has iscrowd 0\.5; it must be 0 or 1"),
        ([annotation(4, iscrowd="2")], "annotation 4 has iscrowd '2'; it must be 0 or 1"),
        ([annotation(4, category_id=8), annotation(5, category_id=9)], r"annotation 4 has category_id 8.*\(and 1 more"),
        ([annotation(4, bbox=(0, 0, float("nan"), 5))], "annotation 4 has bbox .*nan.*finite"),
        ([annotation(4, bbox=(0, float("-inf"), 5, 5))], "annotation 4 has bbox .*-inf.*finite"),
        ([annotation(4, bbox=(50, 50, -10, 5))], "annotation 4 has bbox .*-10.*no negative size"),
        ([annotation(4, bbox=(10**400, 50, 10, 5))], "annotation 4 has bbox .*finite"),
        ([annotation(4, bbox=(0, 0, 1e200, 1e200))], "annotation 4 has bbox .*finite"),
        ([annotation(4, area=-1)], "annotation 4 has area -1; it must be"),
        ([annotation(4, area=float("inf"))], "annotation 4 has area inf; it must be"),
        ([annotation(4, iscrowd=2)], "annotation 4 has iscrowd 2; it must be 0 or 1"),
        ([{"id": 1, "image_id": 1, "category_id": 3}], "annotation 1 has no bbox; it must be"),
        ([{"image_id": 1, "bbox": [1, 2, 3, 4]}], "annotation number 1 of the list has no category_id"),
        ([annotation(1) | {"bbox": [1, 2, 3]}], r"annotation 1 has bbox \[1, 2, 3\]"),
        ([annotation(1) | {"bbox": "wide"}], "annotation 1 has bbox 'wide'"),
        ([annotation(1) | {"bbox": [1, 2, "3", 4]}], "annotation 1 has bbox"),
        ([annotation(1) | {"image_id": [1]}], r"annotation 1 has image_id \[1\]"),
        ([annotation(1), "annotation"], "annotation number 2 of the list is 'annotation', not an object"),
    ],
)
def test_bad_annotations_are_named(write, annotations, message):
    path = write(annotations)
    with pytest.raises(DataError, match=message) as error:
        read_annotations(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "lists no images or no categories"),
        ([image(1), image(1)], "image 1 has id 1; it must be .* no earlier image has"),
        ([image(1.5)], r"image number 1 of the list has id 1\.5"),
        ([{"id": 1, "width": 3, "height": 3}], "image 1 has no file_name"),
        ([image(1) | {"file_name": "../secret.png"}], "image 1 has file_name .* inside the image folder"),
        ([image(1) | {"file_name": "a/../../secret.png"}], "image 1 has file_name"),
        ([image(1) | {"file_name": "/etc/hostname"}], "image 1 has file_name .* inside the image folder"),
        ([image(1) | {"file_name": "two\nlines.png"}], "image 1 has file_name"),
        ([image(1) | {"file_name": "\ud800.png"}], "image 1 has file_name"),
    ],
)
def test_bad_images_in_the_file_are_named(write, images, message):
    path = write([], images=images)
    with pytest.raises(DataError, match=message) as error:
        read_annotations(path, images_dir=path.parent)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([], "lists no images or no categories"),
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "category 1 has id 1; it must be"),
        ([{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], "category 2 has name 'a'; it must be"),
        ([{"id": 1}], "category 1 has no name"),
    ],
)
def test_bad_categories_are_named(write, categories, message):
    with pytest.raises(DataError, match=message):
        read_annotations(write([], categories=categories))


def test_file_names_may_name_folders_and_have_odd_spaces(write):
    names = ["a/../b/./c.png", "Screenshot 9.41\u202fAM.png", "\u3000.png"]
    a = read_annotations(write([], images=[image(i) | {"file_name": name} for i, name in enumerate(names)]))
    assert [a.file_name(row) for row in range(3)] == names


def test_every_fault_is_found_and_the_rest_is_kept(write):
    path = write(
        [annotation(1), annotation(2, category_id=9), annotation(3, image_id=2), annotation(5, iscrowd=2), {"id": 4}],
        images=[image(1), image(2) | {"file_name": ""}, image(3)],
    )
    a, faults = coco.parse_annotations(path)
    assert [fault.removeprefix(f"{path}: ").split(";")[0] for fault in faults] == [
        "image 2 has file_name ''",
        "annotation 2 has category_id 9",
        "annotation 5 has iscrowd 2",
        "annotation 4 has no image_id",
    ]
    assert a.annotation_ids.tolist() == [1]
    assert a.image_ids.tolist() == [1, 3]


def test_bad_annotation_files(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_annotations(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="No such file"):
        read_annotations(tmp_path / "nowhere.json", tmp_path)
    with pytest.raises(DataError, match="Is a directory"):
        read_annotations(tmp_path)
    no_list = b'{"images": [], "annotations": {}}'
    for content in (b"", b"{", b"[]", b"[" * 10**5, b'{"images": 3}', b"null", b"\xff\xfe", no_list):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.json: not a COCO annotation file") as error:
            read_annotations(tmp_path / "bad.json")
        assert "\n" not in str(error.value)


def test_missing_area_and_iscrowd_are_filled_and_noted(write):
    fields = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 30, 40]}
    path = write([fields, annotation(2), fields | {"id": 3, "area": None, "iscrowd": 1}])
    a = read_annotations(path)
    assert a.areas.tolist() == [1200, 400, 1200]
    assert a.is_crowd.tolist() == [False, False, True]
    assert a.notes == [
        f"{path}: 2 annotations have no area: width x height is used, which may move scores by size",
        f"{path}: 2 annotations have no iscrowd: taken for no crowd",
    ]


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1.5, 2, 3e-2, 4]],
        [],
        [[1, 2], [3, -4]],
        {"counts": [1, 2, 3], "size": [80, 100]},
        {"counts": "a]b", "size": [1, 1]},
    ],
)
def test_masks_are_skipped_in_all_their_forms(write, segmentation):
    masks = [{"segmentation": segmentation} | annotation(1), annotation(2) | {"segmentation": segmentation}]
    a, plain = read_annotations(write(masks)), read_annotations(write([annotation(1), annotation(2)]))
    assert all(np.array_equal(getattr(a, name), getattr(plain, name)) for name in ARRAYS)


def test_texts_that_look_like_masks_are_left_alone(write):
    name = '"segmentation": [[1, 2]].png'
    assert read_annotations(write([], images=[image(1) | {"file_name": name}])).file_name(0) == name


def assert_equal(one: CocoAnnotations, other: CocoAnnotations) -> None:
    for name in ARRAYS:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
        assert getattr(one, name).dtype == getattr(other, name).dtype
    assert (one.categories, one.notes, one.path) == (other.categories, other.notes, other.path)


@pytest.fixture
def reads(monkeypatch) -> list:
    """Paths of the annotation files that were read."""
    paths, parse = [], coco.parse_annotations
    monkeypatch.setattr(
        coco.annotations,
        "parse_annotations",
        lambda source, *others: paths.append(source.path) or parse(source, *others),
    )
    return paths


@pytest.mark.parametrize(
    "annotations", [[annotation(5, 3), annotation(6, 1, iscrowd=1)], [{**annotation(1), "area": None}], []]
)
def test_the_second_start_maps_the_index(write, tmp_path, reads, annotations):
    path = write(annotations)
    first = read_annotations(path, tmp_path / "index")
    second = read_annotations(path, tmp_path / "index")
    assert reads == [path]
    assert_equal(first, second)
    assert_equal(second, read_annotations(path))
    assert isinstance(second.image_ids.base, np.memmap)
    assert len(os.listdir(tmp_path / "index")) == 1  # nothing temporary stays


def test_a_file_that_changed_is_read_again(write, tmp_path, reads):
    path = write([annotation(1, bbox=(1, 2, 3, 4))])
    read_annotations(path, tmp_path / "index")
    path = write([annotation(1, bbox=(1, 2, 3, 5))])  # of the same size
    assert read_annotations(path, tmp_path / "index").boxes.tolist() == [[1, 2, 3, 5]]
    path = write([])
    assert len(read_annotations(path, tmp_path / "index").boxes) == 0
    assert len(reads) == 3
    assert len(os.listdir(tmp_path / "index")) == 1


def test_files_of_one_name_have_an_index_each(write, tmp_path):
    path = write([annotation(1)])
    (tmp_path / "other").mkdir()
    shutil.copy2(path, tmp_path / "other/annotations.json")
    for one in (path, tmp_path / "other/annotations.json"):
        assert read_annotations(one, tmp_path / "index").path == one
    assert len(os.listdir(tmp_path / "index")) == 2


def test_a_damaged_index_is_made_again(write, tmp_path, reads):
    path = write([annotation(1), annotation(2)])
    expected = read_annotations(path)
    index = read_annotations(path, tmp_path / "index").index
    damages = [lambda file: file.write_bytes(b""), lambda file: file.write_bytes(file.read_bytes()[:-3]), os.remove]
    for damage in damages:
        for name in sorted(os.listdir(index)):
            reads.clear()
            damage(index / name)
            assert_equal(read_annotations(path, tmp_path / "index"), expected)
            assert reads == [path], (damage, name)
    assert len(os.listdir(tmp_path / "index")) == 1


def test_no_bit_of_an_index_may_change(write, tmp_path):
    path = write([annotation(1)])
    expected = read_annotations(path)
    index = read_annotations(path, tmp_path / "index").index
    for file in index.iterdir():
        content = file.read_bytes()
        for position in range(len(content)):
            changed = bytearray(content)
            changed[position] ^= 1 << position % 8
            file.write_bytes(changed)
            found = coco.index.open_index(index, path)
            if found is not None:  # json with another kind of white space
                assert_equal(found, expected)
        file.write_bytes(content)
    assert coco.index.open_index(index, path) is not None


def test_an_index_that_appeared_meanwhile_is_taken(write, tmp_path):
    path = write([annotation(1)])
    first = read_annotations(path, tmp_path / "index")
    written = (first.index / "about.json").stat()
    second = coco.index.write_index(read_annotations(path), first.index)
    assert second.index == first.index
    assert (first.index / "about.json").stat() == written
    assert len(os.listdir(tmp_path / "index")) == 1


def test_where_no_index_can_be_written_the_annotations_stay(write, tmp_path):
    path = write([annotation(1)])
    (tmp_path / "file").write_text("not a folder")
    for index_dir in (tmp_path / "file", tmp_path / "file/below"):
        a = read_annotations(path, index_dir)
        assert a.annotation_ids.tolist() == [1]
        assert "cannot be written (" in a.notes[-1]


def test_others_may_read_the_index(write, tmp_path):
    index = read_annotations(write([annotation(1)]), tmp_path / "index").index
    assert index.stat().st_mode == (tmp_path / "index").stat().st_mode


def test_faulty_files_leave_no_index(write, tmp_path):
    path = write([annotation(7, iscrowd=3)])
    for _ in range(2):
        with pytest.raises(DataError, match="annotation 7"):
            read_annotations(path, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_an_index_goes_to_other_processes_by_name(write, tmp_path):
    path = write([annotation(i) for i in range(1, 2000)])
    a = read_annotations(path, tmp_path / "index")
    assert len(pickle.dumps(a)) < 1000
    assert_equal(pickle.loads(pickle.dumps(a)), a)
    assert_equal(pickle.loads(pickle.dumps(read_annotations(path))), a)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(CocoAnnotations.file_name, (a, 2)) == "3.png"
