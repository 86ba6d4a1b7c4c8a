"""Image files: opened, decoded, turned where they must be, and where they are bad, named or skipped."""

import contextlib
import errno
import io
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

from .index import CocoAnnotations
from .rules import DataError
from .shared_files import READING_THREADS

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # as Pillow names them; of a GIF the first frame
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# what files begin with that people take for such images, at which byte, and what they are
OTHER_KINDS = (
    (0, b"%PDF", "a PDF document"),
    (0, b"<", "text in HTML or XML, SVG perhaps"),
    (0, b"version https://git-lfs", "a pointer of Git LFS, whose file was not fetched"),
    (0, b"\0\5\x16\7", "what macOS keeps beside a file (AppleDouble)"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"PK\3\4", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (4, b"ftypavi", "an AVIF image"),
    (4, b"ftyphe", "a HEIC image"),
    (4, b"ftypm", "a HEIC image or a video"),
    (4, b"ftyp", "a video"),
    (0, b"RIFF", "a RIFF file, but no WebP image"),
)
LONGEST_START = 64
WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "F")  # of more than 8 bits; Pillow would clip them
BITS_PER_SAMPLE = 258  # the tag of TIFF
ORIENTATION = 0x0112  # the tag of EXIF for how a camera was held
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
UNDOES = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
FIRST_QUARTER_TURN = 5  # from here on width and height change places


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its name; hidden ones are none."""
    return Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")


@contextlib.contextmanager
def open_image(file: Path | io.BytesIO, where: str, whole: bool = True) -> Iterator[Image.Image]:
    """Opens an image file, and while it is in use turns what Pillow has to say into errors for the user.

    Args:
        file: a path, or the content of a file.
        where: what an error names.
        whole: the pixels are to be decoded, so that checksums are worth a look.

    Raises:
        DataError: the file is missing, damaged or of an unknown kind, or has more pixels than Pillow takes for safe.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # see load_image and read_size
            image = Image.open(file, formats=FORMATS)
            if whole and image.format == "PNG":  # whose checksums Pillow looks at only when it is asked to
                with image:
                    image.verify()
                image = Image.open(file, formats=["PNG"])
        with image:
            yield image
    except FileNotFoundError:
        raise DataError(f"{where}: no such file; check the image folder") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        raise DataError(f"{where}: is a decompression bomb, with more than {limit} pixels; make it smaller") from None
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{where}: is {kind_of(file)}; replace the file or remove the image") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow raises for damaged files
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):  # the image may be good
            raise
        reason = " ".join(str(error).split())
        raise DataError(f"{where}: cannot be decoded ({reason}); replace the file or remove the image") from None


def kind_of(file: Path | io.BytesIO) -> str:
    """In words, what a file is that is no image that can be read."""
    with io.BytesIO(file.getvalue()) if isinstance(file, io.BytesIO) else open(file, "rb") as opened:
        start = opened.read(LONGEST_START)
    if not start:
        return "empty"
    known = (kind for at, mark, kind in OTHER_KINDS if start[at:].lstrip().startswith(mark))
    return f"{next(known, 'of an unknown kind')}, none of {', '.join(FORMATS)}"


def to_pixels(image: Image.Image, where: str, is_upright: bool = False) -> ndarray:
    """Decodes an image to uint8 [H, W, 4]: RGB and a byte without meaning; pixels of four bytes are gathered fastest.

    Grey, palette and CMYK images become RGB, and transparency is dropped. ``is_upright`` turns it as its EXIF data say;
    by default the pixels are as they are stored.

    Raises:
        DataError: it has more than 8 bits per channel.
    """
    bits = image.tag_v2.get(BITS_PER_SAMPLE, (8,)) if image.format == "TIFF" else (8,)
    if image.mode in WIDE_MODES or max(bits) > 8:
        raise DataError(f"{where}: has more than 8 bits per channel; convert it to 8")
    turn = None
    if is_upright != turns_itself(image):
        turn = TURNS.get(orientation(image) if is_upright else UNDOES.get(orientation(image)))
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if turn is not None:
        rgb = rgb.transpose(turn)
    return np.frombuffer(rgb.tobytes("raw", "RGBX"), np.uint8).reshape(rgb.height, rgb.width, 4)


def orientation(image: Image.Image) -> int:
    """How its EXIF data say that it is to be turned, a key of ``TURNS``; 1 where it is not, or they cannot be read."""
    try:
        found = image.getexif().get(ORIENTATION)
        return found if found in TURNS else 1
    except Exception:  # damaged EXIF data raise almost anything, and the image may be good
        return 1


def turns_itself(image: Image.Image) -> bool:
    """Whether Pillow turns it upright on its own, as it does with TIFF alone."""
    return image.format == "TIFF"


def sizes(image: Image.Image) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height of an image as it is stored, and of the same when it is turned upright."""
    is_turned = orientation(image) >= FIRST_QUARTER_TURN
    other = image.size[::-1] if is_turned else image.size
    return (other, image.size) if turns_itself(image) else (image.size, other)


def load_upright(path: Path) -> ndarray:
    """Decodes an image file to uint8 [H, W, 4] as a viewer shows it, turned as its EXIF data say, if they can be read.

    Raises:
        DataError: it cannot be decoded.
    """
    with open_image(path, str(path)) as image:
        return to_pixels(image, str(path), is_upright=True)


def read_size(path: Path, is_upright: bool = False) -> tuple[int, int] | str:
    """Width and height of an image file, ``is_upright`` as a viewer shows it; a text, what is wrong, if it has none.

    Nothing confirms such a size, so it must not be more than Pillow takes for usual.
    """
    try:
        with open_image(path, str(path), whole=False) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                return (
                    f"{path}: has {image.width}x{image.height} pixels, more than {limit}; write its width and height "
                    "into the annotations, or make it smaller"
                )
            return sizes(image)[is_upright]
    except DataError as error:
        return str(error)


def read_sizes(paths: list[Path], is_upright: bool = False) -> list[tuple[int, int] | str]:
    """What ``read_size`` says of many files."""
    with ThreadPoolExecutor(READING_THREADS) as pool:
        return list(pool.map(partial(read_size, is_upright=is_upright), paths))


def load_image(annotations: CocoAnnotations, images_dir: Path, row: int, content: bytes | None = None) -> ndarray:
    """Decodes an image, see ``to_pixels``.

    COCO's boxes are of the pixels as they are stored, whatever EXIF data say. Only where the annotations give the size
    that an image has when it is turned upright, or are of upright images, it is.

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
        if image.size == (width, height) and not (turns_itself(image) or annotations.is_upright):
            return to_pixels(image, where)  # without a look at EXIF data
        stored, upright = sizes(image)
        if (width, height) in ([upright] if annotations.is_upright else [stored, upright]):
            return to_pixels(image, where, is_upright=annotations.is_upright or (width, height) != stored)
        note = f" (EXIF orientation {orientation(image)})" if orientation(image) > 1 else ""
        raise DataError(
            f"{where}: is {stored[0]}x{stored[1]} pixels{note}, but {annotations.path} says {width}x{height}; "
            "correct one of them"
        )


def is_turned(annotations: CocoAnnotations, images_dir: Path, row: int) -> bool:
    """Whether ``load_image`` turns an image, which can be read."""
    path = images_dir / annotations.file_name(row)
    size = tuple(annotations.sizes[row, ::-1].tolist())
    with open_image(path, str(path), whole=False) as image:
        if image.size == size and not turns_itself(image):
            return False  # without a look at EXIF data, for which Pillow would decode a PNG file
        return sizes(image)[0] != size


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
