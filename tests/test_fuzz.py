"""Thousands of damaged files: each is refused with one line that names it, or read as what it says."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import coco
from coco import DataError, scoring
from coco.rules import as_integer
from engine import loading
from tests.conftest import CATEGORIES, annotation, image, pycocotools_stats

CASES = settings(
    max_examples=1500, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
SECONDS_PER_CASE = 20

IMAGES = [image(1), image(2), image(3)]
ANNOTATIONS = [
    annotation(11, bbox=(10, 10, 20, 20), iscrowd=0),
    annotation(12, bbox=(40.5, 10, 9, 60), iscrowd=0),
    annotation(13, image_id=2, category_id=7, bbox=(0, 0, 100, 80), iscrowd=1),
    annotation(14, image_id=2, bbox=(3, 5, 50, 4), iscrowd=0),
]
RESULTS = [
    {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"], "score": 0.1 * i}
    for i, one in enumerate(ANNOTATIONS, start=1)
]
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 20)
    | st.sampled_from([10**15, 2**63, -(2**63), 2**64, 10**400, 1e308, 5e-324, -0.0, 0.5])
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=6)
    | st.sampled_from(["../1.png", "/etc/passwd", "a/../../1.png", "1.png\0", "1.png\n", "..", ".", "", "~", "cat"])
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4), inner))


@st.composite
def spoiled(draw, content):
    """``content`` with some of its values replaced, doubled or removed, wherever they are."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        parent, key = None, None
        where = content
        while isinstance(where, (dict, list)) and len(where) and (parent is None or draw(st.integers(0, 3))):
            parent = where
            key = draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
            where = parent[key]
        if parent is None:
            return draw(values)
        what = draw(st.sampled_from(["replace", "remove", "double"]))
        if what == "remove":
            del parent[key]
        elif what == "double" and isinstance(parent, list):
            parent.append(json.loads(json.dumps(parent[key])))
        else:
            parent[key] = draw(values)
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def read_or_refuse(read, path: Path):
    """What ``read`` makes of a file, or None if it refuses it, as it should: in one line that names it, and soon."""
    try:
        with loading.at_most(SECONDS_PER_CASE):
            return read()
    except DataError as error:
        fault = str(error)
    assert str(path) in fault
    assert "\n" not in fault
    return None


def assert_sound(annotations: coco.CocoAnnotations, content: dict) -> None:
    """Everything that the file says is there, nothing contradicts itself, and a perfect detector is found to be one."""
    assert annotations.image_ids.tolist() == [as_integer(one["id"]) for one in content["images"]]
    listed = content.get("annotations", [])
    assert annotations.has_annotations == ("annotations" in content)
    assert (annotations.annotation_ids > 0).all()
    assert len(set(annotations.annotation_ids.tolist())) == len(listed)
    assert sorted(annotations.category_ids.tolist()) == sorted(as_integer(one["category_id"]) for one in listed)
    assert sorted(annotations.boxes.tolist()) == sorted(one["bbox"] for one in listed)
    for name in annotations.file_names:
        inside = os.path.normpath(os.path.join("/images", name.decode()))
        assert inside.startswith("/images")
    boxes = annotations.boxes
    assert np.isfinite(boxes).all()
    assert np.isfinite(annotations.areas).all()
    is_object = ~annotations.is_crowd
    sides = boxes[is_object, 2:]
    if is_object.any() and (sides > 0.01).all() and (np.abs(boxes) < 1e6).all():
        image_ids = np.repeat(annotations.image_ids, np.diff(annotations.offsets))
        columns = image_ids, boxes, np.ones(len(boxes)), annotations.category_ids
        perfect = np.column_stack(columns)[is_object]
        scores = scoring.score_detections(annotations, perfect.astype(np.float64), "hotcoco")
        assert scores.metrics["AP50"] == pytest.approx(1)


IDS = ("image_id", "category_id")
MANY = 20  # accepted files; were there none, the cases would only show that everything is refused


