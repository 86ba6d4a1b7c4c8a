"""Charts for people: learning curve, precision-recall and confusion matrix.

Drawn with matplotlib's objects alone, never with pyplot, whose current figure would be shared by all threads.
"""

import io
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from torch import Tensor

SHOWN_CLASSES = 20
LONGEST_NAME = 24
PIXELS_PER_INCH = 100
BLUE, ORANGE, BLACK, GREY = "#1f6fb4", "#d9600f", "#222222", "#c4c4c4"


Curve = tuple[Sequence[float], Sequence[float]]  # x and y of its points


def learning_curve(losses: dict[str, Curve], metrics: dict[str, Curve]) -> Tensor:
    """A chart of losses, and under it one of metrics between 0 and 1, both over the epochs.

    Args:
        losses: by name, on a logarithmic scale.
        metrics: by name.

    Returns:
        uint8 [3, H, W].
    """
    figure = new_figure(8.6, 6.4)
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"hspace": 0.1})
    upper.set_ylabel("loss")
    upper.set_yscale("log", nonpositive="mask")
    upper.set_title("Learning curve", loc="left", fontsize=11)
    upper.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    upper.yaxis.set_major_formatter("{x:g}")
    upper.yaxis.set_minor_formatter("")
    lower.set(ylabel="AP", xlabel="epochs", ylim=(0, 1))
    for axes, curves in ((upper, losses), (lower, metrics)):
        marker = "o" if axes is lower else ""
        for (name, points), color in zip(curves.items(), (BLUE, ORANGE), strict=False):
            line = axes.plot(*points, label=name, color=color, marker=marker, markersize=4, linewidth=1.8)
            line[0].set_clip_on(axes is upper)  # a metric of 0 or 1 lies on the edge
        clear_frame(axes)
        if curves:
            axes.legend(loc="upper left", bbox_to_anchor=(1.03, 1.0), borderaxespad=0, frameon=False)
    return to_picture(figure)


def precision_recall(precision: ndarray, recalls: ndarray, iou_thresholds: ndarray) -> Tensor:
    """A chart of precision over recall: IoU 0.50, IoU 0.75, the mean of all thresholds, and the others faintly.

    Args:
        precision: float [T, R], COCO's interpolated precision, averaged over the classes; nan in rows without
            anything to measure.
        recalls: [R], the recall of each column.
        iou_thresholds: [T], the IoU threshold of each row.

    Returns:
        uint8 [3, H, W].
    """
    figure = new_figure(8.6, 5.2)
    axes = figure.add_axes((0.08, 0.11, 0.6, 0.81))
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", ylabel="precision")
    axes.set_title("Precision and recall, averaged over the classes", loc="left", fontsize=11)
    axes.set_xticks(np.linspace(0, 1, 11))
    axes.set_yticks(np.linspace(0, 1, 11))
    clear_frame(axes)
    measured = ~np.isnan(precision).any(axis=1)
    if measured.any():
        draw_curves(axes, precision[measured], recalls, iou_thresholds[measured])
        axes.legend(loc="upper left", bbox_to_anchor=(1.03, 1.0), borderaxespad=0, frameon=False, labelspacing=0.9)
    else:
        axes.text(0.5, 0.5, "no ground truth to measure", ha="center", va="center", fontsize=14, color=BLACK)
    return to_picture(figure)


