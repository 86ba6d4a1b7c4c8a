"""What exporters write otherwise than COCO does: taken, with a note, wherever no guess is needed."""

import json
import unicodedata

import numpy as np
import pytest
from PIL import Image

import coco
from coco import DataError, read_annotations, scoring
from coco.index import ARRAYS
from tests.conftest import CATEGORIES, annotation, image, pycocotools_stats

PLAIN = [annotation(1, iscrowd=0), annotation(2, 2, 7, iscrowd=1), annotation(3, 3, iscrowd=0)]


def same(one: coco.CocoAnnotations, other: coco.CocoAnnotations) -> bool:
    return one.categories == other.categories and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS
    )


def note_of(annotations: coco.CocoAnnotations) -> str:
    """The only one."""
    (note,) = annotations.notes
    assert note.startswith(f"{annotations.path}: ")
    assert "\n" not in note
    return note.removeprefix(f"{annotations.path}: ")


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([0, 1, 2], [3, 1, 2]),
        ([5, 5, 5], [5, 6, 7]),
        ([None, 9, None], [10, 9, 11]),
        (["a41-f", 7, "b"], [8, 7, 9]),
        ([-1, 10**15, 10**400], [1, 2, 3]),
        ([0, 0, 0], [1, 2, 3]),
        ([3, "3", 3.0], [3, 4, 5]),
    ],
)
def test_ids_of_annotations_that_no_scorer_takes_are_numbered_anew(write, ids, expected):
    annotations = [one | {"id": new} for one, new in zip(PLAIN, ids, strict=True)]
    a = read_annotations(write(annotations))
    assert a.annotation_ids.tolist() == expected
    number = sum(new != old for new, old in zip(expected, ids, strict=True))
    assert (
        note_of(a) == f"{number} annotations have ids that are missing, doubled or no positive integers: numbered anew"
    )


def test_annotations_without_any_id(write):
    annotations = [{key: value for key, value in one.items() if key != "id"} for one in PLAIN]
    assert read_annotations(write(annotations)).annotation_ids.tolist() == [1, 2, 3]


def test_ids_that_are_numbered_anew_score_as_those_of_a_sound_file(write, tmp_path):
    """COCO's scorers take the id 0 for no match, and would call a right detection false."""
    sound = write(PLAIN)
    results = [{"image_id": one["image_id"], "category_id": 3, "bbox": one["bbox"], "score": 0.9} for one in PLAIN]
    (tmp_path / "results.json").write_text(json.dumps(results))
    expected = pycocotools_stats(sound, tmp_path / "results.json")
    a = read_annotations(write([one | {"id": 0} for one in PLAIN]))
    detections, _ = scoring.read_results(tmp_path / "results.json", a)
    for scorer in ("pycocotools", "hotcoco"):
        metrics = scoring.score_detections(a, detections, scorer).metrics
        assert [-1 if metrics[name] is None else metrics[name] for name in scoring.METRICS] == expected


@pytest.mark.parametrize("form", [float, str, lambda value: f" {value} ", lambda value: f"{value:06d}"])
@pytest.mark.parametrize(
    ("table", "field"),
    [
        ("images", "id"),
        ("images", "width"),
        ("images", "height"),
        ("categories", "id"),
        ("annotations", "id"),
        ("annotations", "image_id"),
        ("annotations", "category_id"),
        ("annotations", "iscrowd"),
    ],
)
def test_integers_of_another_type_are_taken(write, table, field, form):
    tables = {"images": [image(1), image(2), image(3)], "categories": CATEGORIES, "annotations": PLAIN}
    expected = read_annotations(write(PLAIN))
    changed = tables | {table: [one | {field: form(one[field])} for one in tables[table]]}
    a = read_annotations(write(**changed))
    assert same(a, expected)
    number, example = len(changed[table]), changed[table][0][field]
    assert (
        note_of(a)
        == f"the {field} of {number} {table} is a text or a float, such as {example!r}: taken for the integer"
    )