def test_annotation_files(folder):
    path = folder / "annotations.json"
    accepted = []

    @CASES
    @given(spoiled({"images": IMAGES, "annotations": ANNOTATIONS, "categories": CATEGORIES}))
    @example({"images": IMAGES, "annotations": ANNOTATIONS, "categories": CATEGORIES})
    def check(content):
        path.write_text(json.dumps(content))
        annotations = read_or_refuse(lambda: coco.read_annotations(path), path)
        if annotations is not None:
            accepted.append(content)
            assert_sound(annotations, content)

    check()
    assert len(accepted) > MANY


def test_results_files(folder):
    truth, path = folder / "truth.json", folder / "results.json"
    truth.write_text(json.dumps({"images": IMAGES, "annotations": ANNOTATIONS, "categories": CATEGORIES}))
    annotations = coco.read_annotations(truth)
    accepted = []

    @CASES
    @given(spoiled(RESULTS))
    @example(RESULTS)
    def check(content):
        path.write_text(json.dumps(content))
        found = read_or_refuse(lambda: scoring.read_results(path, annotations), path)
        if found is not None and len(found[0]):
            detections, notes = found
            accepted.append(content)
            path.write_text(json.dumps([one | {key: as_integer(one[key]) for key in IDS} for one in content]))
            assert bool(notes) == any(type(one[key]) is not int for one in content for key in IDS)
            metrics = scoring.score_detections(annotations, detections, "hotcoco").metrics
            expected = pycocotools_stats(truth, path)
            assert [-1 if metrics[name] is None else metrics[name] for name in scoring.METRICS] == expected

    check()
    assert len(accepted) > MANY


@settings(CASES, max_examples=500)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | values.map(json.dumps).map(str.encode))
@example(b"[" * 100_000)
@example(b'{"images": [1, 2')
@example(b"\xff\xfe{\0}\0")
def test_files_that_are_something_else(folder, content):
    path, truth = folder / "other.json", folder / "truth.json"
    path.write_bytes(content)
    truth.write_text(json.dumps({"images": IMAGES, "annotations": ANNOTATIONS, "categories": CATEGORIES}))
    assert read_or_refuse(lambda: coco.read_annotations(path), path) is None
    annotations = coco.read_annotations(truth)
    found = read_or_refuse(lambda: scoring.read_results(path, annotations), path)
    assert found is None or len(found[0]) == 0  # an empty list is one of no detections


def pixels(format: str) -> tuple[bytes, np.ndarray]:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8).repeat(2, 0).repeat(2, 1))
    file = io.BytesIO()
    picture.save(file, format)
    return file.getvalue(), np.array(Image.open(file).convert("RGB"))


WHOLE = {format: pixels(format) for format in coco.images.FORMATS}


def load(folder: Path, content: bytes) -> np.ndarray | None:
    path = folder / "1.png"
    path.write_bytes(content)
    truth = folder / "one.json"
    if not truth.exists():
        one = {"images": [image(1, 96, 80)], "annotations": [annotation(1)], "categories": CATEGORIES}
        truth.write_text(json.dumps(one))
    annotations = coco.read_annotations(truth)
    found = read_or_refuse(lambda: coco.load_image(annotations, folder, 0), path)
    return None if found is None else found[..., :3]


@settings(CASES, max_examples=1000)
@given(
    st.sampled_from(sorted(WHOLE)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1),
)
def test_images_with_changed_bytes(folder, format, changes):
    """PNG has checksums. Elsewhere changed bytes may pass as other pixels."""
    whole, expected = WHOLE[format]
    content = bytearray(whole)
    for where, change in changes:
        content[int(where * len(whole))] ^= change
    found = load(folder, bytes(content))
    if found is not None:
        assert found.shape == expected.shape
        assert format != "PNG" or np.array_equal(found, expected)


@settings(CASES, max_examples=500)
@given(st.sampled_from(sorted(WHOLE)), st.floats(0, 1, exclude_max=True))
def test_images_that_are_cut(folder, format, where):
    """Only the mark of the end may be missing."""
    whole, expected = WHOLE[format]
    found = load(folder, whole[: int(where * len(whole))])
    assert found is None or np.array_equal(found, expected)
