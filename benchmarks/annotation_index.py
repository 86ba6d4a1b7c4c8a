"""Annotation files: start time and memory of the index, cold and warm, against pycocotools.

    python -m benchmarks.annotation_index [--annotations FILE] [--images N] [--boxes N]

Without --annotations it writes a file of train2017's size: 118,287 images, 860,001 boxes with polygons, about 450 MB.
Each measurement is a process of its own: seconds until the data set of a training run stands (pycocotools: until its
COCO object stands), and the most memory that this took. Then come two workers, forked and then spawned, which read
every annotation: the memory that this adds to a worker, not shared with any other. The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np

import coco
from benchmarks.memory import peak_memory, private_memory
from benchmarks.turns import in_new_process
from coco_utils import CocoTrainDataset

NUM_IMAGES = 118_287
NUM_BOXES = 860_001
NUM_CATEGORIES = 80


def write_coco_like_annotations(path: Path, num_images: int, num_boxes: int) -> None:
    """An annotation file with the fields of COCO's, among them a polygon of about 26 corners for each box."""
    rng = np.random.default_rng(0)
    image_of_box = rng.integers(num_images, size=num_boxes)
    corner = rng.uniform(0, 300, (num_boxes, 2))
    size = rng.uniform(4, 180, (num_boxes, 2))
    boxes = np.concatenate((corner, size), axis=1).round(2).tolist()
    corners = rng.poisson(26, num_boxes).clip(3)
    category_ids = rng.integers(1, 1 + NUM_CATEGORIES, num_boxes).tolist()
    with open(path, "w") as file:
        file.write('{"info": {}, "licenses": [], "images": [')
        for i in range(num_images):
            name = f"{i + 1:012d}.jpg"
            url = f"http://images.cocodataset.org/train2017/{name}"
            image = {"license": 3, "file_name": name, "coco_url": url, "height": 480, "width": 640}
            image |= {"date_captured": "2013-11-14 11:18:45", "flickr_url": url, "id": i + 1}
            file.write((", " if i else "") + json.dumps(image))
        file.write('], "annotations": [')
        for i in range(num_boxes):
            polygon = rng.uniform(0, 480, 2 * corners[i]).round(2).tolist()
            annotation = {"segmentation": [polygon], "area": boxes[i][2] * boxes[i][3], "iscrowd": 0}
            annotation |= {"image_id": int(image_of_box[i]) + 1, "bbox": boxes[i], "category_id": category_ids[i]}
            file.write((", " if i else "") + json.dumps(annotation | {"id": 1000 + i}))
        categories = [{"supercategory": "thing", "id": i, "name": f"thing {i}"} for i in range(1, 1 + NUM_CATEGORIES)]
        file.write(f'], "categories": {json.dumps(categories)}}}')


def start_ours(path: Path, index_dir: Path) -> dict:
    before = peak_memory()
    start = time.perf_counter()
    dataset = CocoTrainDataset(coco.read_annotations(path, index_dir), path.parent, preset=None, seed=0)
    return {"seconds": time.perf_counter() - start, "MiB": peak_memory() - before, "images": len(dataset)}


def start_pycocotools(path: Path) -> dict:
    from pycocotools.coco import COCO

    before = peak_memory()
    start = time.perf_counter()
    coco = COCO(path)
    return {"seconds": time.perf_counter() - start, "MiB": peak_memory() - before, "images": len(coco.imgs)}


def start_worker() -> None:
    global memory_at_start
    memory_at_start = private_memory()


def read_everything(dataset: CocoTrainDataset) -> float:
    """What a loader worker does with annotations, for all images; returns the private memory that it cost in MiB."""
    for row in dataset.rows:
        dataset.annotations.file_name(row)
        coco.objects_of_image(dataset.annotations, row)
    return private_memory() - memory_at_start


def worker_memory(path: Path, index_dir: Path, start_method: str) -> float:
    """MiB that each of two workers of one data set keeps for itself, once it has read every annotation."""
    dataset = CocoTrainDataset(coco.read_annotations(path, index_dir), path.parent, preset=None, seed=0)
    with multiprocessing.get_context(start_method).Pool(2, start_worker) as pool:
        return max(pool.map(read_everything, [dataset, dataset], chunksize=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, help="a file in COCO's format")
    parser.add_argument("--images", type=int, default=NUM_IMAGES, help="of the file that is written without one")
    parser.add_argument("--boxes", type=int, default=NUM_BOXES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, index_dir = args.annotations or Path(folder) / "instances.json", Path(folder) / "index"
        if args.annotations is None:
            write_coco_like_annotations(path, args.images, args.boxes)
        results = {
            "pycocotools": in_new_process(start_pycocotools, path),
            "ours, first start": in_new_process(start_ours, path, index_dir),
            "ours, second start": in_new_process(start_ours, path, index_dir),
        }
        workers = {method: worker_memory(path, index_dir, method) for method in ("fork", "spawn")}
        print(
            f"{path.stat().st_size / 2**20:.0f} MiB of json, {results['ours, first start']['images']} images to train"
        )
    for name, result in results.items():
        print(f"{name:20} {result['seconds']:7.2f} s   {result['MiB']:7.0f} MiB at most")
    ratios = {
        name: results["pycocotools"]["seconds"] / result["seconds"]
        for name, result in results.items()
        if "ours" in name
    }
    for name, ratio in ratios.items():
        print(f"pycocotools / {name:20} {ratio:.1f}")
    for method, memory in workers.items():
        print(f"private memory of a worker ({method}) {memory:.1f} MiB")
    print(json.dumps({"starts": results, "pycocotools / ours": ratios, "private_MiB_per_worker": workers}))


if __name__ == "__main__":
    main()
