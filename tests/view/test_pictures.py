import numpy as np
import pytest
import torch
from PIL import Image

from view import pictures


def test_boxes_and_caption_are_drawn():
    image = np.zeros((60, 80, 3), np.uint8)
    picture = pictures.draw_boxes(image, np.array([[10.0, 20, 50, 55]]), [4], ["dog 0.91"], "detections")
    assert picture.shape == (3, 60 + pictures.CAPTION_HEIGHT, 80)
    color = torch.tensor(pictures.class_color(4), dtype=torch.uint8)
    assert torch.equal(picture[:, 45 + pictures.CAPTION_HEIGHT, 10], color)
    assert picture[:, 50 + pictures.CAPTION_HEIGHT, 30].sum() == 0  # inside the box the image shows


def test_letters_grow_with_large_pictures():
    """As if a smaller picture was drawn, and enlarged."""
    small, large = (
        pictures.draw_boxes(np.zeros((side, side, 3), np.uint8), np.zeros((0, 4)), [], [], "detections")
        for side in (640, 1280)
    )
    assert large.shape == (3, 2 * small.shape[1], 2 * small.shape[2])
    caption_widths = [
        (picture[0, : picture.shape[2] // 40] < 128).any(dim=0).sum().item() for picture in (small, large)
    ]
    assert caption_widths[1] == pytest.approx(2 * caption_widths[0], rel=0.1)


def test_boxes_at_the_edges_and_without_area():
    image = np.zeros((40, 40, 3), np.uint8)
    boxes = np.array([[0.0, 0, 40, 40], [39, 39, 40, 40], [5, 5, 5, 5]])
    assert pictures.draw_boxes(image, boxes, [1, 2, 3], ["a long class name 0.99"] * 3, "").shape[2] == 40


def test_labels_do_not_hide_each_other():
    taken = []
    for _ in range(4):  # boxes in the same place
        x, y = pictures.place_label(30, 60, width=50, height=15, canvas_size=(100, 120), taken=taken)
        assert (x, y) == (30, 45 + 16 * len(taken))  # above the box, then further and further down
        taken.append((x, y, x + 50, y + 15))
    x, y = pictures.place_label(30, 60, width=50, height=15, canvas_size=(100, 120), taken=taken)
    assert (x, y) == (30, 45)  # no room
    assert pictures.place_label(90, 5, width=50, height=15, canvas_size=(100, 120), taken=[]) == (50, 18)


def test_neighbouring_classes_have_different_colours():
    colors = np.array([pictures.class_color(label) for label in range(1, 91)], dtype=float)
    assert (np.abs(np.diff(colors, axis=0)).sum(axis=1) > 60).all()


def test_layout():
    picture = torch.zeros(3, 10, 12, dtype=torch.uint8)
    assert pictures.side_by_side(picture, picture).shape == (3, 10, 32)
    assert pictures.grid([picture] * 5, columns=4).shape == (3, 20, 48)


def test_png_round_trip(tmp_path):
    picture = torch.randint(0, 256, (3, 9, 7), dtype=torch.uint8)
    pictures.save_png(picture, tmp_path / "p.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "p.png")), picture.permute(1, 2, 0).numpy())
