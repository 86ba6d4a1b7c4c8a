"""Exported files as detectors, which ``evaluate.py --detector`` scores."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import ssd

INPUT_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(uint8)": torch.uint8}
Run = Callable[[Tensor], dict[str, Tensor]]


class ExportedDetector(nn.Module):
    """An exported file in the place of an ``ssd.SSD``: it detects, on the CPU, and has no loss.

    Args:
        run: what the file computes, from images [B, 3, size, size] to outputs by name.
        metadata: of ``ssd.export_model``.
        batch_size: the number of images that it takes, if it takes no other.

    Raises:
        KeyError, TypeError, ValueError: the metadata are not complete.
    """

    device = torch.device("cpu")
    boxes_per_map = ()
    notes = ()

    def __init__(self, run: Run, metadata: dict[str, str], batch_size: int | None = None):
        super().__init__()
        self.run = run
        self.batch_size = batch_size
        self.part = metadata["part"]
        self.names = ssd.EXPORT_OUTPUTS[self.part]
        self.size, self.num_classes = int(metadata["size"]), int(metadata["num_classes"])
        self.classes = [{"label": one["label"], "name": one["name"], **one} for one in json.loads(metadata["classes"])]
        self.thresholds = {name: float(metadata[name]) for name in ("score_thresh", "nms_thresh")}
        self.thresholds |= {name: int(metadata[name]) for name in ("detections_per_img", "topk_candidates")}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs that are of the images; ``default_boxes`` are kept for ``postprocess_detections``."""
        outputs = self.run(images)
        self.default_boxes = outputs.get("default_boxes")
        return {name: outputs[name] for name in self.names if name != "default_boxes"}

    def postprocess_detections(self, outputs: dict[str, Tensor], sizes: Tensor) -> list[dict[str, Tensor]]:
        """As of ``ssd.SSD``."""
        if self.part == "raw":
            found = ssd.find_detections(outputs, self.default_boxes, self.size, **self.thresholds)
        else:
            ssd.check_finite({name: outputs[name] for name in ("boxes", "scores")})
            padded = zip(*(outputs[name] for name in self.names), strict=True)
            found = [
                {"boxes": boxes[:count], "scores": scores[:count], "labels": labels[:count].long()}
                for boxes, scores, labels, count in ((*outputs, int(count)) for *outputs, count in padded)
            ]
        return ssd.resize_boxes(found, self.size, sizes)


def open_exported(path: str) -> ExportedDetector:
    """The detector of a file of ``evaluate.py --export``, or of what other tools have made of it.

    Raises:
        ValueError: it cannot be read or run, or does not tell what an exported file does.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    open_file = {".onnx": open_onnx, ".pt2": open_pt2}.get(Path(path).suffix)
    if open_file is None:
        raise ValueError(f"{path}: --detector takes the files of --export, which end with .onnx or .pt2")
    with ssd.quietly():
        opened = open_file(path)
    try:
        detector = ExportedDetector(opened.run, opened.metadata, opened.batch_size)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path}: does not tell its classes, size and thresholds, as a file of evaluate.py --export does; "
            "if a tool has dropped its metadata, copy them from the file that it was made from"
        ) from None
    expected = ("batch", 3, detector.size, detector.size)
    if opened.input_shape[1:] != expected[1:]:
        raise ValueError(f"{path}: takes images of the shape {opened.input_shape}, not {expected}")
    if missing := {*detector.names} - opened.outputs:
        raise ValueError(f"{path}: has no output {', '.join(sorted(missing))}; tools must keep the names")
    return detector


@dataclass
class Opened:
    """A file that can be run."""

    run: Run
    metadata: dict[str, str]
    input_shape: tuple[int | str, ...]
    outputs: set[str]

    @property
    def batch_size(self) -> int | None:
        """If it is fixed."""
        return self.input_shape[0] if isinstance(self.input_shape[0], int) else None


def open_onnx(path: str) -> Opened:
    ssd.check_installed(["onnxruntime"], f"{path}: to run it")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many kinds, none of which is public
        raise ValueError(f"{path}: onnxruntime cannot open it ({ssd.first_line(error)})") from None
    images_input, *others = session.get_inputs()
    if others or images_input.type not in INPUT_TYPES:
        raise ValueError(f"{path}: has other inputs than one of images, float or uint8")
    dtype = INPUT_TYPES[images_input.type]
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        images = images.round().to(dtype) if dtype == torch.uint8 else images.to(dtype)
        outputs = map(torch.from_numpy, session.run(names, {images_input.name: images.numpy()}))
        return {
            name: output.float() if output.is_floating_point() else output
            for name, output in zip(names, outputs, strict=True)
        }

    return Opened(run, session.get_modelmeta().custom_metadata_map, tuple(images_input.shape), {*names})


def open_pt2(path: str) -> Opened:
    files = {ssd.METADATA_FILE: ""}
    try:
        program = torch.export.load(path, extra_files=files)
        metadata = json.loads(files[ssd.METADATA_FILE] or "{}")
        (images,) = program.example_inputs[0]
        outputs = program.call_spec.out_spec.context
    except Exception as error:  # of damaged content PyTorch makes all kinds
        raise ValueError(f"{path}: PyTorch cannot open it ({ssd.first_line(error)})") from None
    module = program.module()
    # not the module: it refuses eval() of what holds it
    return Opened(lambda images: module(images), metadata, ("batch", *images.shape[1:]), {*(outputs or ())})
