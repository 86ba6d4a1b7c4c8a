"""Exported models say what the model says, whatever it finds."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import ssd
from tests.conftest import ROOT
from tests.tiny import MODEL

FORMATS = (".onnx", ".pt2")


def make_model(**config) -> ssd.SSD:
    """A tiny model whose scores are far apart, so that rounding changes no order, and none of them 1."""
    model = MODEL(weights_backbone=None, **{"num_classes": 5} | config).eval()
    for layer in model.backbone.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_()
    for layer in model.head.classification_head.module_list:
        torch.nn.init.normal_(layer.weight, std=0.2)
    for layer in model.head.regression_head.module_list:
        torch.nn.init.normal_(layer.weight, std=0.3)
    return model


def run(path, images: torch.Tensor) -> dict[str, np.ndarray]:
    """The outputs of a file by name."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, {"images": images.numpy()}), strict=True))
    with torch.no_grad():
        return {name: output.numpy() for name, output in torch.export.load(path).module()(images).items()}


def metadata_of(path) -> dict[str, str]:
    if path.suffix == ".onnx":
        return {one.key: one.value for one in onnx.load(path).metadata_props}
    files = {ssd.METADATA_FILE: ""}
    torch.export.load(path, extra_files=files)
    return json.loads(files[ssd.METADATA_FILE])


def assert_same_detections(model: ssd.SSD, found: dict[str, np.ndarray], images: torch.Tensor) -> list[int]:
    """The outputs of the part ``detections`` are those of the model; returns how many each image has."""
    with torch.no_grad():
        sizes = torch.full((len(images), 2), model.size)
        expected = model.postprocess_detections(model(images), sizes)
    assert [len(one["scores"]) for one in expected] == found["counts"].tolist()
    for i, one in enumerate(expected):
        count = len(one["scores"])
        np.testing.assert_array_equal(found["labels"][i, :count], one["labels"])
        np.testing.assert_allclose(found["scores"][i, :count], one["scores"], atol=1e-5)
        np.testing.assert_allclose(found["boxes"][i, :count], one["boxes"], atol=1e-3)
        assert all((found[name][i, count:] == 0).all() for name in ("boxes", "scores", "labels"))
    assert {name: output.shape[1] for name, output in found.items() if name != "counts"} == dict.fromkeys(
        ("boxes", "scores", "labels"), model.detections_per_img
    )
    return found["counts"].tolist()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"score_thresh": 0.6, "nms_thresh": 0.2},
        {"detections_per_img": 7},
        {"topk_candidates": 3},  # fewer than detections_per_img, of all classes together
        {"num_classes": 2, "score_thresh": 0.0},
    ],
    ids=str,
)
def test_detections_are_those_of_the_model(tmp_path, suffix, config):
    model = make_model(**config)
    path = tmp_path / f"model{suffix}"
    ssd.export_model(model, path, "detections", [])
    for num_images in (1, 2, 5):
        images = torch.rand(num_images, 3, 64, 64) * 255
        counts = assert_same_detections(model, run(path, images), images)
        assert min(counts) > 0
    images[1:3] *= 0.1  # in which it is less sure
    assert_same_detections(model, run(path, images), images)


@pytest.mark.parametrize("suffix", FORMATS)
def test_where_nothing_is_found_all_is_zero(tmp_path, suffix):
    model = make_model(score_thresh=0.9999999)
    path = tmp_path / f"model{suffix}"
    for layer in model.head.classification_head.module_list:
        torch.nn.init.zeros_(layer.weight)
    ssd.export_model(model, path, "detections", [])
    images = torch.rand(3, 3, 64, 64) * 255
    assert assert_same_detections(model, run(path, images), images) == [0, 0, 0]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "name", ["ssd300_vgg16", "ssd300_vgg11_bn", "ssd300_resnet18", "ssdlite320_mobilenet_v3_large"]
)
def test_every_kind_of_model_can_be_exported(tmp_path, name, suffix):
    model = ssd.get_model(name, weights_backbone=None, num_classes=3).eval()
    path = tmp_path / f"model{suffix}"
    ssd.export_model(model, path, "raw", [])
    for num_images in (1, 3):
        images = torch.randint(0, 256, (num_images, 3, model.size, model.size)).float()
        found = run(path, images)
        with torch.no_grad():
            expected = model(images) | {"default_boxes": model.default_boxes}
        assert found.keys() == expected.keys() == {*ssd.EXPORT_OUTPUTS["raw"]}
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-3 * value.abs().max())


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("part", ssd.EXPORT_OUTPUTS)
def test_metadata_tell_what_a_program_must_know(tmp_path, part, suffix):
    classes = [{"label": 1, "id": 17, "name": 'a "猫" <b>'}, {"label": 2, "name": "dog"}]
    path = tmp_path / f"model{suffix}"
    model = make_model(num_classes=3, input_scaling="tensorflow", nms_thresh=0.3, topk_candidates=30)
    ssd.export_model(model, path, part, classes)
    metadata = metadata_of(path)
    assert json.loads(metadata.pop("classes")) == classes
    assert metadata.pop("input").startswith("float32 [batch, 3, 64, 64]: RGB, 0 to 255")
    assert metadata == {
        "part": part,
        "size": "64",
        "num_classes": "3",
        "input_scaling": "tensorflow, within the model",
        "score_thresh": "0.01",
        "nms_thresh": "0.3",
        "detections_per_img": "200",
        "topk_candidates": "30",
    }


