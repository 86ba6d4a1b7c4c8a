"""report.html: an evaluation in one file, which needs neither a server nor other files."""

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jinja2
from PIL import Image
from torch import Tensor

import ssd
from coco import CocoAnnotations, scoring

from . import pictures, reports

FILE_NAME = "report.html"
# read once: a long run must not meet another version of them
TEMPLATES = {path.name: path.read_text() for path in (Path(__file__).parent / "templates").iterdir()}
CHART_COLORS = 128
PHOTOGRAPH_SIDE = 658  # pixels: an image of 640 with its caption
PHOTOGRAPH_QUALITY = 75
HEADLINE = ("AP", "AP50", "AP75")
CHARTS = {
    "learning_curve": "The losses and the average precision over the epochs.",
    "precision_recall": "Precision over recall at several IoU thresholds, averaged over the classes.",
    "confusion_matrix": "How many objects of each class were detected as which class.",
}


class Embedded(NamedTuple):
    """A picture within a page."""

    src: str  # a data URI
    width: int
    height: int


def write(
    output_dir: Path,
    *,
    title: str,
    facts: Iterable[str],
    warnings: Iterable[str],
    metrics: dict,
    charts: Mapping[str, Tensor],
    worst: Iterable[reports.Example],
    data: Mapping[str, CocoAnnotations],
    flags: dict,
) -> None:
    """Writes report.html, of which nobody ever meets a part.

    Args:
        output_dir: where to.
        title: what was evaluated.
        facts: lines that say more of it.
        warnings: what a reader must not miss.
        metrics: as ``engine.inference.score`` makes them.
        charts: those of ``CHARTS`` that there are, uint8 [3, H, W].
        worst: the images with most mistakes.
        data: what was used, by what it is for.
        flags: by their names in Python.

    Raises:
        OSError: it cannot be written; an earlier one is as it was.
    """
    page = (
        environment()
        .get_template("report.html")
        .render(
            title=title,
            facts=facts,
            warnings=list(warnings),
            metrics=metrics,
            headline={name: metrics[name] for name in HEADLINE} | count_objects(metrics),
            meanings={name: scoring.meaning(name) for name in scoring.METRICS},
            classes=class_rows(metrics),
            charts=charts,
            alternatives=CHARTS,
            worst=list(worst),
            min_score=reports.MIN_SHOWN_SCORE,
            data=data,
            flags=flags,
        )
    )
    ssd.write_file([page.encode(errors="replace")], output_dir / FILE_NAME)  # names of files may be in any encoding


def count_objects(metrics: dict) -> dict[str, int]:
    """Images and boxes, these without crowds, as in the table of classes."""
    boxes = sum(one["boxes"] for one in metrics["per_class"].values())
    return {"images": metrics["counts"]["images"], "boxes": boxes}


def environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.DictLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"figure": as_figure, "png": as_png, "jpeg": as_jpeg}
    return made


def class_rows(metrics: dict) -> list[dict]:
    """A row of the table for each class, the best first: by heading its name and numbers, None where unknown."""
    voc = metrics.get("VOC", {}).get("per_class")
    rows = []
    for name, one in scoring.best_first(metrics):
        voc_ap = {"VOC AP": voc[name]["AP"]} if voc else {}
        rows.append({"class": name, "AP": one["AP"], "AP50": one["AP50"], **voc_ap, **one})
    return rows


def as_figure(value: float | None) -> str:
    if value is None:
        return "n/a"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def as_png(chart: Tensor) -> Embedded:
    return embed(pictures.to_image(chart).quantize(CHART_COLORS), format="PNG", optimize=True)


def as_jpeg(picture: Tensor) -> Embedded:
    image = pictures.to_image(picture)
    image.thumbnail((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE))
    return embed(image, format="JPEG", quality=PHOTOGRAPH_QUALITY, optimize=True)


def embed(image: Image.Image, **settings) -> Embedded:
    content = base64.b64encode(pictures.encode(image, **settings)).decode()
    return Embedded(f"data:image/{settings['format'].lower()};base64,{content}", *image.size)
