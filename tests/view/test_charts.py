import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from view import charts

# Of files that other tests left open this one would learn by chance.
pytestmark = pytest.mark.filterwarnings("error", "default::ResourceWarning")

RECALLS = np.linspace(0, 1, 101)
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
LONG_NAME = "a class with a name of more letters than a chart has room for: {}"


def falling_precision(best: float = 1.0) -> np.ndarray:
    return best * (1 - RECALLS[None] ** (2 - IOU_THRESHOLDS[:, None]))


def random_matrix(num_classes: int, most: int = 50) -> np.ndarray:
    return np.random.default_rng(num_classes).integers(0, most, (num_classes + 1, num_classes + 1))


def names(num_classes: int) -> list[str]:
    return [f"class {k}" for k in range(num_classes)]


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that were made pictures."""
    drawn, to_picture = [], charts.to_picture
    monkeypatch.setattr(charts, "to_picture", lambda figure: drawn.append(figure) or to_picture(figure))
    return drawn


def check_picture(picture: torch.Tensor) -> None:
    assert picture.dtype == torch.uint8
    assert picture.shape[0] == 3
    assert 200 < min(picture.shape[1:]) <= max(picture.shape[1:]) < 2000
    for edge in (picture[:, :8], picture[:, -8:], picture[:, :, :8], picture[:, :, -8:]):
        assert (edge == 255).all()  # else something is clipped
    assert (picture < 100).any()


CURVE = [0.5, 1.0, 1.5], [0.1, 0.6, 0.4]


@pytest.mark.parametrize(
    ("losses", "metrics"),
    [
        ({"loss": CURVE, "validation loss": CURVE}, {"AP": CURVE, "AP50": CURVE}),
        ({"loss": ([1.0], [58.0])}, {}),
        ({}, {"AP": ([1.0], [0.0])}),
        ({"loss": ([1.0, 2.0], [0.0, 1e4])}, {"AP": ([1.0, 2.0], [0.0, 1.0])}),
        ({}, {}),
    ],
    ids=["all", "first", "no loss", "extremes", "nothing"],
)
def test_learning_curves_are_whole_pictures(losses, metrics, figures):
    check_picture(charts.learning_curve(losses, metrics))
    drawn = [{line.get_label(): line.get_xydata().T.tolist() for line in axes.lines} for axes in figures[0].axes]
    as_lists = [{name: [*map(list, curve)] for name, curve in curves.items()} for curves in (losses, metrics)]
    assert drawn == as_lists


@pytest.mark.parametrize(
    ("num_classes", "name"),
    [(1, "cat"), (3, LONG_NAME), (10, ""), (10, "$\\frac_$"), (20, LONG_NAME), (21, "cat"), (80, "W" * 200)],
)
def test_confusion_matrices_are_whole_pictures(num_classes, name):
    matrix = random_matrix(num_classes, most=3_000_000)
    check_picture(charts.confusion_matrix(matrix, [name.format(k) for k in range(num_classes)], 0.5))


@pytest.mark.parametrize("num_classes", [0, 1, 3, 80])
def test_confusion_matrix_without_objects_and_detections(num_classes, figures):
    empty = np.zeros((num_classes + 1, num_classes + 1), int)
    check_picture(charts.confusion_matrix(empty, names(num_classes), 0.5))
    assert not figures[0].axes[0].texts


def test_confusion_matrix_says_what_it_shows(figures):
    matrix = np.array([[3, 1, 8, 0], [0, 0, 0, 0], [0, 0, 5, 40000], [2, 0, 0, 77]])
    charts.confusion_matrix(matrix, ["cat", "dog", "cow"], 0.25)
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "cat (12)",
        "dog (0)",
        "cow (40005)",
        "no object or a double (2)",
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "dog", "cow", "missed"]
    counts = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert counts == {(0, 0): "3", (0, 1): "1", (0, 2): "8", (2, 2): "5", (2, 3): "40k", (3, 0): "2"}
    assert axes.get_title(loc="left") == "Confusion matrix at IoU 0.5, scores from 0.25"


def test_confusion_matrix_of_many_classes_names_those_shown(figures):
    matrix = np.eye(81, dtype=int)
    matrix[30, 50] = 4
    charts.confusion_matrix(matrix, names(80), 0.5)
    axes = figures[0].axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == charts.SHOWN_CLASSES + 2
    assert {"class 30 (5)", "class 50 (1)"} < set(labels)
    assert labels[-2:] == ["the rest (60)", "no object or a double (0)"]
    assert "20 of 80 classes" in axes.get_title(loc="left")


def test_the_last_cell_has_no_meaning():
    matrix = random_matrix(3)
    other = matrix.copy()
    other[-1, -1] += 1000
    pictures = [charts.confusion_matrix(m, names(3), 0.5) for m in (matrix, other)]
    assert torch.equal(*pictures)
    other[0, 0] += 1
    assert not torch.equal(pictures[0], charts.confusion_matrix(other, names(3), 0.5))


def test_classes_most_confused_with_others_are_shown():
    matrix = np.diag([0, 0, 900, 0, 0, 100, 0])
    matrix[5, 1] = 3
    matrix[4, 5] = 2
    matrix[0, -1] = matrix[-1, 0] = 10_000  # missed and false, confused with no class
    matrix[3, -1], matrix[-1, 2] = 7, 6
    matrix[-1, -1] = 10**6
    for at_most, shown in ((1, [5]), (2, [1, 5]), (3, [1, 4, 5]), (4, [0, 1, 4, 5]), (5, [0, 1, 3, 4, 5])):
        assert charts.most_confused(matrix, at_most).tolist() == shown
    assert charts.most_confused(matrix, 20).tolist() == [0, 1, 2, 3, 4, 5]


def test_gathering_keeps_every_object_and_detection():
    matrix = np.arange(25).reshape(5, 5)
    cells = charts.gather(matrix, np.array([1, 3]))
    # columns and rows: class 1, class 3, the others (0 and 2), none
    assert cells.tolist() == [[6, 8, 5 + 7, 9], [16, 18, 15 + 17, 19], [12, 16, 24, 4 + 14], [21, 23, 20 + 22, 0]]
    unchanged = charts.gather(matrix, np.arange(4))
    assert unchanged.tolist() == [*matrix[:-1].tolist(), [20, 21, 22, 23, 0]]


def test_colours_are_shares_of_the_row():
    cells = np.array([[9, 0, 0], [1, 0, 1], [0, 0, 0]])
    colors = charts.cell_colors(cells, has_rest=False)
    assert np.allclose(colors[0, 0], charts.rgb(charts.BLUE))
    assert np.allclose(colors[1, 0], colors[1, 2])
    assert (charts.rgb(charts.ORANGE) <= colors[1, 0]).all()
    assert colors[1, 0, 0] > colors[1, 0, 2] + 0.2  # orange
    assert (colors[cells == 0][:-1] == 1).all()
    grey = charts.cell_colors(np.array([[1, 0, 0], [0, 7, 0], [0, 0, 0]]), has_rest=True)[1, 1]
    assert np.ptp(grey) == 0


def test_shortened_names_differ_in_what_they_differed_in():
    short = [charts.shorten(LONG_NAME.format(k)) for k in range(3)]
    assert len(set(short)) == 3
    assert {len(name) for name in short} == {charts.LONGEST_NAME}
    assert charts.shorten("x" * charts.LONGEST_NAME) == "x" * charts.LONGEST_NAME
    assert charts.shorten("two\nlines\0\ud800") == "two lines??"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (9999, "9999"), (10_000, "10k"), (999_499, "999k"), (999_500, "1.0M"), (2_345_678, "2.3M")],
)
def test_counts_fit_a_cell(count, text):
    assert charts.short_count(count) == text


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_precision_recall_names_the_curves_with_their_ap(figures):
    precision = np.repeat(np.linspace(0.9, 0, 10)[:, None], 101, axis=1)
    check_picture(charts.precision_recall(precision, RECALLS, IOU_THRESHOLDS))
    assert legend(figures[0]) == [
        "AP 0.450\nmean of IoU 0.50 to 0.95",
        "AP50 0.900\nIoU 0.50",
        "AP75 0.400\nIoU 0.75",
        "other IoU thresholds",
    ]
    curves = [line.get_ydata()[0] for line in figures[0].axes[0].lines]
    assert np.allclose(curves[:3], [0.45, 0.9, 0.4])
    assert len(curves) == 1 + 10


@pytest.mark.parametrize("best", [0, 1])
def test_precision_recall_at_the_edges(best):
    check_picture(charts.precision_recall(np.full((10, 101), float(best)), RECALLS, IOU_THRESHOLDS))


def test_precision_recall_leaves_out_thresholds_without_measurement(figures):
    precision = falling_precision()
    precision[[0, 9]] = np.nan
    check_picture(charts.precision_recall(precision, RECALLS, IOU_THRESHOLDS))
    ap, ap75, _ = legend(figures[0])
    assert ap == f"AP {precision[1:9].mean():.3f}\nmean of IoU 0.55 to 0.90"
    assert ap75.startswith("AP75")


@pytest.mark.parametrize("num_thresholds", [0, 10])
def test_precision_recall_without_ground_truth(num_thresholds, figures):
    precision = np.full((num_thresholds, 101), np.nan)
    check_picture(charts.precision_recall(precision, RECALLS, IOU_THRESHOLDS[:num_thresholds]))
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["no ground truth to measure"]
    assert not axes.lines


def test_threads_draw_what_the_main_thread_draws():
    def draw(seed: int) -> list[torch.Tensor]:
        curves = charts.precision_recall(falling_precision(1 - seed / 8), RECALLS, IOU_THRESHOLDS)
        return [curves, charts.confusion_matrix(random_matrix(seed + 1), names(seed + 1), 0.5)]

    alone = [draw(seed) for seed in range(4)]
    assert not torch.equal(alone[0][0], alone[1][0])
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(draw, range(4)))
    assert all(torch.equal(*pair) for a, b in zip(alone, together, strict=True) for pair in zip(a, b, strict=True))


def test_matplotlib_is_imported_when_something_is_drawn_and_pyplot_never():
    code = """
import sys, numpy
from view import charts
assert "matplotlib" not in sys.modules
charts.confusion_matrix(numpy.ones((2, 2), int), ["cat"], 0.5)
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
