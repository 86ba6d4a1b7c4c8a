"""Pascal VOC's data sets: a folder with an XML file for each image, and text files that list the images of a set.

Boxes become COCO's: VOC counts pixels from 1 and includes the last, so that its xmin is less by one here. Objects that
are marked as difficult become crowds, which are not trained on and do not count in COCO's scores.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from .checks import Content
from .file_names import comparable
from .images import SUFFIXES
from .rules import DataError, as_integer, is_box, is_text
from .sources import Split

# section 4 of http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
LISTS = "ImageSets/Main"


@dataclass(frozen=True)
class VocSets:
    """Sets of images of VOC folders: pairs of a folder in ``root`` and the name of a set; None for all its images.

    The classes are VOC's, or those that the folders have where these are others.
    """

    root: Path
    sets: tuple[tuple[str, str | None], ...]

    @property
    def path(self) -> Path:
        """Of the list of images; for several of them no file, but a name to tell them by."""
        folders, names = zip(*self.sets, strict=True)
        folder = self.root / "+".join(folders)
        return folder / LISTS / f"{names[0]}.txt" if names[0] else folder / "Annotations"

    def load(self) -> Content:
        folders = voc_folders(self.root)
        files = {folder: files_by_name(folder / "Annotations", (".xml",)) for folder in folders}
        records = {file: read_record(file) for named in files.values() for file in named.values()}
        names = class_names(folders, records.values())
        lists = [self.root / folder / LISTS / f"{name}.txt" for folder, name in self.sets if name]
        read = [*lists, *(folder / part for folder in folders for part in ("Annotations", "JPEGImages")), *records]
        content = Content([], [{"id": i, "name": name} for i, name in enumerate(names, start=1)], [], read, is_voc=True)
        for folder, name in self.sets:
            folder = self.root / folder
            images = files_by_name(folder / "JPEGImages", SUFFIXES)
            for image_name in files[folder] if name is None else list_images(folder / LISTS / f"{name}.txt"):
                file = files[folder].get(comparable(image_name), folder / "Annotations" / f"{image_name}.xml")
                record = records.get(file, f"{file}: no such file, though {self.path} lists it")
                if isinstance(record, str):
                    content.faults.append(record)
                else:
                    image = images.get(comparable(image_name), folder / "JPEGImages" / f"{image_name}.jpg")
                    add_image(content, image.relative_to(self.root).as_posix(), file, record, names)
        return content


def find_splits(root: Path) -> dict[str, Split]:
    """The splits of a VOCdevkit, of the folder that holds it, or of one folder with VOC's layout.

    Trained on are the sets trainval of all years, validated on is that year's test that has one; without a test the
    sets train and val. Without sets the data come in one.
    """
    if (root / "VOCdevkit").is_dir():
        root /= "VOCdevkit"
    folders = [folder.relative_to(root).as_posix() for folder in voc_folders(root)]

    def sets(name: str) -> tuple[tuple[str, str], ...]:
        return tuple((folder, name) for folder in folders if (root / folder / LISTS / f"{name}.txt").is_file())

    test = sets("test")[:1]  # of 2012 the annotations are not published
    pairs = [(sets("trainval"), test), (sets("train"), sets("val")), (sets("train"), test)]
    for train, val in pairs:
        if train and val:
            return {"train": Split(root, VocSets(root, train)), "val": Split(root, VocSets(root, val))}
    whole = sets("trainval") or sets("default") or tuple((folder, None) for folder in folders)
    return {"train": Split(root, VocSets(root, whole))} if whole else {}


def voc_folders(root: Path) -> list[Path]:
    """Those with VOC's layout: ``root`` itself, or the years of a VOCdevkit."""
    candidates = [root, *sorted(root.glob("VOC20*"))]
    return [folder for folder in candidates if (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir()]


def read_record(file: Path) -> ElementTree.Element | str:
    """The content of an XML file; a text, what is wrong, if it has none."""
    try:
        record = ElementTree.parse(file).getroot()
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        return f"{file}: cannot be read as XML: {error}"
    if record.tag != "annotation":
        return f"{file}: is no record of Pascal VOC: it begins with {record.tag}"
    return record


def class_names(folders: list[Path], records: Iterable[ElementTree.Element | str]) -> list[str]:
    """VOC's classes, or those that the objects of folders with other data have."""
    found = {
        one.findtext("name", "").strip()
        for record in records
        if not isinstance(record, str)
        for one in record.iter("object")
    }
    is_voc = all(folder.resolve().name.startswith("VOC20") for folder in folders) and found <= {*CLASSES}
    return list(CLASSES) if is_voc else sorted(filter(is_text, found))


def list_images(path: Path) -> list[str]:
    """The names, without suffix, of the images of a set."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def files_by_name(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files in a folder that end in one of ``suffixes``, by their names without it; hidden ones are left out."""
    found = {}
    for file in sorted(folder.glob("**/*")):
        name = file.relative_to(folder)
        if file.suffix.lower() in suffixes and not any(part.startswith(".") for part in name.parts):
            found.setdefault(comparable(name.with_suffix("").as_posix()), file)
    return found


def add_image(content: Content, name: str, file: Path, record: ElementTree.Element, names: list[str]) -> None:
    image_id = content.add_image(
        name, *(as_number(record.findtext(f"size/{side}", "")) for side in ("width", "height"))
    )
    for number, one in enumerate(record.findall("object"), start=1):
        try:
            content.add_box(image_id, *read_object(one, names))
        except ValueError as error:
            content.faults.append(f"{file}: object {number} {error}")


def as_number(text: str):
    """An integer, where it stands for one, also as 1.0; the text itself where it is no number."""
    try:
        return as_integer(float(text))
    except ValueError:
        return text


def read_object(one: ElementTree.Element, names: list[str]) -> tuple[int, list[float], int]:
    """Category id, box xywh and difficulty of an object.

    Raises:
        ValueError: one of them is missing, or cannot be; the text says which.
    """
    name = one.findtext("name", "").strip()
    if name not in names:
        raise ValueError(f"has the name {name!r}; it must be a text in one line")
    corners = []
    for corner in ("xmin", "ymin", "xmax", "ymax"):
        text = one.findtext(f"bndbox/{corner}", "").strip()
        try:
            corners.append(float(text))
        except ValueError:
            raise ValueError(f"has the {corner} {text!r}; it must be a number") from None
    left, top, right, bottom = corners
    box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
    if not is_box(box):
        raise ValueError(f"has the corners {corners}; they must be finite, and xmax and ymax not before xmin and ymin")
    difficult = as_number(one.findtext("difficult", "0").strip() or "0")
    if difficult not in (0, 1):
        raise ValueError(f"has difficult {difficult!r}; it must be 0 or 1")
    return 1 + names.index(name), box, difficult
