"""report.html: whole, self-contained, and right about every mistake."""

import base64
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import coco
from coco import scoring, voc_scoring
from tests.conftest import annotation, image
from view import html_report, reports

CAT, DOG = 3, 7
VOID = {"meta", "img"}
HOSTILE = "<script>alert(\"1\")</script> & '$x$' {{ 7 * 7 }} 猫 \u202eabc"
OBJECTS = [
    annotation(11, image_id=1, category_id=CAT, bbox=[0, 0, 20, 20]),
    annotation(12, image_id=1, category_id=DOG, bbox=[40, 40, 20, 20]),
    annotation(13, image_id=1, category_id=DOG, bbox=[70, 40, 20, 20]),
    annotation(14, image_id=2, category_id=DOG, bbox=[0, 0, 60, 60], iscrowd=1),
    annotation(15, image_id=3, category_id=CAT, bbox=[0, 0, 20, 20]),
]
DETECTIONS = np.array(
    [
        [1, 0, 0, 20, 20, 0.9, CAT],  # right
        [1, 40, 40, 20, 20, 0.7, CAT],  # false: it is a dog
        [1, 0, 0, 20, 19, 0.8, CAT],  # false: the cat is taken
        [1, 0, 0, 20, 20, 0.6, DOG],  # false: it is a cat
        [2, 10, 10, 20, 20, 0.9, DOG],  # in the crowd
        [2, 10, 10, 20, 20, 0.6, CAT],  # false
        [3, 0, 0, 20, 20, 0.9, CAT],  # right
        [3, 50, 50, 20, 20, 0.2, CAT],  # false, but of too low a score to be shown
    ]
)


class Page(HTMLParser):
    """A page, of which each element must be closed in its place.

    Attributes:
        elements: name and attributes of each.
        texts: what each element holds, elements within it included, by name.
    """

    def __init__(self, source: str):
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[tuple[str, list[str]]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, []))

    def handle_endtag(self, tag):
        expected, texts = self.open.pop()
        assert tag == expected
        self.texts.setdefault(tag, []).append(" ".join("".join(texts).split()))

    def handle_data(self, data):
        for _, texts in self.open:
            texts.append(data)

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    def class_table(self) -> list[list[str]]:
        table = re.search(r'<table class="sortable">(.*?)</table>', self.source, re.DOTALL)[1]
        return [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)]


def write_page(output_dir: Path, annotations, detections, images_dir: Path | None = None, **changes) -> Page:
    """The report of detections [N, 7], as a script writes it."""
    scores = scoring.score_detections(annotations, detections, "hotcoco")
    if annotations.is_voc:
        scores.metrics["VOC"] = voc_scoring.score_detections(annotations, detections)
    diagnosis = scoring.diagnose(annotations, detections)
    content = {
        "title": "model",
        "facts": ["on data"],
        "warnings": [],
        "metrics": scores.metrics,
        "charts": reports.draw_charts(annotations, scores, diagnosis),
        "worst": reports.draw_worst(annotations, images_dir, diagnosis).values(),
        "data": {"validation": annotations},
        "flags": {"seed": 0, "lr_steps": [80, 110], "amp": None},
    }
    html_report.write(output_dir, **content | changes)
    page = Page((output_dir / "report.html").read_text(encoding="utf-8"))
    check(page)
    return page


def check(page: Page) -> None:
    """Nothing comes from elsewhere, and each picture is what it says."""
    assert page.source.startswith("<!DOCTYPE html>\n<html lang=")
    assert not re.search(r"https?:|url\(|@import|fetch|XMLHttp", re.sub('src="data:.*?"', "", page.source))
    assert {tag for tag, _ in page.elements}.isdisjoint({"link", "iframe", "object", "embed", "base", "form"})
    assert len(page.texts["script"]) == len(page.texts["style"]) == len(page.texts["h1"]) == 1
    for _, attributes in page.elements:
        assert not any(name.startswith("on") or name == "href" for name in attributes)
    for attributes in page.of("img"):
        kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", attributes["src"]).groups()
        picture = Image.open(io.BytesIO(base64.b64decode(content)))
        assert picture.format == kind.upper()
        assert picture.size == (int(attributes["width"]), int(attributes["height"]))
        assert attributes["alt"]


