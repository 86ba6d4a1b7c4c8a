"""How many objects of a data set the default boxes find, as guessed and by the rules that are published.

    python -m benchmarks.default_boxes --annotations instances_val2017.json

An object that no default box overlaps with an IoU of 0.5 is matched by a single one only, the best. Small are objects
with less than a hundredth of their image's area. "equation 4" of the paper is torchvision's choice where no scales are
given.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import coco
import ssd
from ssd.default_boxes import CAFFE_DEFAULT_BOXES, DefaultBoxGenerator

GRIDS = {300: (38, 19, 10, 5, 3, 1), 512: (64, 32, 16, 8, 4, 2, 1)}


def read_boxes(path: Path) -> Tensor:
    """All boxes with an area but crowds, as fractions of their images: [objects, 4], xyxy."""
    annotations = coco.read_annotations(path)
    height, width = annotations.sizes.repeat(np.diff(annotations.offsets), axis=0).T
    x, y, box_width, box_height = annotations.boxes.T
    boxes = np.stack((x / width, y / height, (x + box_width) / width, (y + box_height) / height), axis=1)
    return torch.from_numpy(boxes[(box_width > 0) & (box_height > 0) & ~annotations.is_crowd]).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True)
    boxes = read_boxes(parser.parse_args().annotations)
    is_small = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) < 0.01
    print(f"{len(boxes)} objects, {int(is_small.sum())} of them small")
    for size, sides in GRIDS.items():
        grids = [(side, side) for side in sides]
        caffe = CAFFE_DEFAULT_BOXES["coco"][size]
        rules = {"Caffe's": caffe, "guessed": ssd.guess_default_boxes(grids)}
        rules["equation 4"] = DefaultBoxGenerator(caffe.aspect_ratios)
        for name, generator in rules.items():
            iou = ssd.pairwise_iou(boxes * size, generator((size, size), grids))
            best = iou.amax(dim=1)
            found, each = best >= 0.5, int((iou >= 0.5).sum()) / len(boxes)
            share, share_of_small = found.float().mean(), found[is_small].float().mean()
            print(
                f"{size} pixels, {name:<11} found {share:6.1%}, small {share_of_small:6.1%}; "
                f"mean of the best IoU {best.mean():.3f}; {each:4.1f} default boxes each"
            )


if __name__ == "__main__":
    main()
