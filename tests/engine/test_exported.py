"""Exported files in the place of a model."""

import importlib.util
import json

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16

import ssd
from engine import exported
from tests.ssd.test_export import FORMATS, make_model

CLASSES = [{"label": label, "id": 10 * label, "name": f"class {label}"} for label in range(1, 5)]


def export(path, part: str = "detections", **config) -> ssd.SSD:
    """The model that was exported."""
    model = make_model(**config)
    ssd.export_model(model, path, part, CLASSES)
    return model


def detect(detector, images: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    sizes = torch.tensor([[128, 32]] * len(images))
    with torch.inference_mode():
        return detector.postprocess_detections(detector(images), sizes)


def save_changed(path, change) -> None:
    content = onnx.load(path)
    change(content)
    onnx.save(content, path)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("part", ssd.EXPORT_OUTPUTS)
def test_a_file_detects_what_its_model_does(tmp_path, part, suffix):
    path = tmp_path / f"model{suffix}"
    model = export(path, part, detections_per_img=20)
    detector = exported.open_exported(str(path)).eval()
    assert (detector.size, detector.num_classes, detector.classes, detector.batch_size) == (64, 5, CLASSES, None)
    assert detector.thresholds == model.thresholds
    images = torch.rand(3, 3, 64, 64) * 255
    for one, other in zip(detect(model, images), detect(detector, images), strict=True):
        assert len(one["scores"]) == 20
        np.testing.assert_array_equal(one["labels"], other["labels"])
        np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-5)
        np.testing.assert_allclose(one["boxes"], other["boxes"], atol=1e-3)


def fix_batch(content: onnx.ModelProto) -> None:
    content.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


def test_a_fixed_number_of_images_is_known(tmp_path):
    path = tmp_path / "model.onnx"
    export(path)
    save_changed(path, fix_batch)
    assert exported.open_exported(str(path)).batch_size == 4


def test_a_file_of_half_precision(tmp_path):
    path = tmp_path / "model.onnx"
    model = export(path, "raw")
    onnx.save(convert_float_to_float16(onnx.load(path)), path)
    images = torch.rand(2, 3, 64, 64) * 255
    outputs = exported.open_exported(str(path))(images)
    with torch.no_grad():
        expected = model(images)
    for name, output in outputs.items():
        assert output.dtype == torch.float32
        np.testing.assert_allclose(output, expected[name], atol=0.02 * expected[name].abs().max())


def take_bytes(content: onnx.ModelProto) -> None:
    """Puts a conversion before all that reads the images."""
    for node in content.graph.node:
        for i, name in enumerate(node.input):
            if name == "images":
                node.input[i] = "floats"
    node = onnx.helper.make_node("Cast", ["images"], ["floats"], to=onnx.TensorProto.FLOAT)
    content.graph.node.insert(0, node)
    content.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8


def test_a_file_that_takes_bytes_gets_rounded_pixels(tmp_path):
    path = tmp_path / "model.onnx"
    model = export(path, "raw")
    save_changed(path, take_bytes)
    images = torch.rand(2, 3, 64, 64) * 255
    outputs = exported.open_exported(str(path))(images)
    with torch.no_grad():
        expected = model(images.round())
    np.testing.assert_allclose(outputs["cls_logits"], expected["cls_logits"], atol=1e-3)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("part", ssd.EXPORT_OUTPUTS)