@pytest.mark.parametrize("part", ssd.EXPORT_OUTPUTS)
def test_an_onnx_file_is_valid_and_of_any_number_of_images(tmp_path, part):
    path = tmp_path / "model.onnx"
    ssd.export_model(make_model(), path, part, [])
    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path))
    assert session.get_inputs()[0].shape == ["batch", 3, 64, 64]
    assert tuple(output.name for output in session.get_outputs()) == ssd.EXPORT_OUTPUTS[part]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("part", ssd.EXPORT_OUTPUTS)
def test_a_file_does_not_tell_where_it_was_made(tmp_path, part, suffix):
    path = tmp_path / f"model{suffix}"
    ssd.export_model(make_model(), path, part, [])
    content = path.read_bytes()
    assert str(ROOT).encode() not in content
    assert b".py" not in content


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"old")
    monkeypatch.setattr(ssd.files.os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ssd.export_model(make_model(), path, "raw", [])
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["model", "model.pth", "model.ONNX", "onnx"])
def test_other_formats_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}: the name of an exported file ends with \.onnx or \.pt2"):
        ssd.check_export_target(name)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(ssd.export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else 1)
    with pytest.raises(ValueError, match=r"model\.onnx: .* pip install onnxscript$"):
        ssd.check_export_target("model.onnx")
    ssd.check_export_target("model.pt2")


def test_of_equal_scores_the_first_is_taken(tmp_path):
    """As of a sky without clouds, in which all default boxes of a map say the same; at every place where some go.

    In other programs rounding may make them unequal.
    """
    model = make_model(detections_per_img=30, topk_candidates=70)
    path = tmp_path / "model.pt2"
    ssd.export_model(model, path, "detections", [])
    images = torch.zeros(2, 3, 64, 64)
    images[1, :, 20:40, 30:] = 255
    with torch.no_grad():
        scores = model(images)["cls_logits"].softmax(dim=-1)[0, :, 1]
    assert len(scores.unique()) < len(scores) / 2
    assert_same_detections(model, run(path, images), images)


@pytest.mark.parametrize("size", [8732, 24564, 36000])
def test_equal_scores_are_in_order_and_close_ones_too(size):
    scores = torch.rand(size).clamp(min=0.001)
    scores[1000:1500] = torch.nextafter(scores[:500], torch.ones(()))
    scores[2000:2500] = scores[:500]
    scores[-1], scores[0] = torch.nextafter(torch.tensor(0.001), torch.ones(())), 0.001
    values, places = ssd.export.stable_topk(scores[None].expand(2, -1), size)
    expected = scores.sort(descending=True, stable=True)
    assert torch.equal(values[1], expected.values)
    assert torch.equal(places[1], expected.indices)


def test_the_operator_in_the_place_of_suppression_does_the_same():
    """PyTorch computes it where it runs a graph itself, before ONNX's takes its place."""
    boxes = torch.rand(6, 50, 2) * 40
    boxes = torch.cat((boxes, boxes + 1 + torch.rand(6, 50, 2) * 40), dim=2)
    scores = torch.rand(6, 50)
    settings = (0.3, 0.45, 200)
    expected = ssd.export.suppress_with_torchvision(boxes, scores, *settings)
    assert 0 < len(expected) < (scores > 0.3).sum()
    assert torch.equal(torch.ops.ssd.suppress(boxes, scores, *settings), expected)
    torch.library.opcheck(torch.ops.ssd.suppress, (boxes, scores, *settings), test_utils="test_schema")