def draw_curves(axes, precision: ndarray, recalls: ndarray, iou_thresholds: ndarray) -> None:
    """Draws the curves [T, R], the important ones uppermost and named with their average precision."""
    # not clipped: a curve at 0 or 1 lies on the edge of the axes, which would hide half of its width
    style = {"clip_on": False, "solid_capstyle": "butt"}
    label = f"AP {precision.mean():.3f}\nmean of IoU {iou_thresholds.min():.2f} to {iou_thresholds.max():.2f}"
    # wider and beneath the next two, so that it shows even where they are the same
    axes.plot(recalls, precision.mean(axis=0), color=BLACK, linewidth=3.6, zorder=3, label=label, **style)
    for name, iou, color in (("AP50", 0.5, BLUE), ("AP75", 0.75, ORANGE)):
        for row in np.isclose(iou_thresholds, iou).nonzero()[0]:
            label = f"{name} {precision[row].mean():.3f}\nIoU {iou:.2f}"
            axes.plot(recalls, precision[row], color=color, linewidth=1.8, zorder=4, label=label, **style)
    others = precision[~(np.isclose(iou_thresholds, 0.5) | np.isclose(iou_thresholds, 0.75))]
    for curve, label in zip(others, ["other IoU thresholds", *[None] * len(others)], strict=False):
        axes.plot(recalls, curve, color=GREY, linewidth=1, zorder=2, label=label, **style)


def confusion_matrix(matrix: ndarray, names: Sequence[str], min_score: float) -> Tensor:
    """A chart of what the objects of each class were taken for.

    Of more than ``SHOWN_CLASSES`` classes it shows those most confused with others, and the rest as if one class.

    Args:
        matrix: int [K + 1, K + 1]: a row for each true class and one for detections of nothing, or of an object that
            is found; a column for each predicted class and one for objects without detection. The last cell has no
            meaning.
        names: of the K classes.
        min_score: the score that a detection needed to count.

    Returns:
        uint8 [3, H, W], less than 2000 pixels high and wide.
    """
    shown = most_confused(matrix, SHOWN_CLASSES)
    cells, labels = gather(matrix, shown), [shorten(names[k]) for k in shown]
    title = f"Confusion matrix at IoU 0.5, scores from {min_score:g}"
    has_rest = len(shown) < len(names)
    if has_rest:
        labels.append("the rest")
        title += f"\nThe {len(shown)} of {len(names)} classes most confused with others, and the rest as one class"
        title += "\nGrey: the rest detected as the rest, rightly or as another class of it"
    side = len(cells) * float(np.clip(6 / len(cells), 0.46, 0.9))
    figure = new_figure(side, side)
    axes = figure.add_axes((0, 0, 1, 1))  # all else lies outside of the figure, which grows as it is drawn
    axes.set_title(title, loc="left", fontsize=11, linespacing=1.4)
    colors = cell_colors(cells, has_rest)
    axes.imshow(colors, interpolation="nearest")
    write_counts(axes, cells, colors)
    label_cells(axes, cells, labels)
    draw_scale(figure.add_axes((1 + 0.3 / side, 1 - 1.6 / side, 0.4 / side, 1.6 / side)))
    return to_picture(figure)


def most_confused(matrix: ndarray, at_most: int) -> ndarray:
    """The classes of ``matrix`` that were most confused with others, in their order.

    Objects missed and detections of nothing decide between equals only: nearly every class has many, the more the more
    frequent it is, and they need no matrix to be seen.
    """
    wrong = matrix.astype(np.int64)
    np.fill_diagonal(wrong, 0)
    mistakes = wrong.sum(axis=0) + wrong.sum(axis=1)
    confusions = wrong[:-1, :-1].sum(axis=0) + wrong[:-1, :-1].sum(axis=1)
    return np.sort(np.lexsort((-mistakes[:-1], -confusions))[:at_most])


def gather(matrix: ndarray, shown: ndarray) -> ndarray:
    """The matrix of the classes ``shown``, then of all other classes as one if there are any, then of no class."""
    num_classes = len(matrix) - 1
    has_rest = len(shown) < num_classes
    place = np.full(num_classes + 1, len(shown))
    place[shown] = np.arange(len(shown))
    place[-1] = len(shown) + has_rest
    cells = np.zeros((place[-1] + 1, place[-1] + 1), np.int64)
    np.add.at(cells, (place[:, None], place[None, :]), matrix)
    cells[-1, -1] = 0
    return cells


