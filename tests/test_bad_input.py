"""Damaged data sets in the hands of the scripts: what they say, and what they do with ``--on-bad-image``."""

import json
import re
import shutil

import pytest
from PIL import Image

import evaluate
import ssd
import train
from engine import check_data
from tests.conftest import SMALL
from tests.tiny import MODEL, TINY


@pytest.fixture
def damaged(data_path, tmp_path):
    """A copy of the tiny data set with four bad training images and one bad validation image, by name with a fault."""
    root = tmp_path / "damaged"
    shutil.copytree(data_path, root)
    names = sorted(path.name for path in (root / "train2017").iterdir())
    train_images, val_image = [root / "train2017" / name for name in names[:4]], min((root / "val2017").iterdir())
    train_images[0].write_bytes(train_images[0].read_bytes()[:2000])
    train_images[1].write_bytes(b"")
    train_images[2].write_text("<html>not found</html>")
    train_images[3].unlink()
    shutil.copy(root / "train2017" / names[5], val_image)  # of another size
    faults = ["cannot be decoded", "is empty", "is text in HTML", "no such file"]
    return root, dict(zip(train_images, faults, strict=True)) | {val_image: "pixels, but"}


def has_line(text: str, path, fault: str) -> bool:
    return re.search(rf"^.*{re.escape(str(path))} \(image id \d+\): .*{fault}.*$", text, re.MULTILINE) is not None


def find_faults(*arguments) -> list[str]:
    """What --check-data has to say, in this process."""
    args = train.parse_args([str(argument) for argument in arguments])
    return list(check_data.find_faults(evaluate.find_splits(args, "train", "val"), workers=0, loader_timeout=0))


def test_check_data_finds_nothing_wrong_with_a_good_set(run, data_path):
    console = run("train.py", "--check-data", "--data-path", data_path, "--workers", 0).stdout
    assert console.splitlines()[-1] == "No faults"
    assert f"{data_path / 'annotations/instances_train2017.json'}: 12 images" in console


def test_check_data_lists_every_fault(run, damaged, tmp_path):
    root, faults = damaged
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][2] = -1
    content["annotations"][1]["category_id"] = 1000
    content["categories"].append({"id": 77, "name": "only in train"})
    path.write_text(json.dumps(content))
    result = run("train.py", "--check-data", "--data-path", root, "--workers", 1, fails=True)
    assert all(has_line(result.stdout, *fault) for fault in faults.items())
    first, second = (annotation["id"] for annotation in content["annotations"][:2])
    assert f"{path}: annotation {first} has bbox" in result.stdout
    assert f"{path}: annotation {second} has category_id 1000" in result.stdout
    assert "have different classes: only" in result.stdout
    assert result.stderr.strip() == f"train.py: error: --check-data found {len(faults) + 3} faults, listed above"


def test_check_data_goes_on_after_a_broken_annotation_file(damaged):
    root, faults = damaged
    (root / "annotations/instances_train2017.json").write_text("{")
    found = find_faults("--data-path", root)
    assert len(found) == 2
    assert "not a COCO annotation file" in found[0]
    assert has_line(found[1], *list(faults.items())[-1])


