"""Image files: opened, decoded, and where they are bad, named or skipped."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image, UnidentifiedImageError

from .annotations import DataError
from .index import CocoAnnotations

WIDE_MODES = ("I", "I;16")  # what Pillow calls PNG files of 16 bits, by version; it would clip them to 8


@contextlib.contextmanager
def open_image(file: Path | io.BytesIO, where: str) -> Iterator[Image.Image]:
    """Opens a JPEG or PNG file, and while it is in use turns what Pillow has to say into errors for the user.

    Raises:
        DataError: the file is missing, damaged or of an unknown kind. ``where`` is what the error names.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=["JPEG", "PNG"])
            if image.format == "PNG":  # whose checksums Pillow looks at only when it is asked to
                with image:
                    image.verify()
                image = Image.open(file, formats=["PNG"])
        with image:
            yield image
    except FileNotFoundError:
        raise DataError(f"{where}: no such file; check the image folder") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{where}: is a decompression bomb, with more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{where}: is empty, or neither JPEG nor PNG; replace the file or remove the image") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow raises for damaged files
        reason = " ".join(str(error).split())
        raise DataError(f"{where}: cannot be decoded ({reason}); replace the file or remove the image") from None


def to_pixels(image: Image.Image, where: str) -> ndarray:
    """Decodes an image to uint8 [H, W, 4]: RGB and a byte without meaning; pixels of four bytes are gathered fastest.

    Grey, palette and CMYK images become RGB, and transparency is dropped.

    Raises:
        DataError: it has more than 8 bits per channel.
    """
    if image.mode in WIDE_MODES:
        raise DataError(f"{where}: has more than 8 bits per channel; convert it to 8")
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return np.frombuffer(rgb.tobytes("raw", "RGBX"), np.uint8).reshape(image.height, image.width, 4)


def load_image(annotations: CocoAnnotations, images_dir: Path, row: int, content: bytes | None = None) -> ndarray:
    """Decodes an image, see ``to_pixels``. EXIF rotation is ignored, since COCO's boxes are not rotated.

    Args:
        annotations: what names the image.
        images_dir: the folder it is in.
        row: which image, as a row of the annotations.
        content: the file's content. Where it is empty, the file is read, so that the system says what is wrong.

    Raises:
        DataError: the file is missing, damaged, of an unknown kind, or of another size than the annotations say.
    """
    path = images_dir / annotations.file_name(row)
    where = f"{path} (image id {annotations.image_ids[row]})"
    height, width = annotations.sizes[row].tolist()
    with open_image(io.BytesIO(content) if content else path, where) as image:
        if image.size != (width, height):
            raise DataError(
                f"{where}: is {image.width}x{image.height} pixels, but {annotations.path} says {width}x{height}; "
                "correct one of them"
            )
        return to_pixels(image, where)


def fault_of_image(annotations: CocoAnnotations, images_dir: Path, row: int) -> str:
    """What is wrong with an image; an empty text if nothing is."""
    _, fault = load_or_skip(lambda: load_image(annotations, images_dir, row), skip_bad_images=True)
    return fault


def load_or_skip(load: Callable[[], ndarray], skip_bad_images: bool) -> tuple[ndarray, str]:
    """What ``load`` returns and an empty text; for a bad image, if such are skipped, a black pixel and its fault."""
    try:
        return load(), ""
    except DataError as error:
        if not skip_bad_images:
            raise
        return np.zeros((1, 1, 4), np.uint8), str(error)