@pytest.mark.parametrize("form", [float, str])
def test_integers_of_another_type_in_results_are_taken(write, tmp_path, form):
    a = read_annotations(write(PLAIN))
    result = {"image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.5}
    path = tmp_path / "results.json"
    path.write_text(json.dumps([result, result]))
    expected, notes = scoring.read_results(path, a)
    assert notes == []
    path.write_text(json.dumps([result | {key: form(result[key]) for key in ("image_id", "category_id")}, result]))
    found, notes = scoring.read_results(path, a)
    np.testing.assert_array_equal(found, expected)
    assert notes == [f"{path}: the ids of 1 detections are texts or floats: taken for integers"]


def test_doubled_ids_of_images_and_categories_stay_faults_in_any_type(write):
    with pytest.raises(DataError, match=r"image '1' has id '1'; it must be .* that no earlier image has"):
        read_annotations(write([], images=[image(1), image("1")]))
    with pytest.raises(DataError, match=r"category number 2 of the list has id 1\.0; it must be"):
        read_annotations(write([], categories=[{"id": 1, "name": "a"}, {"id": 1.0, "name": "b"}]))


GROUP = {"id": 0, "name": "animals", "supercategory": "none"}
MEMBERS = [{"id": 3, "name": "cat", "supercategory": "animals"}, {"id": 7, "name": "dog", "supercategory": "animals"}]


@pytest.mark.parametrize("name", ["animals", "cat"])
def test_a_row_that_only_groups_others_is_left_out(write, name):
    members = [one | {"supercategory": name} for one in MEMBERS]
    a = read_annotations(write(PLAIN, categories=[GROUP | {"name": name}, *members]))
    assert a.categories == {3: "cat", 7: "dog"}
    assert a.label_of == {3: 3, 7: 7}
    assert note_of(a) == (
        f"categories that only group others, without annotations: {name!r}; no classes, unless elsewhere"
    )


@pytest.mark.parametrize(
    "categories",
    [
        [{"id": 3, "name": "cat", "supercategory": "cat"}, {"id": 7, "name": "dog", "supercategory": "dog"}],
        [GROUP, {"id": 3, "name": "cat"}, {"id": 7, "name": "dog", "supercategory": "other"}],
        [{"id": 3, "name": "cat", "supercategory": "dog"}, {"id": 7, "name": "dog", "supercategory": None}],
    ],
)
def test_other_rows_are_classes(write, categories):
    """Which name themselves, which none names, which have annotations."""
    a = read_annotations(write(PLAIN, categories=categories))
    assert len(a.categories) == len(categories)
    assert a.notes == []


def test_a_group_that_has_annotations_in_one_set_is_a_class_in_both(write, tmp_path):
    train = read_annotations(write([*PLAIN, annotation(4, category_id=0, iscrowd=0)], categories=[GROUP, *MEMBERS]))
    (tmp_path / "val").mkdir()
    val = read_annotations(write(PLAIN, categories=[GROUP, *MEMBERS]), tmp_path / "index")
    assert val.categories.keys() == {3, 7}
    for one in coco.agree_on_groups(train, val):
        assert one.categories == {0: "animals", 3: "cat", 7: "dog"}
        assert one.label_of == {0: 1, 3: 2, 7: 3}
    assert all(one.categories.keys() == {3, 7} for one in coco.agree_on_groups(val, val))
    assert val.with_classes(train.classes).categories == train.categories
    twice = read_annotations(
        write(PLAIN, categories=[GROUP | {"name": "cat"}, MEMBERS[0] | {"supercategory": "cat"}, MEMBERS[1]])
    )
    with pytest.raises(DataError, match="category 0 has the name 'cat' of another"):
        twice.with_categories([0])


def test_detections_of_a_group_are_not_scored(write, tmp_path):
    a = read_annotations(write(PLAIN, categories=[GROUP, *MEMBERS]))
    result = {"image_id": 1, "category_id": 0, "bbox": [1, 2, 3, 4], "score": 0.5}
    (tmp_path / "results.json").write_text(json.dumps([result, result | {"category_id": 3}]))
    found, (note,) = scoring.read_results(tmp_path / "results.json", a)
    assert found[:, 6].tolist() == [3]
    assert "1 detections are of categories that only group others: not scored" in note


@pytest.mark.parametrize(
    "sides",
    [
        {},
        {"width": 0, "height": 0},
        {"width": -1, "height": 80},
        {"width": None, "height": "80"},
        {"width": 48.5},
        {"width": 100, "height": True},
        {"width": "wide", "height": [80]},
        {"width": 10**400, "height": 80},
    ],
)
def test_sizes_that_cannot_be_are_read_from_the_images(write, tmp_path, sides):
    Image.new("RGB", (100, 80)).save(tmp_path / "1.png")
    path = write([annotation(1, iscrowd=0)], images=[{"id": 1, "file_name": "1.png"} | sides])
    a = read_annotations(path, images_dir=tmp_path)
    assert a.sizes.tolist() == [[80, 100]]
    assert f"{path}: 1 images have no width and height that can be: read from their files" in a.notes
    assert coco.load_image(a, tmp_path, 0).shape == (80, 100, 4)


def test_sizes_are_read_again_when_an_image_changes(write, tmp_path):
    path = write([annotation(1)], images=[{"id": 1, "file_name": "1.png"}])
    for width in (100, 90):
        Image.new("RGB", (width, 80)).save(tmp_path / "1.png")
        for _ in range(2):
            assert read_annotations(path, tmp_path / "index", tmp_path).sizes.tolist() == [[80, width]]


def test_an_image_that_tells_no_size_either_is_a_fault(write, tmp_path):
    path = write([annotation(1, iscrowd=0), annotation(2, 2, iscrowd=0)], images=[image(1), image(2) | {"width": 0}])
    a, faults = coco.parse_annotations(path, tmp_path)
    assert faults == [
        f"{path}: image 2 tells no size, nor does its file: {tmp_path / '2.png'}: no such file; check the image folder"
    ]
    assert a.image_ids.tolist() == [1]
    assert a.annotation_ids.tolist() == [1]


def test_where_nobody_needs_images_no_size_is_looked_for(write):
    assert read_annotations(write(PLAIN, images=[{"id": i, "file_name": f"/{i}.jpg"} for i in (1, 2, 3)])).file_name(0)


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("sub\\1.png", "sub/1.png"),
        ("sub\\deep\\1.png", "sub/deep/1.png"),
        (".\\sub\\1.png", "sub/1.png"),
        ("images/1.png", "1.png"),
        ("images\\sub\\1.png", "sub/1.png"),
        ("caf\u00e9/\u00e9\u0302.png", None),
        ("Gr\u00f6\u00dfe.png", None),
        ("\u1ebf.png", None),
    ],
)
def test_names_that_are_spelled_otherwise_are_found(write, tmp_path, written, found):
    """None: the file has the decomposed letters (as macOS writes them), and then the composed ones."""
    spellings = [found] if found else [unicodedata.normalize(form, written) for form in ("NFD", "NFC")]
    for number, name in enumerate(spellings):
        folder = tmp_path / str(number) / "images"
        (folder / name).parent.mkdir(parents=True)
        Image.new("RGB", (100, 80)).save(folder / name)
        other = written if found else unicodedata.normalize(("NFC", "NFD")[number], written)
        a = read_annotations(
            write([annotation(1, iscrowd=0)], images=[image(1) | {"file_name": other}]), images_dir=folder
        )
        assert coco.load_image(a, folder, 0).shape == (80, 100, 4)
        assert f"the file_name of 1 images is not as the files are named, such as {other!r}: found" in note_of(a)


