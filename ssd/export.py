"""A model as a file that runs without this repository: ONNX, or PyTorch's pt2.

Dimension key: B images, A default boxes, C classes including the background, K = C - 1, T candidates per class,
N detections per image, padded. Boxes are xyxy in pixels of the network input.
"""

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from .files import write_file
from .model import SSD

EXPORT_OUTPUTS = {
    "detections": ("boxes", "scores", "labels", "counts"),
    "raw": ("cls_logits", "bbox_regression", "default_boxes"),
}
PACKAGES = {".onnx": ("onnx", "onnxscript"), ".pt2": ()}
OPSET = 18  # of ONNX; what others read is often years behind
METADATA_FILE = "metadata.json"  # in a pt2 file
# scores [..., A], number -> the highest [..., number] and their places; of equal ones the first
Topk = Callable[[Tensor, int], tuple[Tensor, Tensor]]
# boxes [G, T, 4], scores [G, T], thresholds of score and IoU, how many to keep of a group -> int64 [M, 2]
Suppress = Callable[[Tensor, Tensor, float, float, int], Tensor]


class RawPart(nn.Module):
    """What ``SSD.forward`` returns, and ``default_boxes`` [A, 4], which the offsets are relative to."""

    def __init__(self, model: SSD):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {**self.model(images), "default_boxes": self.model.default_boxes.clone()}


class DetectionsPart(nn.Module):
    """The model and its post-processing, with outputs of the same shapes whatever is found.

    What ``find_detections`` does with loops as long as there are candidates is here of a fixed size, but for the
    suppression: no tensor's shape decides what is computed.
    """

    def __init__(self, model: SSD, topk: Topk, suppress: Suppress):
        super().__init__()
        self.model = model
        self.topk = topk
        self.suppress = suppress

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """
        Args:
            images: float32 [B, 3, size, size], RGB with values of 0 to 255.

        Returns:
            ``boxes`` [B, N, 4], ``scores`` [B, N] and ``labels`` int64 [B, N], best first and then zeros, and
            ``counts`` int64 [B], how many were found. Where a prediction is not finite, all scores of its image are
            nan.
        """
        model = self.model
        outputs = model(images)
        boxes = model.box_coder.decode(outputs["bbox_regression"], model.default_boxes).clamp(0, model.size)
        scores = outputs["cls_logits"].softmax(dim=-1)[..., 1:].mT  # [B, K, A]
        num_images, num_classes, num_boxes = scores.shape
        num_candidates = min(model.topk_candidates, num_boxes)
        scores, places = self.topk(scores, num_candidates)  # [B, K, T]
        boxes = take(boxes, places.flatten(1)).view(-1, num_candidates, 4)  # [B * K, T, 4]
        scores = scores.flatten(0, 1)  # [B * K, T]
        kept = self.suppress(boxes, scores, model.score_thresh, model.nms_thresh, model.detections_per_img)
        kept = kept[:, 0] * num_candidates + kept[:, 1]
        scores = scores.flatten()
        scores = torch.zeros_like(scores).scatter(0, kept, scores[kept]).view(num_images, -1)  # [B, K * T]
        # of a prediction that is nan or infinite, which no threshold lets through, all scores of its image tell
        scores = scores + sum((0 * output).flatten(1).sum(dim=1, keepdim=True) for output in outputs.values())
        scores = F.pad(scores, (0, max(model.detections_per_img - num_classes * num_candidates, 0)))
        scores, order = self.topk(scores, model.detections_per_img)  # [B, N]
        is_found = scores > 0
        order = order * is_found
        labels = torch.div(order, num_candidates, rounding_mode="trunc") + 1
        return {
            "boxes": take(boxes.view(num_images, -1, 4), order) * is_found[..., None],
            "scores": scores,
            "labels": labels * is_found,
            "counts": is_found.sum(dim=1),
        }


def take(boxes: Tensor, places: Tensor) -> Tensor:
    """Of boxes [B, A, 4] those at ``places`` [B, N]: [B, N, 4]."""
    return boxes.gather(1, places[..., None].expand(-1, -1, 4))


