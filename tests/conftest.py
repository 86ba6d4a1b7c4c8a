import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator as TorchvisionGenerator

import evaluate
from coco import shapes
from engine import inference

ROOT = Path(__file__).parent.parent


SMALL = ["--model", "ssd300_resnet18", "--weights-backbone", "none", "--device", "cpu", "--batch-size", "3"]
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


def annotation(annotation_id: int, image_id: int = 1, category_id: int = 3, bbox=(10, 10, 20, 20), **fields) -> dict:
    area = bbox[2] * bbox[3]
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(bbox),
        "area": area,
    } | fields


def image(image_id: int, width: int = 100, height: int = 80) -> dict:
    return {"id": image_id, "file_name": f"{image_id}.png", "width": width, "height": height}


def pycocotools_stats(annotation_file, results_file) -> list[float]:
    """What plain pycocotools makes of two files, -1 where there is nothing to measure."""
    truth = COCO(str(annotation_file))
    evaluator = COCOeval(truth, truth.loadRes(str(results_file)), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator.stats.tolist()


@pytest.fixture
def write(tmp_path):
    """Writes an annotation file and returns its path."""

    def write_file(annotations: list[dict], images=None, categories=CATEGORIES):
        images = [image(1), image(2), image(3)] if images is None else images
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        return path

    return write_file


@pytest.fixture(scope="session")
def data_path(tmp_path_factory) -> Path:
    """A tiny data set in COCO's layout: 12 images to train on, 7 to validate on."""
    path = tmp_path_factory.mktemp("data") / "shapes"
    shapes.draw_data_set(path, num_images={"train2017": 12, "val2017": 7})
    return path


def pytest_configure():
    # Signals that pytest ignores, as one does that a shell starts in the background, would not stop a run either.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # One test per core is faster than one after the other on all of them.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # In PyTorch's cache of compiled graphs those for other instructions pass for one's own, and crash: after a run with
    # ATEN_CPU_CAPABILITY=avx2 in one without, or where machines share a folder.
    folder = f"torchinductor_{os.getuid()}_{torch.backends.cpu.get_cpu_capability()}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), folder)  # PyTorch has set it by now


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@contextlib.contextmanager
def float64():
    """Whatever is made here, or cast by ``float()``, has 64 bits.

    There, rounding is too small to hide a fault, to change the order of two scores, or to move a number over a limit,
    on any CPU: between equal computations results may differ by 1e-13 of their size, not by 1e-5 as in 32 bits.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def use_float64(generator: TorchvisionGenerator) -> None:
    """Torchvision's default boxes, whose sides it would have in 32 bits."""
    generator._wh_pairs = generator._generate_wh_pairs(len(generator.aspect_ratios), dtype=torch.float64)


def launcher(processes: int) -> list[str]:
    """What starts a script in so many processes."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(status.parent.name))
        except OSError:
            continue
    return found


def infer(args, model, annotations, images_dir) -> inference.Inference:
    """What evaluate.py does with the images of the annotations, as ``args`` say."""
    dataset = evaluate.make_validation_set(args, model, annotations, images_dir)
    return evaluate.make_infer(args, torch.device("cpu"))(model, dataset, annotations.category_id_of)


@pytest.fixture(scope="session")
def run():
    """Runs a script as a user does, and returns the finished process; ``processes`` starts it under torchrun."""

    def run_script(*command, processes: int = 1, fails: bool = False, timeout=600) -> subprocess.CompletedProcess:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path} | ({"OMP_NUM_THREADS": "1"} if processes > 1 else {})
        command = [*launcher(processes), *map(str, command)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment)
        assert (result.returncode != 0) == fails, result.stdout + result.stderr
        return result

    return run_script