def draw_images_of(folder: Path, *ids: int) -> Path:
    for image_id in ids:
        Image.new("RGB", (100, 80)).save(folder / f"{image_id}.png")
    return folder


def test_what_was_missed_and_what_is_false(write, tmp_path):
    annotations = coco.read_annotations(write(OBJECTS))
    page = write_page(tmp_path, annotations, DETECTIONS, draw_images_of(tmp_path, 1))  # the second cannot be read
    assert page.texts["article"] == [
        "1.png Missed: dog (2). False: cat (2), dog (1).",
        f"2.png Missed: nothing. False: cat (1). {tmp_path}/2.png (image id 2): no such file; check the image folder",
    ]
    alternatives = [attributes["alt"] for attributes in page.of("img")]
    assert alternatives == [
        html_report.CHARTS["precision_recall"],
        html_report.CHARTS["confusion_matrix"],
        "Ground truth of 1.png",
        "Detections on 1.png",
    ]


def test_numbers(write, tmp_path):
    annotations = coco.read_annotations(write(OBJECTS))
    metrics = scoring.score_detections(annotations, DETECTIONS, "hotcoco").metrics
    page = write_page(tmp_path, annotations, DETECTIONS)
    assert page.texts["dd"] == [*(f"{metrics[name]:.3f}" for name in ("AP", "AP50", "AP75")), "3", "4"]  # no crowd
    for name in scoring.METRICS:
        value = "n/a" if metrics[name] is None else f"{metrics[name]:.3f}"
        assert f'<th scope="row">{name}</th><td class="number">{value}</td>' in page.source
    assert [row[:2] for row in page.class_table()] == [["class", "AP"], ["cat", "1.000"], ["dog", "0.000"]]
    for text in ('<tr><th scope="row">of them crowds</th><td>1</td></tr>', f'<td class="path">{annotations.path}</td>'):
        assert text in page.source
    assert "[80, 110]" in page.texts["td"]


def test_numbers_that_the_class_table_sorts_by(write, tmp_path):
    """As they are, not as they are written; a class without objects has none, and is last."""
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 91)]
    objects = [annotation(i, category_id=i, image_id=1) for i in range(1, 90)]
    detections = np.array([[1, 10, 10, 20, 20, 0.9, i] for i in range(30, 50)] * 60)
    annotations = coco.read_annotations(write(objects, categories=categories))
    page = write_page(tmp_path, annotations, detections)
    rows = page.class_table()[1:]
    assert [row[1] for row in rows] == ["1.000"] * 20 + ["0.000"] * 69 + ["n/a"]
    assert (rows[0][4], rows[-1]) == ("60", ["class 90", "n/a", "n/a", "0", "0"])
    values = [attributes.get("data-value") for attributes in page.of("td") if attributes.get("class") == "number"]
    assert values[-4:] == [None, None, "0", "0"]
    sorted_by = [attributes["aria-sort"] for attributes in page.of("th") if "aria-sort" in attributes]
    assert sorted_by == ["descending"]


@pytest.mark.parametrize("detections", [DETECTIONS, np.zeros((0, 7))], ids=["detections", "none"])
@pytest.mark.parametrize("objects", [OBJECTS, []], ids=["objects", "none"])
def test_nothing_to_find_and_nothing_found(write, tmp_path, objects, detections):
    page = write_page(tmp_path, coco.read_annotations(write(objects)), detections)
    assert ("n/a" in page.texts["dd"]) == (not objects)
    assert ("There are no mistakes." in page.texts["p"]) == (not objects and not len(detections))


