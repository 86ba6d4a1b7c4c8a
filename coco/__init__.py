"""Files in COCO's format, and others that become it.

annotations.py    annotation files: COCO's json, and what reads any format
checks.py         what files say: checked entry by entry, mended where no guess is needed, turned into flat arrays
rules.py          what values must be
file_names.py     names of images, and of the files that they mean
index.py          annotations as flat arrays, and the folder that keeps them for all processes and the next start
images.py         image files: opened, decoded, and where they are bad, named or skipped
objects.py        what of the annotations is trained on
scoring.py        COCO's results format, its twelve metrics, and which detections are right; the only room that knows
                  the API of pycocotools and hotcoco
voc_scoring.py    Pascal VOC's way to score
sources.py        a part of a data set, and how its annotations come to all processes
layouts.py        which files a folder holds, found by looking
yolo.py           YOLO's labels
voc.py            Pascal VOC's records
shared_files.py   ``--cache ram``: files in memory that the processes of a machine share
shapes.py         the embedded data set, drawn at first use
"""

from . import scoring, shapes, voc_scoring
from .annotations import agree_on_groups, check_same_classes, parse_annotations, read_annotations
from .images import SUFFIXES, fault_of_image, is_image_name, is_turned, load_image, load_or_skip, load_upright
from .index import CocoAnnotations
from .layouts import find_splits
from .objects import is_object, objects_of_image
from .rules import DataError
from .shared_files import SharedFiles, hold_in_memory
from .sources import Split, open_splits

__all__ = [
    "SUFFIXES",
    "CocoAnnotations",
    "DataError",
    "SharedFiles",
    "Split",
    "agree_on_groups",
    "check_same_classes",
    "fault_of_image",
    "find_splits",
    "hold_in_memory",
    "is_image_name",
    "is_object",
    "is_turned",
    "load_image",
    "load_or_skip",
    "load_upright",
    "objects_of_image",
    "open_splits",
    "parse_annotations",
    "read_annotations",
    "scoring",
    "shapes",
    "voc_scoring",
]
