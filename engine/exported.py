"""Exported files as detectors, which ``evaluate.py --detector`` scores."""

import importlib.util
import json
from collections.abc import Callable
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

    def __init__(self, run: Run, metadata: dict[str, str], batch_size: int | None = None):
        super().__init__()
        self.run = run
        self.batch_size = batch_size
        self.part = metadata["part"]
        self.names = {*ssd.EXPORT_OUTPUTS[self.part]}
        self.size, self.num_classes = int(metadata["size"]), int(metadata["num_classes"])
        self.classes = [{"label": one["label"], "name": one["name"], **one} for one in json.loads(metadata["classes"])]
        self.thresholds = {name: float(metadata[name]) for name in ("score_thresh", "nms_thresh")}
        self.thresholds |= {name: int(metadata[name]) for name in ("detections_per_img", "topk_candidates")}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs that are of the images; ``default_boxes`` are kept for ``postprocess_detections``."""
        outputs = self.run(images)
        missing = self.names - outputs.keys()
        if missing:
            raise ValueError(f"the exported file has no output {', '.join(sorted(missing))}")
        self.default_boxes = outputs.pop("default_boxes", None)
        return outputs

    def postprocess_detections(self, outputs: dict[str, Tensor], sizes: Tensor) -> list[dict[str, Tensor]]:
        """As of ``ssd.SSD``."""
        if self.part == "raw":
            found = ssd.postprocess(outputs, self.default_boxes, self.size, **self.thresholds)
        else:
            ssd.check_finite({name: outputs[name] for name in ("boxes", "scores")})
            padded = zip(*(outputs[name] for name in ssd.EXPORT_OUTPUTS[self.part]), strict=True)
            found = [
                {"boxes": boxes[:count], "scores": scores[:count], "labels": labels[:count]}
                for boxes, scores, labels, count in padded
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
    run, metadata, batch_size = open_file(path)
    try:
        return ExportedDetector(run, metadata, batch_size)
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path}: does not tell its classes, size and thresholds, as a file of evaluate.py --export does; "
            "if a tool has dropped its metadata, copy them from the file that it was made from"
        ) from None


def open_onnx(path: str) -> tuple[Run, dict[str, str], int | None]:
    """What an ONNX file computes, its metadata, and its batch size if that is fixed."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise ValueError(f"{path}: to run it, Python needs another package: pip install onnxruntime")
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

    batch_size = images_input.shape[0]
    return run, session.get_modelmeta().custom_metadata_map, batch_size if isinstance(batch_size, int) else None


def open_pt2(path: str) -> tuple[Run, dict[str, str], None]:
    """What a pt2 file computes, and its metadata."""
    files = {ssd.METADATA_FILE: ""}
    try:
        program = torch.export.load(path, extra_files=files)
        metadata = json.loads(files[ssd.METADATA_FILE] or "{}")
    except Exception as error:  # of damaged content PyTorch makes all kinds
        raise ValueError(f"{path}: PyTorch cannot open it ({ssd.first_line(error)})") from None
    module = program.module()
    return lambda images: module(images), metadata, None  # not the module: it refuses eval() of what holds it