def test_one_class_and_pascal_voc(write, tmp_path):
    objects = [one for one in OBJECTS if one["category_id"] == CAT]
    annotations = coco.read_annotations(write(objects, categories=[{"id": CAT, "name": "cat"}]))
    detections = DETECTIONS[DETECTIONS[:, 6] == CAT]
    page = write_page(tmp_path, annotations, detections)
    assert "VOC" not in page.source
    page = write_page(tmp_path, coco.CocoAnnotations(**vars(annotations) | {"is_voc": True}), detections)
    assert page.class_table()[0] == ["class", "AP", "AP50", "VOC AP", "boxes", "detections"]
    assert any(re.fullmatch(r"Pascal VOC, AP at IoU 0.50: [\d.]+ over 11 .*", text) for text in page.texts["p"])


def test_hostile_names(write, tmp_path):
    path = write(
        OBJECTS,
        images=[image(1) | {"file_name": f"{HOSTILE.replace('/', '')}.png"}, image(2), image(3)],
        categories=[{"id": CAT, "name": HOSTILE}, {"id": DOG, "name": "x" * 500}],
    )
    page = write_page(
        tmp_path,
        coco.read_annotations(path),
        DETECTIONS,
        title=f"{HOSTILE}\udcff",
        facts=[HOSTILE],
        warnings=[HOSTILE] * 12,
        data={HOSTILE: coco.read_annotations(path)},
        flags={HOSTILE: HOSTILE},
    )
    assert page.texts["h1"] == page.texts["title"] == [f"{HOSTILE}?"]
    assert page.texts["li"] == [HOSTILE] * 12
    assert HOSTILE in page.texts["th"]
    assert page.texts["h3"][0] == f"{HOSTILE.replace('/', '')}.png"
    assert page.texts["article"][1].startswith(f"2.png Missed: nothing. False: {HOSTILE} (1).")


def test_warnings_come_first_and_many_are_folded(write, tmp_path):
    annotations = coco.read_annotations(write(OBJECTS))
    chart = {"learning_curve": torch.zeros(3, 20, 30, dtype=torch.uint8)}
    charts = reports.draw_charts(
        annotations,
        scoring.score_detections(annotations, DETECTIONS, "hotcoco"),
        scoring.diagnose(annotations, DETECTIONS),
    )
    page = write_page(tmp_path, annotations, DETECTIONS, warnings=map(str, range(200)), charts=charts | chart)
    assert page.texts["h2"][:3] == ["Not to be missed", "Learning curve", "Metrics"]
    assert page.texts["summary"][0] == "190 more"
    assert page.texts["li"] == list(map(str, range(200)))


def test_it_stays_small(write, tmp_path):
    """Twelve large photographs of which each has a mistake."""
    rng = np.random.default_rng(0)
    for image_id in range(1, 15):
        pixels = rng.integers(0, 256, (100, 150, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((1500, 1000)).save(tmp_path / f"{image_id}.png", compress_level=1)
    images = [image(i, 1500, 1000) for i in range(1, 15)]
    annotations = coco.read_annotations(write([annotation(i, image_id=i) for i in range(1, 15)], images))
    page = write_page(tmp_path, annotations, np.zeros((0, 7)), tmp_path)
    assert len(page.of("img")) == 2 + 2 * reports.NUM_WORST
    assert all(int(one["width"]) <= html_report.PHOTOGRAPH_SIDE for one in page.of("img")[2:])
    assert len(page.source) < 3_000_000


def test_nobody_meets_half_a_file(write, tmp_path, monkeypatch):
    annotations = coco.read_annotations(write(OBJECTS))
    page = write_page(tmp_path, annotations, DETECTIONS)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_page(tmp_path, annotations, DETECTIONS, title="another")
    assert (tmp_path / "report.html").read_text() == page.source
    assert not list(tmp_path.glob("*.tmp"))