def test_check_data_knows_when_there_is_nothing_to_train_on(data_path, tmp_path, capsys):
    shutil.copytree(data_path, tmp_path / "crowds")
    path = tmp_path / "crowds/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    path.write_text(json.dumps(content))
    arguments = ["--data-path", str(tmp_path / "crowds"), "--workers", "0"]
    assert find_faults(*arguments) == [f"{path}: no image has a box to train on"]
    assert "training uses 0 images with 0 boxes" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no image has a box to train on"):
        train.main(train.parse_args([*SMALL, *arguments, "--output-dir", str(tmp_path / "out")]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_ends_a_run_with_one_line(run, damaged, tmp_path, workers):
    root, faults = damaged
    command = ["train.py", *SMALL, "--data-path", root, "--output-dir", tmp_path / "out", "--workers", workers]
    error = run(*command, "--epochs", 1, "--eval-freq", 0, fails=True).stderr.strip().splitlines()
    assert error[-1].startswith("train.py: error: ")
    assert any(has_line(error[-1], path, fault) for path, fault in faults.items())


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_images_are_skipped_counted_and_named(run, damaged, tmp_path, processes):
    root, faults = damaged
    command = ["-m", "tests.tiny", *TINY, "--data-path", root, "--output-dir", tmp_path, "--workers", 2 - processes]
    command += ["--print-freq", 1]
    result = run(*command, "--on-bad-image", "skip", "--epochs", 2, processes=processes)
    *train_faults, val_fault = faults.items()
    assert all(has_line(result.stdout, *fault) for fault in faults.items())
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    named = [fault for record in records if record["kind"] == "skipped" for fault in record["faults"]]
    assert len(named) == len(train_faults)
    assert all(any(has_line(fault, *expected) for fault in named) for expected in train_faults)
    # all 12 images are in both epochs
    assert [record["skipped"] for record in records if record["kind"] == "train"][-1] == 2 * len(train_faults)
    assert f"Skipped {2 * len(train_faults)} samples" in result.stdout
    assert result.stdout.count(f"Skipped, and scored as an image without detections: {val_fault[0]}") == 2


def test_evaluation_counts_what_it_skipped(run, damaged, tmp_path):
    root, faults = damaged
    arguments = [*SMALL, "--data-path", str(root), "--output-dir", str(tmp_path), "--workers", "0", "--max-steps", "1"]
    train.main(train.parse_args([*arguments, "--eval-freq", "0", "--on-bad-image", "skip"]))
    command = ["evaluate.py", "--checkpoint", tmp_path / "checkpoint.pth", "--data-path", root, "--device", "cpu"]
    command += ["--workers", 0, "--output-dir", tmp_path / "evaluation"]
    error = run(*command, fails=True).stderr.strip().splitlines()[-1]
    assert has_line(error, *list(faults.items())[-1])
    run(*command, "--on-bad-image", "skip", "--pictures", 7)
    counts = json.loads((tmp_path / "evaluation/metrics.json").read_text())["counts"]
    assert (counts["images"], counts["skipped"]) == (7, 1)
    assert len(list((tmp_path / "evaluation/pictures").glob("[0-9]*"))) == 6


def test_images_in_memory_train_the_same(run, data_path, tmp_path):
    """In two processes, with a worker each where the images must reach them."""
    command = [
        "-m",
        "tests.tiny",
        *TINY,
        "--data-path",
        data_path,
        "--max-steps",
        2,
        "--eval-freq",
        0,
        "--print-freq",
        1,
    ]
    losses = []
    for name, flags in (("disk", ["--workers", 0]), ("memory", ["--workers", 1, "--cache", "ram"])):
        run(*command, *flags, "--output-dir", tmp_path / name, processes=2)
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([record["loss"] for record in records])
    assert losses[0] == losses[1]


def test_bad_images_in_memory_are_named(damaged, tmp_path):
    root, faults = damaged
    arguments = [*SMALL, "--data-path", str(root), "--output-dir", str(tmp_path), "--workers", "0", "--cache", "ram"]
    with pytest.raises(ValueError, match=r"\(image id \d+\): ") as error:
        train.main(train.parse_args([*arguments, "--epochs", "1", "--eval-freq", "0"]))
    assert any(has_line(str(error.value), *fault) for fault in faults.items())


def test_a_missing_image_folder_is_named(run, data_path, tmp_path):
    folder = ["--data-path", data_path, "--train-images", "nowhere", "--workers", 0]
    error = run("train.py", *SMALL, *folder, "--output-dir", tmp_path, fails=True).stderr.strip()
    assert error == "train.py: error: nowhere: no such image folder"
    checked = run("train.py", "--check-data", *folder, fails=True).stdout
    assert "nowhere: no such image folder" in checked.splitlines()
    assert f"{data_path / 'annotations/instances_val2017.json'}: 7 images" in checked


def test_check_data_notes_what_training_leaves_out(data_path, tmp_path, capsys):
    shutil.copytree(data_path, tmp_path / "odd")
    path = tmp_path / "odd/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    image_id = content["images"][0]["id"]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != image_id]
    more = {"image_id": image_id, "category_id": content["categories"][0]["id"], "iscrowd": 1, "area": 5}
    content["annotations"].append(more | {"id": 9001, "bbox": [5, 5, 9, 9]})
    content["annotations"][0]["bbox"] = [5000, 5, 10, 10]
    content["annotations"][1]["bbox"] = [5, 5, 0, 10]
    del content["annotations"][2]["area"]
    path.write_text(json.dumps(content))
    assert not find_faults("--data-path", tmp_path / "odd")
    console = capsys.readouterr().out
    outside, empty = content["annotations"][:2]
    for annotation in (outside, empty):
        assert f"note: {path}: annotation {annotation['id']} of image {annotation['image_id']} has no area" in console
    assert f"note: {path}: image {image_id} has crowds only; it is not trained on" in console
    assert f"note: {path}: 1 annotations have no area" in console


def test_check_data_notes_what_is_turned(data_path, tmp_path, capsys):
    shutil.copytree(data_path, tmp_path / "turned")
    for name in ("train2017", "val2017"):
        path = tmp_path / f"turned/annotations/instances_{name}.json"
        content = json.loads(path.read_text())
        for one in content["images"][:2]:
            file = tmp_path / "turned" / name / one["file_name"]
            exif = Image.Exif()
            exif[0x0112] = 6
            Image.open(file).save(file, exif=exif)
            one["width"], one["height"] = one["height"], one["width"]
        path.write_text(json.dumps(content))
    assert not find_faults("--data-path", tmp_path / "turned")
    assert capsys.readouterr().out.count(": 2 images have their size when turned as EXIF data say: turned") == 2


def test_a_resumed_run_goes_on_counting_what_it_skips(damaged, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ssd.family.MODELS, "tiny", MODEL)
    root, _ = damaged
    command = [*TINY, "--data-path", str(root), "--workers", "0", "--eval-freq", "0", "--on-bad-image", "skip"]

    def skipped_samples(output_dir, *flags) -> int:
        train.main(train.parse_args([*command, "--output-dir", str(output_dir), *flags]))
        records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        skipped = [record for record in records if record["kind"] == "skipped"]
        named = [fault for record in skipped for fault in record["faults"]]
        assert len(named) == len(set(named)) == (3 if "3" in flags else 4)
        return skipped[-1]["samples"]

    whole = skipped_samples(tmp_path / "whole", "--max-steps", "8", "--print-freq", "100")
    assert whole == 8  # four images in each of two epochs
    skipped_samples(tmp_path / "parts", "--max-steps", "3", "--print-freq", "100", "--checkpoint-freq", "2")
    resumed = ["--max-steps", "8", "--print-freq", "100", "--resume", "auto"]
    assert skipped_samples(tmp_path / "parts", *resumed) == whole
    assert capsys.readouterr().out.count("Skipped 8 samples") == 2
