"""Evaluation from decoding files to metrics: images per second of evaluate.py and of torchvision's references.

    python -m benchmarks.evaluation --data-path DIR [--images N] [--batch-size N ...] [--workers N] [--rounds N]
                                    [--weights FILE | --weights-backbone FILE]

DIR is a folder in COCO's layout; its validation images are used, or the first --images of them. Both sides are
SSD300-VGG16 with the same weights on the CPU: --weights are those of a whole model, --weights-backbone of VGG16 under
random heads; the default is random.

Ours is what evaluate.py does, scored by pycocotools. torchvision's is its ssd300_vgg16, which resizes by itself, in
the loop of its references: images of their original size, one at a time, each scored by pycocotools as it comes. That
loop lets PyTorch have one thread; it is measured like this and with all threads.

Each variant has a process of its own and as many loader workers; they take turns, and the fastest round counts, since a
noisy machine only adds to it. Reading annotations and making the model are not in it. The processor time is that of the
process with the model, without loader workers. The last line is one JSON object.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection
from torchvision.models.detection import ssd300_vgg16
from torchvision.transforms.v2 import functional as F

import coco
import evaluate
import ssd
from benchmarks.torchvision_scorer import PerImageScorer, largest_difference
from benchmarks.turns import take_turns
from coco import scoring
from engine import execution, flags, inference

SEED = 0
AS_WRITTEN, ALL_THREADS = "torchvision", "torchvision, all threads"

run: Callable[[], dict]  # of this process: the metrics, and how many detections there were


class ReferenceDataset(CocoDetection):
    """Images at their original size, as floats of 0 to 1, with boxes and labels, which nobody reads.

    The references decode the masks as well, in one of their two versions; that is left out.
    """

    def load(self, index: int) -> tuple[Image, Tensor, Tensor]:
        """An image, and of what is no crowd in it the boxes, float32 [G, 4], xyxy, and the labels, int64 [G]."""
        image, objects = super().__getitem__(index)
        objects = [one for one in objects if one["iscrowd"] == 0]
        boxes = torch.tensor([one["bbox"] for one in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return image, boxes, torch.tensor([one["category_id"] for one in objects], dtype=torch.int64)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        image, boxes, labels = self.load(index)
        target = {"image_id": self.ids[index], "boxes": boxes, "labels": labels}
        return F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True), target


def collate_to_tuples(samples: list[tuple]) -> tuple:
    return tuple(zip(*samples, strict=True))


def to_results(image_id: int, detections: dict[str, Tensor]) -> list[dict]:
    """An image's detections in COCO's results format."""
    start, end = detections["boxes"].split(2, dim=1)
    columns = (torch.cat((start, end - start), dim=1), detections["scores"], detections["labels"])
    return [
        {"image_id": image_id, "bbox": box, "score": score, "category_id": label}
        for box, score, label in zip(*(column.tolist() for column in columns), strict=True)
    ]


@torch.inference_mode()
def run_reference(model: torch.nn.Module, loader: DataLoader, num_threads: int, device: torch.device) -> dict:
    """The evaluation of torchvision's references/detection/engine.py, in our words."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    model.eval()
    scorer, num_detections = PerImageScorer(loader.dataset.coco), 0
    for images, targets in loader:
        for target, detections in zip(targets, model([image.to(device) for image in images]), strict=True):
            results = to_results(target["image_id"], detections)
            scorer.update(target["image_id"], results)
            num_detections += sum(one["category_id"] in scorer.coco.cats for one in results)
    metrics = scorer.metrics()
    torch.set_num_threads(threads_before)
    return metrics | {"detections": num_detections}


def write_annotations(source: Path, num_images: int | None, path: Path) -> None:
    """An annotation file of the first images of another one, by default of all."""
    content = json.loads(source.read_text())
    content["images"] = content["images"][:num_images]
    image_ids = {image["id"] for image in content["images"]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in image_ids]
    path.write_text(json.dumps(content))


def make_model(weights: str | None, weights_backbone: str | None, num_classes: int) -> ssd.SSD:
    torch.manual_seed(SEED)
    return ssd.get_model("ssd300_vgg16", weights=weights, weights_backbone=weights_backbone, num_classes=num_classes)


