import threading
import warnings

import numpy as np
import pytest
import torch

import plots

RECALLS, THRESHOLDS = np.linspace(0, 1, 101), np.linspace(0.5, 0.95, 10)


@pytest.fixture(autouse=True)
def no_warnings():
    """Such as those of a division by zero, or of a letter that the font lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def curves(height: float) -> np.ndarray:
    return height * (1 - RECALLS) * np.linspace(1, 0.1, 10)[:, None]


def random_matrix(num_classes: int) -> np.ndarray:
    matrix = np.random.default_rng(0).integers(0, 20, (num_classes + 1, num_classes + 1))
    matrix[-1, -1] = 0
    return matrix


def test_precision_and_recall():
    low, high, unknown = (plots.precision_recall(curves(height), RECALLS, THRESHOLDS) for height in (0.5, 1, np.nan))
    for chart in (low, high, unknown):
        assert chart.dtype == torch.uint8
        assert chart.shape[0] == 3
    assert not torch.equal(low, high)
    has_color = [(chart.max(dim=0).values - chart.min(dim=0).values > 100).any() for chart in (low, high, unknown)]
    assert has_color == [True, True, False]  # no curve where nothing was measured


@pytest.mark.parametrize("num_classes", [1, 3, 20, 80])
def test_confusion_matrix_has_a_reasonable_size(num_classes):
    names = [f"a class with a name that is long, number {i}" for i in range(num_classes)]
    chart = plots.confusion_matrix(random_matrix(num_classes), names, 0.3)
    assert chart.dtype == torch.uint8
    assert 300 < min(chart.shape[1:]) <= max(chart.shape[1:]) < 2000
    border = torch.cat([chart[:, 0], chart[:, -1], chart[:, :, 0], chart[:, :, -1]], dim=1)
    assert (border == 255).all()  # nothing is cut off


def test_confusion_matrix_of_nothing_is_without_colour():
    empty, full = (
        plots.confusion_matrix(matrix, ["a", "b"], 0.3) for matrix in (0 * random_matrix(2), random_matrix(2))
    )
    # left of the scale, which always has its colours
    colored = [((chart.amax(0) - chart.amin(0))[:, : chart.shape[2] // 2] > 30).any() for chart in (empty, full)]
    assert colored == [False, True]


def test_most_confused_classes_are_shown():
    matrix = np.zeros((31, 31), np.int64)
    matrix[np.arange(30), np.arange(30)] = 100
    matrix[4, 17] = 5
    matrix[9, 30] = matrix[30, 11] = 50  # missed and false, not confused
    assert plots.most_confused(matrix, 2).tolist() == [4, 17]
    assert plots.most_confused(matrix, 4).tolist() == [4, 9, 11, 17]


def test_the_rest_is_gathered_and_nothing_lost():
    matrix = random_matrix(30)
    shown = np.array([2, 7])
    cells = plots.gather(matrix, shown)
    assert cells.shape == (4, 4)
    assert cells.sum() == matrix.sum()
    assert cells[0].tolist() == [
        matrix[2, 2],
        matrix[2, 7],
        matrix[2, :30].sum() - matrix[2, 2] - matrix[2, 7],
        matrix[2, 30],
    ]
    np.testing.assert_array_equal(plots.gather(matrix, np.arange(30)), matrix)


def test_shares_of_rows():
    assert plots.row_shares(np.array([[3, 1], [0, 0]])).tolist() == [[0.75, 0.25], [0, 0]]


@pytest.mark.parametrize("name", ["cost $5 and $6", "a\nb", "x" * 100, "été"])
def test_any_name_can_be_written(name):
    chart = plots.confusion_matrix(random_matrix(1), [name], 0.3)
    assert max(chart.shape[1:]) < 1000


def test_charts_can_be_drawn_in_any_thread():
    expected = plots.precision_recall(curves(1), RECALLS, THRESHOLDS)
    drawn = []
    threads = [
        threading.Thread(target=lambda: drawn.append(plots.precision_recall(curves(1), RECALLS, THRESHOLDS)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(chart, expected) for chart in drawn)
    assert len(drawn) == 2