@pytest.mark.parametrize("head", ["classification_head", "regression_head"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_said(tmp_path, part, suffix, head, value):
    """Of one default box, in one of the images."""
    path = tmp_path / f"model{suffix}"
    model = make_model()
    layer = getattr(model.head, head).module_list[1]
    layer.weight.data[0] = 0
    layer.weight.data[0, 0, 1, 1] = 1
    layer.register_forward_hook(lambda _, inputs, output: output + torch.where(inputs[0][:, :1] > 1e6, value, 0.0))
    model.backbone.register_forward_hook(
        lambda _, images, maps: [maps[0], maps[1] + 1e9 * (images[0][:, :1, :4, :4] > 9)]
    )
    ssd.export_model(model, path, part, CLASSES)
    images = torch.rand(3, 3, 64, 64) * 255
    images[1, 0, 0, 0] = 5000
    detector = exported.open_exported(str(path))
    with pytest.raises(ssd.NotFiniteError) as error:
        detect(detector, images)
    assert error.value.rows == [1]
    detect(detector, images[[0, 2]])


def test_a_conversion_that_overflows_is_said(tmp_path):
    path = tmp_path / "model.onnx"
    model = make_model()
    model.head.classification_head.module_list[0].bias.data[2] = 60000
    model.head.classification_head.module_list[0].weight.data[2].abs_().mul_(1000)
    ssd.export_model(model, path, "detections", CLASSES)
    images = torch.rand(2, 3, 64, 64) * 255
    detect(exported.open_exported(str(path)), images)
    onnx.save(convert_float_to_float16(onnx.load(path)), path)
    with pytest.raises(ssd.NotFiniteError):
        detect(exported.open_exported(str(path)), images)


def drop(key: str):
    def change(content: onnx.ModelProto) -> None:
        kept = [one for one in content.metadata_props if one.key != key]
        del content.metadata_props[:]
        content.metadata_props.extend(kept)

    return change


def put(key: str, value: str):
    def change(content: onnx.ModelProto) -> None:
        (one,) = (one for one in content.metadata_props if one.key == key)
        one.value = value

    return change


DROPPED = ("part", "size", "num_classes", "classes", "nms_thresh", "topk_candidates")
WRONG = (("part", "heads"), ("classes", "cat, dog"), ("classes", "[1, 2]"), ("size", "large"), ("score_thresh", ""))


@pytest.mark.parametrize("change", [*map(drop, DROPPED), *(put(*one) for one in WRONG)])
def test_a_file_without_its_metadata_is_refused(tmp_path, change):
    path = tmp_path / "model.onnx"
    export(path)
    save_changed(path, change)
    with pytest.raises(ValueError, match=rf"{path}: does not tell its classes, size and thresholds"):
        exported.open_exported(str(path))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("part", "detections", "has no output boxes, counts, labels, scores"),
        ("size", "300", r"takes images of the shape \('batch', 3, 64, 64\), not .* 300"),
    ],
)
def test_a_file_that_is_not_as_its_metadata_say_is_refused(tmp_path, key, value, message):
    path = tmp_path / "model.onnx"
    export(path, "raw")
    save_changed(path, put(key, value))
    with pytest.raises(ValueError, match=rf"{path}: {message}"):
        exported.open_exported(str(path))


def give_counts_as_floats(content: onnx.ModelProto) -> None:
    (node,) = (one for one in content.graph.node if "counts" in one.output)
    node.output[0] = "whole"
    content.graph.node.append(onnx.helper.make_node("Cast", ["whole"], ["counts"], to=onnx.TensorProto.FLOAT))
    content.graph.node.append(onnx.helper.make_node("ReduceSum", ["counts"], ["total"], keepdims=0))
    content.graph.output[-1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    content.graph.output.append(onnx.helper.make_tensor_value_info("total", onnx.TensorProto.FLOAT, []))


def test_other_types_and_more_outputs_do_not_matter(tmp_path):
    path = tmp_path / "model.onnx"
    model = export(path)
    save_changed(path, give_counts_as_floats)
    images = torch.rand(2, 3, 64, 64) * 255
    for one, other in zip(detect(exported.open_exported(str(path)), images), detect(model, images), strict=True):
        np.testing.assert_array_equal(one["labels"], other["labels"])


def test_other_inputs_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    node = onnx.helper.make_node("Identity", ["ids"], ["same"])
    ids, same = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [1]) for name in ("ids", "same"))
    graph = onnx.helper.make_graph([node], "graph", [ids], [same])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    with pytest.raises(ValueError, match=rf"{path}: has other inputs than one of images"):
        exported.open_exported(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.onnx", None, "no such file"),
        ("model.pth", b"", "--detector takes the files of --export, which end with .onnx or .pt2"),
        ("model.onnx", b"no model", "onnxruntime cannot open it"),
        ("model.onnx", b"", "onnxruntime cannot open it"),
        ("model.pt2", b"no model", "PyTorch cannot open it"),
        ("model.pt2", b"", "PyTorch cannot open it"),
    ],
)
def test_what_is_no_exported_file_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}: {message}") as error:
        exported.open_exported(str(path))
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_refused(tmp_path, capfd):
    """With nothing of what PyTorch says of it."""
    for suffix in FORMATS:
        path = tmp_path / f"model{suffix}"
        export(path)
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ValueError, match="cannot open it"):
            exported.open_exported(str(path))
    assert capfd.readouterr() == ("", "")


def test_a_pt2_file_of_others_is_refused(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "model.pt2")
    with pytest.raises(ValueError, match="does not tell its classes"):
        exported.open_exported(str(tmp_path / "model.pt2"))
    torch.export.save(program, tmp_path / "other.pt2", extra_files={ssd.METADATA_FILE: json.dumps(["part"])})
    with pytest.raises(ValueError, match="does not tell its classes"):
        exported.open_exported(str(tmp_path / "other.pt2"))


def test_without_onnxruntime_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "model.onnx").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"model\.onnx: .* pip install onnxruntime"):
        exported.open_exported(str(tmp_path / "model.onnx"))
