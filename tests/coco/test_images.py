import numpy as np
import pytest
from PIL import Image, ImageOps

import coco
from coco import DataError
from tests.conftest import annotation, image


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "RGB"])
def test_images_of_any_mode_become_rgb(tmp_path, write, mode):
    a = coco.read_annotations(write([annotation(1)], images=[image(1)]))
    source = Image.new("RGB", (100, 80), (255, 0, 0)).convert(mode)
    source.save(tmp_path / "1.png", format="JPEG" if mode == "CMYK" else "PNG")
    pixels = coco.load_image(a, tmp_path, 0)
    assert pixels.shape == (80, 100, 4)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels[..., :3], np.asarray(Image.open(tmp_path / "1.png").convert("RGB")))
    assert (mode in ("L", "LA", "1")) == (pixels[0, 0, 0] == pixels[0, 0, 1])


def test_images_of_more_than_8_bits_are_refused(tmp_path, write):
    a = coco.read_annotations(write([annotation(1)], images=[image(1)]))
    Image.new("I;16", (100, 80)).save(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"1\.png \(image id 1\): has more than 8 bits per channel; convert it to 8"):
        coco.load_image(a, tmp_path, 0)


@pytest.mark.parametrize("size", [(100, 80), (10, 10)])
def test_decompression_bombs_are_refused(tmp_path, write, monkeypatch, size):
    """Over the limit where Pillow raises an error, which is twice the one where it warns; whatever the json says."""
    Image.new("L", (100, 80)).save(tmp_path / "1.png")
    a = coco.read_annotations(write([annotation(1)], images=[image(1, *size)]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 40 - 1)
    with pytest.raises(
        DataError, match=r"\(image id 1\): is a decompression bomb, with more than 7998 pixels; make it"
    ):
        coco.load_image(a, tmp_path, 0)


def test_a_large_size_that_the_annotations_confirm_is_believed(tmp_path, write, monkeypatch):
    Image.new("L", (100, 80), 7).save(tmp_path / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 80 - 1)
    a = coco.read_annotations(write([annotation(1)], images=[image(1)]))
    assert (coco.load_image(a, tmp_path, 0)[..., :3] == 7).all()
    with pytest.raises(DataError, match="is 100x80 pixels, but"):
        coco.load_image(coco.read_annotations(write([annotation(1)], images=[image(1, 10, 10)])), tmp_path, 0)
    unsized = {"id": 1, "file_name": "1.png"}
    with pytest.raises(DataError, match="has 100x80 pixels, more than 7999; write its width and height into the annot"):
        coco.read_annotations(write([annotation(1)], images=[unsized]), images_dir=tmp_path)


def photograph(size=(100, 80)) -> Image.Image:
    """With no two alike among its turned and mirrored forms."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:10, :20], pixels[-10:, :20] = (255, 0, 0), (0, 0, 255)
    return Image.fromarray(pixels)


def save_with_orientation(path, orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = (
        {"lossless": True} if format == "WEBP" else {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    )
    photograph().save(path, format=format, exif=exif, **settings)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_where_only_its_turned_size_is_that_of_the_annotations(tmp_path, write, format, orientation):
    save_with_orientation(tmp_path / "1.png", orientation, format)
    stored = coco.load_image(coco.read_annotations(write([annotation(1)], images=[image(1)])), tmp_path, 0)
    np.testing.assert_allclose(stored[..., :3].astype(int), np.asarray(photograph()), atol=8)
    turned = coco.read_annotations(write([annotation(1)], images=[image(1, 80, 100)]))
    if orientation < 5:
        note = r" \(EXIF orientation \d\)" if orientation > 1 else ""
        with pytest.raises(
            DataError, match=rf"is 100x80 pixels{note}, but .*annotations\.json says 80x100; correct one"
        ):
            coco.load_image(turned, tmp_path, 0)
    else:
        upright = coco.load_image(turned, tmp_path, 0)
        expected = ImageOps.exif_transpose(Image.open(tmp_path / "1.png")).convert("RGB")
        np.testing.assert_array_equal(upright[..., :3], np.asarray(expected))
        assert coco.is_turned(turned, tmp_path, 0)
    np.testing.assert_array_equal(
        coco.load_upright(tmp_path / "1.png")[..., :3],
        np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "1.png")).convert("RGB")),
    )


def test_another_size_names_the_orientation(tmp_path, write):
    save_with_orientation(tmp_path / "1.png", 6, "JPEG")
    a = coco.read_annotations(write([annotation(1)], images=[image(1, 80, 99)]))
    with pytest.raises(DataError, match=r"is 100x80 pixels \(EXIF orientation 6\), but .* says 80x99; correct one"):
        coco.load_image(a, tmp_path, 0)


def test_a_square_image_is_not_turned(tmp_path, write):
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph((80, 80)).save(tmp_path / "1.png", exif=exif)
    a = coco.read_annotations(write([annotation(1)], images=[image(1, 80, 80)]))
    np.testing.assert_array_equal(coco.load_image(a, tmp_path, 0)[..., :3], np.asarray(photograph((80, 80))))
    assert not coco.is_turned(a, tmp_path, 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "MPO"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_kinds_of_images(tmp_path, write, format, mode):
    """Whatever their names end in; of several frames the first is read."""
    first, second = photograph().convert(mode), Image.new(mode, (100, 80), 255 if mode == "L" else (255, 255, 0))
    frames = {"save_all": True, "append_images": [second]} if format in ("GIF", "TIFF", "WEBP", "MPO") else {}
    first.save(tmp_path / "1.png", format=format, **frames)
    pixels = coco.load_image(coco.read_annotations(write([annotation(1)], images=[image(1)])), tmp_path, 0)
    np.testing.assert_array_equal(pixels[..., :3], np.asarray(Image.open(tmp_path / "1.png").convert("RGB")))
    assert np.abs(pixels[..., :3] - np.asarray(first.convert("RGB"), dtype=float)).mean() < 3


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "packbits"])
def test_tiff_of_more_than_8_bits_is_refused(tmp_path, write, compression):
    a = coco.read_annotations(write([annotation(1)], images=[image(1)]))
    for wide in (np.zeros((80, 100), np.uint16), np.zeros((80, 100), np.float32), np.zeros((80, 100), np.int32)):
        Image.fromarray(wide).save(tmp_path / "1.png", format="TIFF", compression=compression)
        with pytest.raises(DataError, match=r"\(image id 1\): has more than 8 bits per channel; convert it to 8"):
            coco.load_image(a, tmp_path, 0)
    photograph().save(tmp_path / "1.png", format="TIFF", compression=compression)
    np.testing.assert_array_equal(coco.load_image(a, tmp_path, 0)[..., :3], np.asarray(photograph()))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (b"<html></html>", "text in HTML or XML"),
        (b'\n <svg xmlns="http://www.w3.org/2000/svg"/>', "text in HTML or XML, SVG perhaps"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC image"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "an AVIF image"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "a video"),
        (b"%PDF-1.7", "a PDF document"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X", "AppleDouble"),
        (b"8BPS\0\1", "a Photoshop file"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image"),
        (b"PK\3\4\x14\0", "a zip archive"),
        (b"RIFF\0\0\0\0WAVE", "a RIFF file, but no WebP image"),
        (b"P6 2 2 255 012345678901", "of an unknown kind"),
        (bytes(100), "of an unknown kind"),
    ],
)
def test_other_kinds_are_named(tmp_path, write, content, kind):
    a = coco.read_annotations(write([annotation(1)], images=[image(1)]))
    (tmp_path / "1.png").write_bytes(content)
    fault = coco.fault_of_image(a, tmp_path, 0)
    assert fault.startswith(f"{tmp_path / '1.png'} (image id 1): is ")
    assert kind in fault
    assert fault.endswith("; replace the file or remove the image")
    assert content == b"" or "JPEG, PNG, WEBP, BMP, TIFF, GIF" in fault


def test_bad_images_are_named(tmp_path, write):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(
        tmp_path / "whole.jpg"
    )
    whole = (tmp_path / "whole.jpg").read_bytes()
    contents = {
        b"": "is empty; replace the file or remove the image",
        b"<html></html>": "is text in HTML or XML, SVG perhaps, none of JPEG, PNG",
        whole[: len(whole) // 2]: "cannot be decoded (image file is truncated",
        whole: f"is 100x80 pixels, but {tmp_path / 'annotations.json'} says 90x80; correct one of them",
    }
    where = f"{tmp_path / '1.png'} (image id 1): "
    for content, message in {None: "no such file; check the image folder", **contents}.items():
        a = coco.read_annotations(write([annotation(1)], images=[image(1, 90 if content == whole else 100)]))
        if content is not None:
            (tmp_path / "1.png").write_bytes(content)
        assert coco.fault_of_image(a, tmp_path, 0).startswith(where + message)
        if content:  # from memory as from the disk
            with pytest.raises(DataError) as error:
                coco.load_image(a, tmp_path / "nowhere", 0, content)
            assert message in str(error.value)
            assert "\n" not in str(error.value)
            assert " object at " not in str(error.value)


def test_image_folders_may_hold_links(tmp_path, write):
    (tmp_path / "store").mkdir()
    (tmp_path / "images").mkdir()
    Image.new("RGB", (100, 80)).save(tmp_path / "store/a.png")
    (tmp_path / "images/1.png").symlink_to(tmp_path / "store/a.png")
    a = coco.read_annotations(write([annotation(1)], images=[image(1)]))
    assert coco.load_image(a, tmp_path / "images", 0).shape == (80, 100, 4)