def cell_colors(cells: ndarray, has_rest: bool) -> ndarray:
    """A colour [N, N, 3] for each cell, the fuller the more of its row it has: blue where right, orange where wrong."""
    full = np.full((*cells.shape, 3), rgb(ORANGE))
    full[np.diag_indices(len(cells))] = rgb(BLUE)
    if has_rest:
        full[-2, -2] = rgb(GREY)  # neither: classes of the rest may be confused with each other
    shares = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
    colors = tint(full, shares[:, :, None])
    colors[-1, -1] = 0.93
    return colors


def tint(color: ndarray, share: ndarray) -> ndarray:
    """White where ``share`` is 0, ``color`` where it is 1."""
    return 1 - np.sqrt(share) * (1 - color)  # the root, so that confusions of a few per cent show


def write_counts(axes, cells: ndarray, colors: ndarray) -> None:
    is_dark = colors @ np.array([0.299, 0.587, 0.114]) < 0.65
    for row, column in np.argwhere(cells):
        color = "white" if is_dark[row, column] else BLACK
        axes.text(column, row, short_count(cells[row, column]), ha="center", va="center", fontsize=8, color=color)


def label_cells(axes, cells: ndarray, labels: Sequence[str]) -> None:
    """Names the rows, with the objects in each, and the columns; lines between the cells."""
    totals = cells.sum(axis=1)
    rows = [f"{label} ({total})" for label, total in zip(labels, totals[:-1], strict=True)]
    ticks = np.arange(len(cells))
    # a dollar sign in a name is no formula
    axes.set_yticks(ticks, [*rows, f"no object or a double ({totals[-1]})"], fontsize=9, parse_math=False)
    turned = {"rotation": 45, "ha": "right", "va": "top", "rotation_mode": "anchor"}
    axes.set_xticks(ticks, [*labels, "missed"], fontsize=9, parse_math=False, **turned)
    axes.set(xlabel="detected as", ylabel="true class (objects)")
    axes.tick_params(length=0)
    for draw_line in (axes.axhline, axes.axvline):
        for line in ticks[1:-1] - 0.5:
            draw_line(line, color="#e8e8e8", linewidth=0.6)
        draw_line(ticks[-1] - 0.5, color=BLACK, linewidth=1.2, zorder=3)


def draw_scale(axes) -> None:
    """Draws what the colours mean: the share of its row that a cell has."""
    colors = tint(np.array([rgb(BLUE), rgb(ORANGE)]), np.linspace(0, 1, 101)[:, None, None])
    axes.imshow(colors, extent=(-0.5, 1.5, 0, 100), origin="lower", aspect="auto", interpolation="nearest")
    axes.set_xticks([0, 1], ["right", "wrong"], fontsize=9, rotation=90)
    axes.set_yticks([0, 50, 100], ["0", "50 %", "100 %"], fontsize=9)
    axes.set_ylabel("share of the row", fontsize=9)
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")


def shorten(name: str) -> str:
    """A name in one line of at most ``LONGEST_NAME`` characters, without its middle if it is longer."""
    name = "".join(letter if letter.isprintable() else "?" for letter in " ".join(name.split()))
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}…{name[-8:]}"


def short_count(count: int) -> str:
    if count < 10_000:
        return str(count)
    return f"{count / 1000:.0f}k" if count < 999_500 else f"{count / 1e6:.1f}M"


def rgb(color: str) -> ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def new_figure(width: float, height: float):
    """An empty figure of that many inches."""
    # imported late: it takes a second, also of processes that draw nothing
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=PIXELS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def clear_frame(axes) -> None:
    """Of axes with curves: a faint grid behind them, and no frame above and to the right."""
    axes.grid(color="#e8e8e8")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def to_picture(figure) -> Tensor:
    """What was drawn and a small margin, uint8 [3, H, W], whether it lies inside of the figure or not."""
    file = io.BytesIO()
    warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a name; the console and the report have it
    figure.savefig(file, format="png", dpi=PIXELS_PER_INCH, bbox_inches="tight", pad_inches=0.15)
    return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