def test_a_file_that_comes_later_is_found(write, tmp_path):
    """By an index of before it was there, and after it was renamed in the same process."""
    (tmp_path / "images/sub").mkdir(parents=True)
    for written, names in (("sub\\1.png", ["sub/1.png"]), ("\u00e9.png", ["e\u0301.png", "\u00e9.png"])):
        path = write([annotation(1)], images=[image(1) | {"file_name": written}])
        assert read_annotations(path, tmp_path / "index", tmp_path / "images").file_name(0) == written
        for name in names:
            for old in (tmp_path / "images").glob("*.png"):
                old.unlink()
            Image.new("RGB", (100, 80)).save(tmp_path / "images" / name)
            assert read_annotations(path, tmp_path / "index", tmp_path / "images").file_name(0) == name


@pytest.mark.parametrize("name", ["\u00e9" * 300 + ".png", "sub\\" + "x" * 300 + ".png"])
def test_names_that_are_too_long_for_files(write, tmp_path, name):
    a = read_annotations(write([annotation(1)], images=[image(1) | {"file_name": name}]), images_dir=tmp_path)
    assert "cannot be" in coco.fault_of_image(a, tmp_path, 0) or "no such file" in coco.fault_of_image(a, tmp_path, 0)


def test_groups_alone_are_no_classes(write):
    circle = [{"id": 1, "name": "a", "supercategory": "b"}, {"id": 2, "name": "b", "supercategory": "a"}]
    with pytest.raises(DataError, match="lists no images or no categories"):
        read_annotations(write([], categories=circle))


