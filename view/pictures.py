"""Pictures for people: boxes with class names and scores on images."""

import colorsys
import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CAPTION_HEIGHT, FONT_SIZE = 18, 13  # pixels, on a picture whose longer side has up to FULL_SIZE_SIDE
FULL_SIZE_SIDE = 640  # larger ones are shown smaller than they are: there, letters grow with the picture
MIN_SIDE, MAX_SIDE = 320, 1280  # pixels of the longer side: on other pictures nobody could read the names


def fit_for_viewing(image: ndarray) -> tuple[ndarray, float]:
    """An image [H, W, 3] whose longer side is between ``MIN_SIDE`` and ``MAX_SIDE``, and by how much it was scaled."""
    height, width = image.shape[:2]
    scale = float(np.clip(max(height, width), MIN_SIDE, MAX_SIDE)) / max(height, width)
    if scale == 1:
        return image, scale
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size)), scale


def to_corners(boxes: ndarray) -> ndarray:
    """Boxes [N, 4], xywh as COCO has them, to xyxy."""
    return np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)


def draw_boxes(image: ndarray, boxes: ndarray, labels: Sequence[int], texts: Sequence[str], caption: str) -> Tensor:
    """A picture with boxes, each in the colour of its class, under a caption.

    Args:
        image: uint8 [H, W, 3].
        boxes: [N, 4], xyxy in pixels of ``image``; the last ones are drawn over the others.
        labels: class of each box.
        texts: what to write at each box.
        caption: what to write above the picture.

    Returns:
        uint8 [3, H + CAPTION_HEIGHT, W]; of a large picture the caption is higher.
    """
    height, width = image.shape[:2]
    growth = max(1.0, max(height, width) / FULL_SIZE_SIDE)
    top = round(CAPTION_HEIGHT * growth)
    canvas = Image.new("RGB", (width, height + top), "white")
    canvas.paste(Image.fromarray(image), (0, top))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(FONT_SIZE * growth)
    draw.text((4, 1), caption, fill="black", font=font)
    line_width = max(2, round(min(height, width) / 200))
    boxes = [(x1, y1 + top, x2, y2 + top) for x1, y1, x2, y2 in boxes.tolist()]
    drawn = list(zip(boxes, map(class_color, labels), texts, strict=True))
    for (x1, y1, x2, y2), color, _ in drawn:
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=color, width=line_width)
    taken = []
    for (x1, y1, _, _), color, text in reversed(drawn):
        _, _, right, bottom = draw.textbbox((0, 0), text, font=font)
        x, y = place_label(x1, y1, right + 4, bottom + 2, canvas.size, taken, top)
        taken.append((x, y, x + right + 4, y + bottom + 2))
        draw.rectangle(taken[-1], fill=color)
        draw.text((x + 2, y), text, fill="black", font=font)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def place_label(
    x1: float,
    y1: float,
    width: float,
    height: float,
    canvas_size: tuple[int, int],
    taken: list[tuple],
    top: int = CAPTION_HEIGHT,
) -> tuple[float, float]:
    """Where the label of a box at ``x1``, ``y1`` hides no other: above the box, or as little lower as it can be.

    It stays between the left and the right side and under ``top``, where the caption ends; if there is no room, it
    hides others.
    """
    x = max(0, min(x1, canvas_size[0] - width))
    highest = y1 - height if y1 - height >= top else max(y1, top)
    y = highest
    while y + height <= canvas_size[1]:
        lower_ends = [y2 for x1, y1, x2, y2 in taken if x <= x2 and x1 <= x + width and y <= y2 and y1 <= y + height]
        if not lower_ends:
            return x, y
        y = max(lower_ends) + 1
    return x, highest


def class_color(label: int) -> tuple[int, int, int]:
    """A bright colour, far from those of neighbouring labels: hues a golden angle apart."""
    return tuple(round(255 * value) for value in colorsys.hsv_to_rgb(label * 0.381966 % 1, 0.65, 1.0))


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """Two pictures [3, H, W] of one size with a white gap between."""
    gap = left.new_full((3, left.shape[1], 8), 255)
    return torch.cat((left, gap, right), dim=2)


def grid(pictures: Sequence[Tensor], columns: int) -> Tensor:
    """Pictures of one size [3, H, W] in rows of ``columns``; the last row is filled up with white."""
    blank = torch.full_like(pictures[0], 255)
    pictures = [*pictures, *[blank] * (-len(pictures) % columns)]
    rows = [torch.cat(pictures[i : i + columns], dim=2) for i in range(0, len(pictures), columns)]
    return torch.cat(rows, dim=1)


def save_png(picture: Tensor, path) -> None:
    to_image(picture).save(path)


def to_image(picture: Tensor) -> Image.Image:
    """Pillow's, of a picture [3, H, W]."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def encode(image: Image.Image, **settings) -> bytes:
    """The file of an image, with Pillow's settings for it."""
    file = io.BytesIO()
    image.save(file, **settings)
    return file.getvalue()
