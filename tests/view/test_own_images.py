"""``evaluate.py --images``: images without annotations."""

import io
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import coco
import evaluate
import ssd
from coco import DataError, scoring
from engine import resuming
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
    flags = ["--images", folder, "--output-dir", tmp_path / "out", "--device", "cpu", "--workers", 1, "--min-score", 0]
    console = run("evaluate.py", "--checkpoint", checkpoint, *flags, processes=processes).stdout
    found = json.loads((tmp_path / "out/detections.json").read_text())
    assert {one["file_name"] for one in found} == {"a.jpeg", "b.JPG", "c.png"}
    assert {one["category"] for one in found} <= set(NAMES)
    assert all(f"{name}: " in console for name in ("a.jpeg", "b.JPG", "c.png"))
    drawn = sorted(path.name for path in (tmp_path / "out/pictures").iterdir())
    assert drawn == ["a.jpeg.png", "b.JPG.png", "c.png.png"]
    assert re.search(r"The detections on 3 images are in .*out \([\d.]+ images/s\)", console)
    lines = (tmp_path / "out/detections.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line)["file_name"] for line in lines] == ["a.jpeg", "b.JPG", "c.png"]


def test_detections_are_those_of_an_evaluation(checkpoint, data_path, tmp_path):
    found = detect(checkpoint, data_path / "val2017", tmp_path / "own", "--min-score", 0)
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
    flags = ["--min-score", 0]
    one, other = (
        detect(checkpoint, tmp_path / name, tmp_path / "out", *flags) for name in ("upright.png", "lying.png")
    )
    assert len(one) > 0
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


def test_only_sure_detections_are_drawn_and_the_surest_on_top(data_path, tmp_path, monkeypatch):
    written = []
    draw_boxes = own_images.pictures.draw_boxes

    def spy(image, boxes, labels, texts, caption):
        written.extend([*texts, caption])
        return draw_boxes(image, boxes, labels, texts, caption)

    monkeypatch.setattr(own_images.pictures, "draw_boxes", spy)
    detections = np.array([[0, 9, 9, 20, 20, score, 1] for score in (0.5, 0.9, 0.29, 0.3)])
    detections = own_images.at_least(detections, 0.3)
    path = data_path / "val2017/000001.jpg"
    image = own_images.load_upright(path)[..., :3]
    drawn = Image.open(io.BytesIO(own_images.to_png(image, detections, {1: "cat"}, 0.3)))
    np.testing.assert_array_equal(drawn, own_images.draw(image, detections, {1: "cat"}, 0.3).permute(1, 2, 0))
    written = written[:4]
    assert written == ["cat 0.30", "cat 0.50", "cat 0.90", "3 detections, score >= 0.3"]
    described = own_images.describe(path, "", "", detections, {1: "cat"})
    assert own_images.as_line(described) == "000001.jpg: cat 0.90, cat 0.50, cat 0.30"
    assert described["detections"][0] == {"category": "cat", "bbox": [9, 9, 20, 20], "score": 0.9}


def test_a_line_names_the_surest_only():
    path = Path("folder/a.jpg")
    many = own_images.describe(path, "", "", np.array([[0, 9, 9, 20, 20, 0.5, 1]] * 12), {1: "cat"})
    assert own_images.as_line(many) == "a.jpg: " + ", ".join(["cat 0.50"] * 10) + ", ..."
    for fault, line in (("", "a.jpg: nothing"), ("a.jpg: torn", "Skipped a.jpg: torn")):
        assert own_images.as_line(own_images.describe(path, "", fault, np.zeros((0, 7)), {})) == line


def test_images_are_in_the_order_of_the_numbers_in_their_names(tmp_path):
    names = ["1.jpg", "02.jpg", "2.jpg", "10.jpg", "a1b2.jpg", "a1b10.jpg", "a2.jpg", "a.jpg", "f_9.png", "f_10.png"]
    for name in reversed(names):
        (tmp_path / name).touch()
    assert [path.name for path in own_images.find_images(tmp_path, tmp_path)] == names


@pytest.fixture
def folder(data_path, tmp_path):
    """Five images."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, source in enumerate(sorted((data_path / "val2017").iterdir())[:5], start=7):
        shutil.copy(source, folder / f"frame_{number}.jpg")
    return folder


def drawn_in(output_dir) -> dict[str, int]:
    """When each picture was written."""
    return {path.name: path.stat().st_mtime_ns for path in (output_dir / "pictures").iterdir()}


def test_what_is_done_is_skipped_and_what_it_found_is_kept(checkpoint, folder, tmp_path, capsys):
    flags = ["--skip-done", "--min-score", "0.02", "--batch-size", "2"]
    expected = detect(checkpoint, folder, tmp_path / "whole", *flags[1:])
    assert {one["file_name"] for one in expected} == {path.name for path in folder.iterdir()}
    # stopped after some images; one of their pictures was thrown away, and the last line is torn
    detect(checkpoint, folder, tmp_path / "out", *flags)
    journal = tmp_path / "out/detections.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:4]) + lines[4][:30])
    (tmp_path / "out/detections.json").unlink()
    (tmp_path / "out/pictures/frame_8.jpg.png").unlink()
    before = drawn_in(tmp_path / "out")
    capsys.readouterr()
    assert detect(checkpoint, folder, tmp_path / "out", *flags) == expected
    console = capsys.readouterr().out
    assert f"Detecting on 3 of 5 images of {folder}\n" in console
    assert re.findall(r"^(frame_\d+)", console, re.MULTILINE) == ["frame_8", "frame_10", "frame_11"]
    after = drawn_in(tmp_path / "out")
    same = {name for name in after if before.get(name) == after[name]}
    assert (len(after), same) == (5, {"frame_7.jpg.png", "frame_9.jpg.png"})
    # nothing is left, then there is one more
    assert detect(checkpoint, folder, tmp_path / "out", *flags) == expected
    shutil.copy(folder / "frame_7.jpg", folder / "frame_2.jpg")
    more = detect(checkpoint, folder, tmp_path / "out", *flags)
    assert more[0]["file_name"] == "frame_2.jpg"
    assert [one for one in more if one["file_name"] != "frame_2.jpg"] == expected


def test_without_being_asked_nothing_is_skipped_and_old_pictures_go(checkpoint, folder, tmp_path):
    output_dir = tmp_path / "out"
    detect(checkpoint, folder, output_dir, "--min-score", "0.02")
    (output_dir / "pictures/mine.png").touch()
    (folder / "frame_7.jpg").unlink()
    before = drawn_in(output_dir)
    found = detect(checkpoint, folder, output_dir, "--min-score", "0.02")
    after = drawn_in(output_dir)
    assert "frame_7.jpg" not in {one["file_name"] for one in found}
    assert after.keys() == before.keys() - {"frame_7.jpg.png"}
    assert {name for name in after if after[name] == before[name]} == {"mine.png"}


def test_json_only_draws_nothing_and_can_be_continued(checkpoint, folder, tmp_path, capsys):
    flags = ["--json-only", "--skip-done"]
    found = detect(checkpoint, folder, tmp_path / "out", *flags)
    assert not (tmp_path / "out/pictures").exists()
    capsys.readouterr()
    assert detect(checkpoint, folder, tmp_path / "out", *flags) == found
    assert "Detecting on 0 of 5 images" in capsys.readouterr().out
    detect(checkpoint, folder, tmp_path / "out", "--skip-done")  # now with pictures, of which there are none
    assert len(drawn_in(tmp_path / "out")) == 5


@pytest.mark.parametrize("change", ["--images", "--checkpoint", "--min-score", "--input-scaling", "--amp", "--no-ema"])
def test_what_was_found_otherwise_is_not_continued(checkpoint, folder, tmp_path, change):
    """With a checkpoint of the same name, too, that another training has written since."""
    output_dir, own = tmp_path / "out", tmp_path / "best.pth"
    shutil.copy(checkpoint, own)
    detect(own, folder, output_dir, "--skip-done")
    before = (output_dir / "detections.jsonl").read_bytes()
    flags = {"--min-score": ["0.5"], "--input-scaling": ["caffe"], "--amp": [], "--no-ema": []}
    flags = ["--skip-done", *([change, *flags[change]] if change in flags else [])]
    if change == "--images":
        folder = shutil.copytree(folder, tmp_path / "others")
    elif change == "--checkpoint":
        shutil.copy(checkpoint, own)
    with pytest.raises(ValueError, match=rf"--skip-done: what is in {output_dir} was found with {change} .*, this run"):
        detect(own, folder, output_dir, *flags)
    assert (output_dir / "detections.jsonl").read_bytes() == before


def test_a_folder_may_be_named_in_any_way(checkpoint, folder, tmp_path, monkeypatch, capsys):
    """And hold links to images, of which none tells where the folder is."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "frame_7.jpg").rename(elsewhere / "frame.jpg")
    (folder / "frame_7.jpg").symlink_to(elsewhere / "frame.jpg")
    (tmp_path / "link").symlink_to(folder)
    detect(checkpoint, folder, tmp_path / "out", "--skip-done")
    monkeypatch.chdir(folder)
    for name in (".", "../frames", tmp_path / "link"):
        capsys.readouterr()
        detect(checkpoint, name, tmp_path / "out", "--skip-done")
        assert "Detecting on 0 of 5 images" in capsys.readouterr().out


def test_an_image_that_has_changed_is_done_again(checkpoint, folder, tmp_path, capsys):
    detect(checkpoint, folder, tmp_path / "out", "--skip-done")
    shutil.copy(folder / "frame_8.jpg", folder / "frame_9.jpg")
    capsys.readouterr()
    detect(checkpoint, folder, tmp_path / "out", "--skip-done")
    assert re.findall(r"^frame_\d+", capsys.readouterr().out, re.MULTILINE) == ["frame_9"]


DAMAGES = {
    "empty": b"",
    "other objects": b'[1, 2]\n3\n"a"\nnull\n',
    "other keys": b'{"origin": 3}\n{"file_name": "frame_7.jpg"}\n{"a": 1}\n',
    "bytes": b"\xff\xfe\x00\n" * 3,
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("go_on", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_journal_says_nothing(checkpoint, folder, tmp_path, capsys, damage, go_on):
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    (output_dir / "detections.jsonl").write_bytes(DAMAGES[damage])
    detect(checkpoint, folder, output_dir, *(["--skip-done"] if go_on else []))
    assert "Detecting on 5 of 5 images" in capsys.readouterr().out


def test_a_journal_without_its_first_line_says_nothing(checkpoint, folder, tmp_path, capsys):
    """For nobody knows what its detections are of."""
    detect(checkpoint, folder, tmp_path / "out")
    journal = tmp_path / "out/detections.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[1:]))
    capsys.readouterr()
    detect(checkpoint, folder, tmp_path / "out", "--skip-done")
    assert "Detecting on 5 of 5 images" in capsys.readouterr().out


def test_an_image_that_vanishes_meanwhile_is_skipped_or_named(checkpoint, folder, tmp_path, monkeypatch, capsys):
    at_least = own_images.at_least

    def vanish(detections, min_score):
        (folder / "frame_8.jpg").unlink(missing_ok=True)
        return at_least(detections, min_score)

    monkeypatch.setattr(own_images, "at_least", vanish)
    shutil.copytree(folder, tmp_path / "copy")
    found = detect(checkpoint, folder, tmp_path / "out", "--on-bad-image", "skip", "--min-score", 0)
    assert {one["file_name"] for one in found} == {f"frame_{i}.jpg" for i in (7, 9, 10, 11)}
    assert f"Skipped {folder / 'frame_8.jpg'}: no such file" in capsys.readouterr().out
    shutil.copytree(tmp_path / "copy", folder, dirs_exist_ok=True)
    with pytest.raises(DataError, match=r"frame_8\.jpg: no such file"):
        detect(checkpoint, folder, tmp_path / "out")


def test_nothing_of_an_earlier_run_stays_for_that_of_this_one(checkpoint, folder, tmp_path):
    output_dir = tmp_path / "out"
    detect(checkpoint, folder, output_dir)
    (folder / "frame_7.jpg").write_bytes(b"no image")
    with pytest.raises(DataError):
        detect(checkpoint, folder, output_dir)
    assert not (output_dir / "detections.json").exists()
    assert drawn_in(output_dir) == {}


def test_names_that_are_too_long_to_draw_are_refused_before(checkpoint, folder, tmp_path):
    longest = "é" * 121 + ".jpg"
    (folder / "frame_7.jpg").rename(folder / longest)
    detect(checkpoint, folder, tmp_path / "out")
    (folder / "frame_8.jpg").rename(folder / ("é" * 122 + ".jpg"))
    with pytest.raises(ValueError, match=r"é\.jpg: its name is too long for that of its picture; use --json-only"):
        detect(checkpoint, folder, tmp_path / "out")
    detect(checkpoint, folder, tmp_path / "out", "--json-only")


def test_two_runs_do_not_write_to_one_folder(run, checkpoint, folder, tmp_path):
    resuming.claim(tmp_path / "out")
    flags = ["--images", folder, "--output-dir", tmp_path / "out", "--device", "cpu", "--workers", 0]
    assert "another run" in run("evaluate.py", "--checkpoint", checkpoint, *flags, fails=True).stderr


def test_a_skipped_image_is_tried_again(checkpoint, folder, tmp_path):
    whole = (folder / "frame_9.jpg").read_bytes()
    (folder / "frame_9.jpg").write_bytes(whole[:500])
    flags = ["--on-bad-image", "skip", "--skip-done", "--min-score", "0.02"]
    names = {one["file_name"] for one in detect(checkpoint, folder, tmp_path / "out", *flags)}
    assert "frame_9.jpg" not in names
    (folder / "frame_9.jpg").write_bytes(whole)
    found = detect(checkpoint, folder, tmp_path / "out", *flags)
    assert {one["file_name"] for one in found} == names | {"frame_9.jpg"}
    assert len(drawn_in(tmp_path / "out")) == 5


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_stopped_has_what_it_did(run, checkpoint, folder, tmp_path, processes):
    """At a bad image: of the batches before it everything is there."""
    (folder / "frame_11.jpg").write_bytes(b"no image")
    flags = ["--images", folder, "--output-dir", tmp_path / "out", "--device", "cpu", "--workers", 0, "--batch-size", 1]
    command = ["evaluate.py", "--checkpoint", checkpoint, *flags, "--skip-done", "--min-score", "0.02"]
    run(*command, processes=processes, fails=True)
    records = [json.loads(line) for line in (tmp_path / "out/detections.jsonl").read_text().splitlines()[1:]]
    names = [f"frame_{i}.jpg" for i in range(7, 11)]
    assert [one["file_name"] for one in records] == names
    assert {f"{name}.png" for name in names} <= drawn_in(tmp_path / "out").keys()
    (folder / "frame_11.jpg").write_bytes((folder / "frame_7.jpg").read_bytes())
    assert "Detecting on 1 of 5 images" in run(*command, processes=processes).stdout
    found = json.loads((tmp_path / "out/detections.json").read_text())
    assert [name for name, _ in itertools.groupby(one["file_name"] for one in found)] == [*names, "frame_11.jpg"]


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
    picture = own_images.draw(image, np.array([[0, 512.0, 200, 1024, 400, 0.9, 1]]), {1: "cat"}, 0.3)
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
    found = detect(checkpoint, folder, tmp_path / "out", "--on-bad-image", "skip", "--min-score", 0)
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
            "has no ground truth and draws all: give a model",
        ),
        (["--checkpoint", "CHECKPOINT", "--images", "EMPTY", "--pictures", "3"], "no --pictures"),
        (["--checkpoint", "CHECKPOINT", "--images", "EMPTY", "--val-loss"], "no --val-loss"),
        (["--checkpoint", "CHECKPOINT", "--skip-done"], "are for --images"),
        (["--checkpoint", "CHECKPOINT", "--json-only"], "are for --images"),
        (["--checkpoint", "CHECKPOINT", "--min-score", "0"], "are for --images"),
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