def test_the_image_folder_may_be_the_current_one(write, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (100, 80)).save(tmp_path / "images/1.png")
    path = write([annotation(1)], images=[image(1) | {"file_name": "images/1.png"}])
    monkeypatch.chdir(tmp_path / "images")
    assert read_annotations(path, images_dir=".").file_name(0) == "1.png"


@pytest.mark.parametrize("name", ["a\\1.png", "images\\1.png", "\u00e9.png", "images/1.png"])
def test_a_file_that_has_the_very_name_is_taken(write, tmp_path, name):
    folder = tmp_path / "images"
    for one, shade in ((name, 9), (name.replace("\\", "/").removeprefix("images/"), 1)):
        (folder / one).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / one).exists():
            Image.new("RGB", (100, 80), (shade,) * 3).save(folder / one)
    a = read_annotations(write([annotation(1, iscrowd=0)], images=[image(1) | {"file_name": name}]), images_dir=folder)
    assert (coco.load_image(a, folder, 0)[..., :3] == 9).all()
    assert a.notes == []


@pytest.mark.parametrize("name", ["sub\\1.png", "..\\secret.png", "images\\..\\..\\secret.png", "\u00e9.png", "1.png"])
def test_a_missing_file_is_named_as_it_is_written(write, tmp_path, name):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (100, 80)).save(tmp_path / "secret.png")
    a = read_annotations(
        write([annotation(1)], images=[image(1) | {"file_name": name}]), images_dir=tmp_path / "images"
    )
    assert coco.fault_of_image(a, tmp_path / "images", 0) == (
        f"{tmp_path / 'images' / name} (image id 1): no such file; check the image folder"
    )


def test_absolute_names_inside_the_image_folder_are_taken(write, tmp_path, monkeypatch):
    (tmp_path / "store/sub").mkdir(parents=True)
    Image.new("RGB", (100, 80)).save(tmp_path / "store/sub/1.png")
    (tmp_path / "link").symlink_to(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    for folder, name in [("store", "store/sub/1.png"), ("link", "link/sub/1.png"), ("link", "store/sub/1.png")]:
        path = write([annotation(1, iscrowd=0)], images=[image(1) | {"file_name": str(tmp_path / name)}])
        a = read_annotations(path, images_dir=folder)
        assert a.file_name(0) == "sub/1.png"
        assert "is absolute" in note_of(a)
        assert coco.load_image(a, tmp_path / folder, 0).shape == (80, 100, 4)
    for name in ("store2/1.png", "store/../secret.png", "1.png"):
        path = write([annotation(1)], images=[image(1) | {"file_name": str(tmp_path / name)}])
        with pytest.raises(DataError, match=r"image 1 has file_name .* inside the image folder"):
            read_annotations(path, images_dir="store")


def test_a_list_of_images_has_no_annotations(tmp_path):
    path = tmp_path / "image_info.json"
    for content in ({"images": [image(1)], "categories": CATEGORIES}, {"images": [image(1)]}):
        path.write_text(json.dumps(content))
        a = read_annotations(path, tmp_path / "index")
        assert not a.has_annotations
        assert a.classes == ([] if "categories" not in content else read_annotations(path).classes)
        assert a.with_classes([{"label": 1, "id": 4, "name": "cow"}]).categories == (
            {4: "cow"} if "categories" not in content else {3: "cat", 7: "dog"}
        )
    for content in ({"images": []}, {"images": [image(1)], "annotations": []}, {"images": [image(1)], "categories": 3}):
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"image_info\.json: not a COCO annotation file"):
            read_annotations(path)
