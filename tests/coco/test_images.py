import numpy as np
import pytest
from PIL import Image

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


@pytest.mark.parametrize("limit", [100 * 80 - 1, 100 * 40 - 1])
@pytest.mark.parametrize("size", [(100, 80), (10, 10)])
def test_decompression_bombs_are_refused(tmp_path, write, monkeypatch, limit, size):
    """Over the limit, where Pillow warns, and over twice the limit, where it raises; whatever size the json says."""
    Image.new("L", (100, 80)).save(tmp_path / "1.png")
    a = coco.read_annotations(write([annotation(1)], images=[image(1, *size)]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=rf"\(image id 1\): is a decompression bomb, with more than {limit} pixels"):
        coco.load_image(a, tmp_path, 0)


def test_exif_rotation_is_ignored(tmp_path, write):
    a = coco.read_annotations(write([annotation(1)], images=[image(1)]))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    Image.new("RGB", (100, 80)).save(tmp_path / "1.png", format="JPEG", exif=exif)
    assert coco.load_image(a, tmp_path, 0).shape == (80, 100, 4)


def test_bad_images_are_named(tmp_path, write):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)).save(
        tmp_path / "whole.jpg"
    )
    whole = (tmp_path / "whole.jpg").read_bytes()
    contents = {
        b"": "is empty, or neither JPEG nor PNG",
        b"<html></html>": "is empty, or neither JPEG nor PNG",
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
