"""Files in COCO's format, and others that become it.

annotations.py    annotation files: parsed and checked entry by entry
index.py          annotations as flat arrays, and the folder that keeps them for all processes and the next start
images.py         image files: opened, decoded, and where they are bad, named or skipped
objects.py        what of the annotations is trained on
scoring.py        COCO's results format, its twelve metrics, and which detections are right; the only room that knows
                  the API of pycocotools and hotcoco
sources.py        which files a data set consists of
shared_files.py   ``--cache ram``: files in memory that the processes of a machine share
shapes.py         the embedded data set, drawn at first use
"""

from . import scoring, shapes
from .annotations import DataError, check_same_classes, parse_annotations, read_annotations
from .images import fault_of_image, load_image, load_or_skip, open_image, to_pixels
from .index import CocoAnnotations
from .objects import is_object, objects_of_image
from .shared_files import SharedFiles, hold_in_memory
from .sources import Split, find_split

__all__ = [
    "CocoAnnotations",
    "DataError",
    "SharedFiles",
    "Split",
    "check_same_classes",
    "fault_of_image",
    "find_split",
    "hold_in_memory",
    "is_object",
    "load_image",
    "load_or_skip",
    "objects_of_image",
    "open_image",
    "parse_annotations",
    "read_annotations",
    "scoring",
    "shapes",
    "to_pixels",
]