def stable_topk(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """``scores.topk(number)``, of equal scores the first, which PyTorch leaves open and ONNX does not."""
    # Over all places this grows to less than what two scores of 32 bits differ by, which are 0.001 or more.
    handicap = torch.arange(scores.shape[-1], dtype=torch.float64, device=scores.device) * 2.0**-49
    places = (scores.double() - handicap).topk(number).indices
    return scores.gather(-1, places), places


def suppress_with_torchvision(
    boxes: Tensor, scores: Tensor, score_thresh: float, iou_thresh: float, most_kept: int
) -> Tensor:
    """Of each group, the boxes that no better one of it overlaps too much, among those with a score over the threshold.

    Groups are moved apart in float64, as in ``ssd/postprocess.py``.

    Args:
        boxes: [G, T, 4], not negative.
        scores: [G, T].
        score_thresh: scores up to this are dropped.
        iou_thresh: IoU over which the lower scored of two boxes of a group is.
        most_kept: which a group may have; here all are kept, since more do no harm.

    Returns:
        int64 [M, 2]: group and place in it.
    """
    group, place = (scores > score_thresh).nonzero(as_tuple=True)
    shifted = boxes[group, place].double() + ((boxes.max().double() + 1) * group)[:, None]
    # torchvision tells the tracer that two boxes are kept at least: two that are always, after all others
    spare = shifted.new_tensor([[-2, -2, -1, -1], [-4, -4, -3, -3]])
    scores = F.pad(scores[group, place].double(), (0, 2), value=-1)
    kept = nms(torch.cat((shifted, spare)), scores, iou_thresh)[:-2]
    return torch.stack((group[kept], place[kept]), dim=1)


@torch.library.custom_op("ssd::suppress", mutates_args=())
def suppress_as_one_operator(
    boxes: Tensor, scores: Tensor, score_thresh: float, iou_thresh: float, most_kept: int
) -> Tensor:
    """``suppress_with_torchvision`` as one node of a graph, which ``suppress_with_onnx`` takes the place of."""
    return suppress_with_torchvision(boxes, scores, score_thresh, iou_thresh, most_kept)


@suppress_as_one_operator.register_fake
def _(boxes: Tensor, scores: Tensor, score_thresh: float, iou_thresh: float, most_kept: int) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(), 2), dtype=torch.int64)


def suppress_with_onnx(boxes, scores, score_thresh: float, iou_thresh: float, most_kept: int):
    """The same with ONNX's operator, to which each group is an image with one class."""
    from onnxscript import opset18 as op

    limits = (op.Constant(value_ints=[most_kept]), *(op.Constant(value_floats=[x]) for x in (iou_thresh, score_thresh)))
    selected = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, op.Constant(value_ints=[1])), *limits)
    return op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)  # without the class, which is 0


def check_export_target(path: str | Path) -> None:
    """Raises ValueError unless ``path`` ends as a format does whose packages are there."""
    suffix = Path(path).suffix
    if suffix not in PACKAGES:
        raise ValueError(f"{path}: the name of an exported file ends with {' or '.join(PACKAGES)}")
    check_installed(PACKAGES[suffix], f"{path}: to write it")


def check_installed(packages: Iterable[str], purpose: str) -> None:
    """Raises ValueError where Python lacks some of the packages that it needs for ``purpose``."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{purpose}, Python needs more packages: pip install {' '.join(missing)}")


def export_model(model: SSD, path: str | Path, part: str, classes: list[dict]) -> None:
    """Writes a model, on a CPU and in ``eval`` mode, for batches of any size.

    Args:
        model: what is exported.
        path: a file that ends with ``.onnx`` or ``.pt2``.
        part: a key of ``EXPORT_OUTPUTS``; the file has these outputs.
        classes: ``label`` and ``name`` of each, and ``id``, that of its category, if it is known; for the metadata.

    Raises:
        ValueError: the name has another ending, or a package is missing.
        OSError: the file cannot be written; an earlier one is as it was.
    """
    check_export_target(path)
    metadata = describe(model, part, classes)
    to_bytes = to_onnx if Path(path).suffix == ".onnx" else to_pt2
    with quietly():
        content = to_bytes(model, part, metadata)
    write_file([content], path)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Where PyTorch's exporters, and what reads their files, talk of themselves; what is amiss they raise too."""
    logging.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def describe(model: SSD, part: str, classes: list[dict]) -> dict[str, str]:
    """What a program must know of the file: numbers as texts, and ``classes`` as json."""
    size = model.size
    return {
        "part": part,
        "input": f"float32 [batch, 3, {size}, {size}]: RGB, 0 to 255, the whole image resized without antialiasing",
        "size": str(size),
        "num_classes": str(model.num_classes),
        "input_scaling": f"{model.input_scaling}, within the model",
        "classes": json.dumps(classes),
        **{name: str(value) for name, value in model.thresholds.items()},
    }


def trace(model: SSD, part: str, topk: Topk, suppress: Suppress) -> torch.export.ExportedProgram:
    """The graph of a part, for any number of images."""
    module = RawPart(model) if part == "raw" else DetectionsPart(model, topk, suppress)
    images = torch.zeros(2, 3, model.size, model.size)  # of one image PyTorch would take the number for a constant
    with torch.no_grad():
        program = torch.export.export(module.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with the names of folders here
    return program


def to_pt2(model: SSD, part: str, metadata: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    program = trace(model, part, stable_topk, suppress_with_torchvision)
    torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(metadata)})
    return buffer.getvalue()


def to_onnx(model: SSD, part: str, metadata: dict[str, str]) -> bytes:
    program = torch.onnx.export(
        trace(model, part, torch.topk, torch.ops.ssd.suppress),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["images"],
        output_names=EXPORT_OUTPUTS[part],
        dynamic_shapes=({0: "batch"},),
        custom_translation_table={torch.ops.ssd.suppress.default: suppress_with_onnx},
    )
    content = program.model_proto
    for node in content.graph.node:  # where in whose files it comes from
        node.ClearField("metadata_props")
    for key, value in metadata.items():
        content.metadata_props.add(key=key, value=value)
    return content.SerializeToString()
