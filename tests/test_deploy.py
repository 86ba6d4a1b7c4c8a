"""From a checkpoint to a file that other programs run, as a user goes there."""

import json
import re

import cv2
import numpy as np
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from PIL import Image

import evaluate
import ssd
from tests.conftest import ROOT

PAGE = (ROOT / "docs/deploy.md").read_text()
NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that has learned nothing, but says different things of different images, and is sure of some."""
    torch.manual_seed(0)
    model = ssd.get_model("ssd300_light", weights_backbone=None, num_classes=1 + len(NAMES))
    for layer in model.head.classification_head.module_list:
        torch.nn.init.normal_(layer.weight, std=0.3)
    for layer in model.head.regression_head.module_list:  # or default boxes would overlap in a pattern, by equal IoUs
        torch.nn.init.normal_(layer.weight, std=1.0)
    path = tmp_path_factory.mktemp("model") / "checkpoint.pth"
    classes = [{"label": i + 1, "id": i + 1, "name": name} for i, name in enumerate(NAMES)]
    content = {"model": model.state_dict(), "args": {"model": "ssd300_light"}, "categories": classes}
    ssd.save_file(content | {"version": ssd.VERSION}, path)
    return path


def call(*command) -> None:
    arguments = [str(part) for part in [*command, "--device", "cpu", "--workers", 0]]
    evaluate.main(evaluate.get_args_parser().parse_args(arguments))


def assert_alike(found: list[tuple], expected: list[tuple], least: float, score_gap: float, box_gap: float) -> None:
    """Each of the one has its like among the other, but for those whose score is hardly over the ``least``."""
    for some, others in ((found, expected), (expected, found)):
        for what, score, box in some:
            if score > least + score_gap:
                assert any(
                    what == other
                    and abs(score - its_score) < score_gap
                    and np.abs(np.subtract(box, its)).max() < box_gap
                    for other, its_score, its in others
                ), (what, score, box)


def score(source: str, path, data_path, output_dir) -> tuple[dict, list[dict]]:
    """The metrics and the detections."""
    call(source, path, "--data-path", data_path, "--output-dir", output_dir, "--scorer", "hotcoco")
    return tuple(json.loads((output_dir / name).read_text()) for name in ("metrics.json", "detections.json"))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("part", ssd.EXPORT_OUTPUTS)
def test_an_exported_file_scores_as_its_checkpoint(checkpoint, data_path, tmp_path, capsys, part, suffix):
    path = tmp_path / "new folder" / f"model{suffix}"
    call("--checkpoint", checkpoint, "--export", path, "--export-part", part)
    assert re.search(rf"Exported to {path}: {part} of 6 classes, [\d.]+ MB\n$", capsys.readouterr().out)
    expected, expected_detections = score("--checkpoint", checkpoint, data_path, tmp_path / "checkpoint")
    metrics, detections = score("--detector", path, data_path, tmp_path / "exported")
    assert f"Evaluating {path} on 7 images" in capsys.readouterr().out
    assert expected["AR100"] > 0
    for name in ("AP", "AP50", "AR100", "ARs"):
        assert metrics[name] == pytest.approx(expected[name], abs=1e-3)
    assert len(detections) == len(expected_detections) == 7 * 200
    for image_id in {one["image_id"] for one in detections}:
        of_image = [
            [(one["category_id"], one["score"], one["bbox"]) for one in some if one["image_id"] == image_id]
            for some in (detections, expected_detections)
        ]
        assert_alike(*of_image, least=of_image[1][-1][1], score_gap=1e-4, box_gap=1e-2)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_scripts_as_a_user_runs_them(run, checkpoint, data_path, tmp_path, processes):
    path = tmp_path / "model.onnx"
    run("evaluate.py", "--checkpoint", checkpoint, "--export", path, "--device", "cpu", processes=processes)
    flags = ["--data-path", data_path, "--output-dir", tmp_path / "out", "--workers", 1]
    console = run("evaluate.py", "--detector", path, *flags, processes=processes).stdout
    assert "maxDets=100 ] = " in console
    flags = ["--images", data_path / "val2017", "--output-dir", tmp_path / "images", "--workers", 1, "--json-only"]
    run("evaluate.py", "--detector", path, *flags, processes=processes)
    found = json.loads((tmp_path / "images/detections.json").read_text())
    assert {one["category"] for one in found} <= set(NAMES)


def test_of_weights_without_classes_the_names_are_assumed(data_path, tmp_path, capsys):
    """They name what is found, but are not compared with those of the data."""
    model = ssd.get_model("ssd300_light", weights_backbone=None, num_classes=1 + len(NAMES))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    path = tmp_path / "model.onnx"
    call(
        "--checkpoint",
        tmp_path / "weights.pth",
        "--model",
        "ssd300_light",
        "--export",
        path,
        "--input-scaling",
        "caffe",
    )
    score("--detector", path, data_path, tmp_path / "out")
    call("--detector", path, "--images", data_path / "val2017/000001.jpg", "--output-dir", tmp_path / "images")
    assert re.search(r"000001.jpg: (class \d|nothing)", capsys.readouterr().out)


def test_other_classes_are_refused(checkpoint, data_path, tmp_path):
    path = tmp_path / "model.pt2"
    model = ssd.get_model("ssd300_light", weights=str(checkpoint)).eval()
    ssd.export_model(model, path, "raw", [{"label": i, "id": i, "name": f"kind {i}"} for i in range(1, 7)])
    with pytest.raises(ValueError, match=rf"{path}.*kind 1"):
        score("--detector", path, data_path, tmp_path / "out")


def test_what_other_tools_make_of_a_file_can_be_scored(checkpoint, data_path, tmp_path, monkeypatch):
    call("--checkpoint", checkpoint, "--export", tmp_path / "ssd.onnx")
    monkeypatch.chdir(tmp_path)
    (program,) = (one for one in programs() if "quantize_dynamic(" in one)
    exec(program, {})
    assert QuantType.QUInt8.name in program
    assert quantize_dynamic.__name__ in program
    whole, small = ((tmp_path / name).stat().st_size for name in ("ssd.onnx", "ssd_int8.onnx"))
    assert small < 0.5 * whole
    metrics, _ = score("--detector", tmp_path / "ssd_int8.onnx", data_path, tmp_path / "out")
    assert metrics["counts"]["detections"] > 100


def programs() -> list[str]:
    """Those of docs/deploy.md."""
    return re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def found_by(checkpoint, image, output_dir) -> list[tuple[str, float, list[float]]]:
    """What evaluate.py detects on an image."""
    call("--checkpoint", checkpoint, "--images", image, "--output-dir", output_dir, "--json-only")
    found = json.loads((output_dir / "detections.json").read_text())
    return [(one["category"], one["score"], one["bbox"]) for one in found]


def printed(text: str) -> list[tuple[str, float, list[int]]]:
    return [
        (name, float(score), json.loads(box))
        for name, score, box in re.findall(r"^(\w+) ([\d.]+) (\[.*\])$", text, re.M)
    ]


@pytest.mark.parametrize("part", ssd.EXPORT_OUTPUTS)
@pytest.mark.parametrize("turned", [False, True])
def test_the_programs_detect_what_evaluate_does(checkpoint, data_path, tmp_path, monkeypatch, capsys, part, turned):
    """onnxruntime's with the post-processing inside, OpenCV's without, on a photograph that may be lying."""
    package = {"detections": "onnxruntime", "raw": "cv2"}[part]
    (program,) = (one for one in programs() if f"import {package}\n" in one and "photograph" in one)
    assert len([line for line in program.splitlines() if line]) <= 30
    call("--checkpoint", checkpoint, "--export", tmp_path / "ssd.onnx", "--export-part", part)
    image = Image.open(data_path / "val2017/000001.jpg").resize((500, 340))
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    image.save(tmp_path / "photograph.jpg", exif=exif, quality=95)
    expected = found_by(checkpoint, tmp_path / "photograph.jpg", tmp_path / "out")
    assert len(expected) > 5
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(program.replace('"raccoon"', ", ".join(f'"{name}"' for name in NAMES)), {})
    found = printed(capsys.readouterr().out)
    if part == "detections":  # which has corners
        found = [(name, score, [x1, y1, x2 - x1, y2 - y1]) for name, score, (x1, y1, x2, y2) in found]
    least = expected[-1][1] if len(expected) == 200 else 0.3
    assert_alike(found, expected, least=least, score_gap=0.005, box_gap=2)


def test_opencv_runs_the_post_processing_too(checkpoint, tmp_path):
    """As docs/deploy.md says."""
    call("--checkpoint", checkpoint, "--export", tmp_path / "ssd.onnx")
    model = ssd.get_model("ssd300_light", weights=str(checkpoint)).eval()
    images = torch.rand(2, 3, 300, 300) * 255
    net = cv2.dnn.readNetFromONNX(str(tmp_path / "ssd.onnx"))
    net.setInput(images.numpy())
    boxes, scores, labels, counts = net.forward(list(ssd.EXPORT_OUTPUTS["detections"]))
    with torch.no_grad():
        expected = model.postprocess_detections(model(images), torch.full((2, 2), 300))
    for i, one in enumerate(expected):
        assert counts[i] == len(one["scores"])
        np.testing.assert_array_equal(labels[i, : counts[i]], one["labels"])
        np.testing.assert_allclose(scores[i, : counts[i]], one["scores"], atol=1e-4)
        np.testing.assert_allclose(boxes[i, : counts[i]], one["boxes"], atol=1e-2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--export", "model.pth"], "model.pth: the name of an exported file ends with .onnx or .pt2"),
        (["--export", "/proc/model.onnx"], "/proc.* cannot be written .* another --export$"),
        (["--export", "model.onnx", "--images", "photographs"], "--export writes the model"),
        (["--export-part", "raw"], "--export-part needs --export"),
    ],
)
def test_exports_that_cannot_be(checkpoint, flags, message):
    with pytest.raises(ValueError, match=message):
        call("--checkpoint", checkpoint, *flags)


@pytest.mark.parametrize(
    "flags", ["--amp", "--val-loss", "--model tiny", "--input-scaling caffe", "--no-ema", "--device cuda"]
)
def test_what_a_file_decides_no_flag_may(flags, monkeypatch):
    flag = flags.split()[0]
    arguments = ["--detector", "model.onnx", *flags.replace("tiny", "ssd300_light").split()]
    with pytest.raises(ValueError, match=rf"--detector: its file knows its model, .* leave out {flag}$"):
        evaluate.main(evaluate.get_args_parser().parse_args(arguments))


def test_an_exported_file_is_not_exported_again():
    with pytest.raises(ValueError, match="--export writes the model of --checkpoint"):
        call("--detector", "model.onnx", "--export", "other.onnx")