def prepare_ours(model: ssd.SSD, images_dir: Path, annotations_file: Path, workers: int, batch_size: int) -> Callable:
    model = model.to(memory_format=execution.memory_format(torch.device("cpu")))
    annotations = coco.read_annotations(annotations_file)
    settings = ["--checkpoint", "", "--batch-size", str(batch_size), "--workers", str(workers)]
    args = evaluate.get_args_parser().parse_args(settings)
    dataset = evaluate.make_validation_set(args, model, annotations, images_dir)
    infer = evaluate.make_infer(args, torch.device("cpu"))

    def run_ours() -> dict:
        found = infer(model, dataset, annotations.category_id_of)
        metrics = inference.score(annotations, found, args.scorer).metrics
        return {name: metrics[name] for name in scoring.METRICS} | {"detections": len(found.detections)}

    return run_ours


def prepare_reference(
    model: ssd.SSD, images_dir: Path, annotations_file: Path, workers: int, num_threads: int
) -> Callable:
    peer = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=model.num_classes)
    peer.load_state_dict(model.state_dict())
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = ReferenceDataset(images_dir, annotations_file)
    loader = DataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=collate_to_tuples)
    return lambda: run_reference(peer, loader, num_threads, torch.device("cpu"))


def start(
    prepare: Callable,
    weights: tuple[str | None, str | None],
    images_dir: Path,
    annotations_file: Path,
    workers: int,
    setting: int,
) -> None:
    """Ends with a first evaluation, which is not measured."""
    global run
    num_classes = coco.read_annotations(annotations_file).num_classes
    run = prepare(make_model(*weights, num_classes), images_dir, annotations_file, workers, setting)
    run()


def measure() -> dict:
    begin, begin_of_work = time.perf_counter(), time.process_time()
    result = run()
    seconds, work = time.perf_counter() - begin, time.process_time() - begin_of_work
    return {"seconds": seconds, "processor_seconds": work, "result": result}


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True, help="folder in COCO's layout")
    parser.add_argument("--images", type=flags.positive, help="take the first ones only")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--weights", help="of the whole model: a file, or SSD300_VGG16_Weights.COCO_V1")
    weights.add_argument("--weights-backbone", help="of VGG16: a file, or VGG16_Weights.IMAGENET1K_FEATURES")
    parser.add_argument("-b", "--batch-size", type=flags.positive, nargs="+", default=[8], help="of ours")
    parser.add_argument("-j", "--workers", type=flags.positive, default=2)
    parser.add_argument("--rounds", type=flags.positive, default=3)
    return parser.parse_args()


def list_variants(args: argparse.Namespace, annotations_file: Path) -> dict[str, tuple]:
    """name -> the arguments of ``start``."""
    common = ((args.weights, args.weights_backbone), args.data_path / "val2017", annotations_file, args.workers)
    variants = {f"ours, batch {size}": (prepare_ours, *common, size) for size in args.batch_size}
    for name, num_threads in ((AS_WRITTEN, 1), (ALL_THREADS, torch.get_num_threads())):
        variants[name] = (prepare_reference, *common, num_threads)
    return variants


def main() -> None:
    args = get_args()
    with tempfile.TemporaryDirectory() as folder:
        annotations_file = Path(folder) / "instances.json"
        write_annotations(args.data_path / "annotations/instances_val2017.json", args.images, annotations_file)
        num_images = len(coco.read_annotations(annotations_file).image_ids)
        threads = torch.get_num_threads()
        print(f"{num_images} images, {args.workers} loader workers, {threads} threads, torch {torch.__version__}")
        rounds = take_turns(start, measure, list_variants(args, annotations_file), args.rounds)
    rates = {name: num_images / min(one["seconds"] for one in results) for name, results in rounds.items()}
    work = {name: min(one["processor_seconds"] for one in ones) / num_images for name, ones in rounds.items()}
    results = {name: ones[0]["result"] for name, ones in rounds.items()}
    for name, rate in rates.items():
        found = f"AP {results[name]['AP']:.6f}, {results[name]['detections']} detections"
        print(f"{name:26} {rate:6.2f} images/s, {work[name]:.3f} s of processor time per image   {found}")
    ratios, differences = {}, {}
    for ours in (name for name in rates if name.startswith("ours")):
        for peer in (AS_WRITTEN, ALL_THREADS):
            ratios[f"{ours} / {peer}"] = rates[ours] / rates[peer]
            differences[f"{ours}; {peer}"] = difference = largest_difference(results[ours], results[peer])
            print(f"{ours} / {peer}: {rates[ours] / rates[peer]:.2f}; the figures differ by {difference:.1e} at most")
    report = {"images": num_images, "workers": args.workers, "threads": threads, "images_per_second": rates}
    report["processor_seconds_per_image"] = work
    print(json.dumps(report | {"ratios": ratios, "differences": differences, "results": results}))


if __name__ == "__main__":
    main()
