"""``evaluate.py --images``: images without annotations."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import coco
import evaluate
import ssd
from coco import DataError, scoring
from tests.conftest import infer
from view import own_images

NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that knows nothing, so that it finds something of everything."""
    torch.manual_seed(0)
    model = ssd.get_model("ssd300_resnet18", weights_backbone=None, num_classes=1 + len(NAMES))
    path = tmp_path_factory.mktemp("model") / "checkpoint.pth"
    classes = [{"label": i + 1, "id": 10 * (i + 1), "name": name} for i, name in enumerate(NAMES)]
    content = {"model": model.state_dict(), "args": {"model": "ssd300_resnet18"}, "categories": classes}
    ssd.save_file(content | {"version": ssd.VERSION}, path)
    return path


def detect(checkpoint, images, output_dir, *flags) -> list[dict]:
    command = ["--checkpoint", checkpoint, "--images", images, "--output-dir", output_dir, "--workers", 0, *flags]
    evaluate.main(evaluate.get_args_parser().parse_args([str(part) for part in [*command, "--device", "cpu"]]))
    return json.loads((output_dir / "detections.json").read_text())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_of_photographs(run, checkpoint, data_path, tmp_path, processes):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name, source in (("b.JPG", "000001.jpg"), ("a.jpeg", "000002.jpg"), ("c.png", "000003.jpg")):
        Image.open(data_path / "val2017" / source).save(folder / name, format="PNG" if name == "c.png" else "JPEG")
    (folder / "notes.txt").write_text("not an image")
    flags = ["--images", folder, "--output-dir", tmp_path / "out", "--device", "cpu", "--workers", 1]
    console = run("evaluate.py", "--checkpoint", checkpoint, *flags, processes=processes).stdout
    found = json.loads((tmp_path / "out/detections.json").read_text())
    assert {one["file_name"] for one in found} == {"a.jpeg", "b.JPG", "c.png"}
    assert {one["category"] for one in found} <= set(NAMES)
    assert all(f"{name}: " in console for name in ("a.jpeg", "b.JPG", "c.png"))
    drawn = sorted(path.name for path in (tmp_path / "out/pictures").iterdir())
    assert drawn == ["0000_a.jpeg.png", "0001_b.JPG.png", "0002_c.png.png"]


def test_detections_are_those_of_an_evaluation(checkpoint, data_path, tmp_path):
    found = detect(checkpoint, data_path / "val2017", tmp_path / "own")
    a = coco.read_annotations(data_path / "annotations/instances_val2017.json")
    flags = ["--checkpoint", str(checkpoint), "--device", "cpu", "--workers", "0"]
    args = evaluate.get_args_parser().parse_args(flags)
    model, _ = evaluate.open_model(args, torch.device("cpu"))
    expected = infer(args, model, a, data_path / "val2017").detections
    assert len(found) == len(expected)
    np.testing.assert_array_equal([[*one["bbox"], one["score"]] for one in found], expected[:, 1:6])
    assert [one["category"] for one in found] == [NAMES[int(label) - 1] for label in expected[:, 6]]


def test_photographs_are_turned_upright(checkpoint, data_path, tmp_path):
    """As a phone stores them: lying, with a note that they are to be turned."""
    image = Image.open(data_path / "val2017/000001.jpg")
    image.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to the right
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    upright, lying = (own_images.load_upright(tmp_path / name) for name in ("upright.png", "lying.png"))
    np.testing.assert_array_equal(upright[..., :3], lying[..., :3])
    one, other = (detect(checkpoint, tmp_path / name, tmp_path / "out") for name in ("upright.png", "lying.png"))
    assert [d | {"file_name": ""} for d in one] == [d | {"file_name": ""} for d in other]


@pytest.mark.parametrize("damage", [b"\x00" * 40, b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_are_left_aside(data_path, tmp_path, damage):
    image = Image.open(data_path / "val2017/000001.jpg")
    image.save(tmp_path / "damaged.jpg", exif=damage)
    assert own_images.load_upright(tmp_path / "damaged.jpg").shape[:2] == (image.height, image.width)


def test_an_error_in_exif_data_does_not_matter(data_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "getexif", lambda _: 1 / 0)
    assert own_images.load_upright(data_path / "val2017/000001.jpg").ndim == 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_does(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "image.png"))
    np.testing.assert_array_equal(own_images.load_upright(tmp_path / "image.png")[..., :3], np.asarray(expected))


def test_only_sure_detections_are_drawn_and_the_surest_on_top(data_path, tmp_path, monkeypatch, capsys):
    written = []
    draw_boxes = own_images.pictures.draw_boxes

    def spy(image, boxes, labels, texts, caption):
        written.extend(texts)
        return draw_boxes(image, boxes, labels, texts, caption)

    monkeypatch.setattr(own_images.pictures, "draw_boxes", spy)
    dataset = own_images.ImageFiles([data_path / "val2017/000001.jpg"], preset=None)
    detections = np.array([[0, 9, 9, 20, 20, score, 1] for score in (0.5, 0.9, 0.29, 0.3)])
    own_images.report(tmp_path, dataset, detections, [], {1: "cat"})
    assert written == ["cat 0.30", "cat 0.50", "cat 0.90"]
    assert "000001.jpg: cat 0.90, cat 0.50, cat 0.30\n" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "detections.json").read_text())) == 4


def test_own_photographs_are_never_replaced(checkpoint, data_path, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(data_path / "val2017/000001.jpg", folder / "2023_1.png")
    for images in (folder, folder / "2023_1.png"):
        with pytest.raises(DataError, match="choose another --output-dir"):
            detect(checkpoint, images, tmp_path)
    assert (folder / "2023_1.png").exists()


def test_boxes_are_drawn_where_they_are_on_large_images():
    image = np.zeros((1000, 2560, 3), np.uint8)
    picture = own_images.draw(image, np.array([[0, 512.0, 200, 1024, 400, 0.9, 1]]), {1: "cat"})
    assert picture.shape == (3, 500 + 36, own_images.pictures.MAX_SIDE)
    assert picture[:, 36 + 200, 256].max() > 0  # half way down its left side
    assert picture[:, 36 + 200, 250].max() == 0


def test_bad_images(checkpoint, data_path, tmp_path, capsys):
    folder = tmp_path / "photographs"
    folder.mkdir()
    shutil.copy(data_path / "val2017/000001.jpg", folder / "good.jpg")
    (folder / "bad.jpg").write_bytes((folder / "good.jpg").read_bytes()[:1000])
    with pytest.raises(DataError, match=r"bad\.jpg: cannot be decoded"):
        detect(checkpoint, folder, tmp_path / "out")
    found = detect(checkpoint, folder, tmp_path / "out", "--on-bad-image", "skip")
    assert {one["file_name"] for one in found} == {"good.jpg"}
    assert "Skipped" in (console := capsys.readouterr().out)
    assert f"{folder / 'bad.jpg'}: cannot be decoded" in console


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "CHECKPOINT", "--images", "nowhere"], "nowhere: no such image or folder"),
        (["--checkpoint", "CHECKPOINT", "--images", "EMPTY"], r"has no image; looked for \.jpg, \.jpeg, \.png"),
        (
            ["--detections", "x.json", "--images", "EMPTY"],
            "has no ground truth and draws all: give --checkpoint",
        ),
        (["--checkpoint", "CHECKPOINT", "--images", "EMPTY", "--pictures", "3"], "no --pictures"),
        (["--checkpoint", "CHECKPOINT", "--images", "EMPTY", "--val-loss"], "no --val-loss"),
    ],
)
def test_flags_that_cannot_be(checkpoint, tmp_path, flags, message):
    places = {"CHECKPOINT": str(checkpoint), "EMPTY": str(tmp_path)}
    arguments = [places.get(flag, flag) for flag in flags]
    with pytest.raises(ValueError, match=message):
        evaluate.main(evaluate.get_args_parser().parse_args([*arguments, "--device", "cpu"]))


def test_names_of_classes():
    coco = own_images.class_names(None, 91)
    assert (len(coco), coco[1], coco[90]) == (80, "person", "toothbrush")
    assert own_images.class_names(None, 3) == {1: "class 1", 2: "class 2"}
    assert own_images.class_names([{"label": 5, "id": 50, "name": "cat"}], 6) == {5: "cat"}
    assert scoring.detections_to_array(
        0, {"boxes": torch.zeros(1, 4), "scores": torch.ones(1), "labels": torch.tensor([12])}, dict.fromkeys(coco, 1)
    ).shape == (0, 7)  # an output without a class
