"""``evaluate.py --images``: what was found, image by image, so that a run goes on where another was stopped."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import ssd

from .json_lines import add_records, parse, read_records, write_records

RECORD_KEYS = {"file_name", "file", "fault", "detections"}
LONGEST_NAME = 255 - len(".png.tmp")  # bytes, of most file systems


class Journal:
    """``detections.jsonl`` in an output folder: first what it is of, then a line for each image that is done.

    Args:
        output_dir: the folder.
        origin: what all detections are of, by the names of flags.
        has_pictures: whether an image is done only once ``pictures`` has it.
    """

    def __init__(self, output_dir: Path, origin: dict[str, str], has_pictures: bool):
        self.path = output_dir / "detections.jsonl"
        self.results = output_dir / "detections.json"
        self.pictures = output_dir / "pictures"
        self.origin = origin
        self.has_pictures = has_pictures

    def begin(self, paths: list[Path], go_on: bool) -> dict[Path, str]:
        """Begins anew, or if it is to ``go_on``, after what was done before; the pictures of all else are removed.

        Returns:
            The image files of ``paths`` that are not done, and of each ``describe_file``, for its record.

        Raises:
            ValueError: what was done before is of another origin; or a name is too long for its picture.
        """
        for path in paths if self.has_pictures else ():
            if len(os.fsencode(path.name)) > LONGEST_NAME:
                raise ValueError(f"{path}: its name is too long for that of its picture; use --json-only")
        records = read_records(self.path)
        go_on = go_on and self.has_same_origin(next(records, {}))
        files = {path.name: describe_file(path) for path in paths}
        done = set()

        def kept() -> Iterator[dict]:
            for record in records:
                if go_on and self.is_done(record, files):
                    done.add(record["file_name"])
                    yield record
                elif record.keys() >= RECORD_KEYS:
                    self.picture_of(record["file_name"]).unlink(missing_ok=True)

        self.results.unlink(missing_ok=True)  # it would pass for that of these
        write_records(self.path, itertools.chain([{"origin": self.origin}], kept()))
        left = {path: files[path.name] for path in paths if path.name not in done}
        for path in left:
            self.picture_of(path.name).unlink(missing_ok=True)
        return left

    def has_same_origin(self, first_record: dict) -> bool:
        """Whether what was done before is of ``origin``; not where that is not known, as of a file that is damaged.

        Raises:
            ValueError: it is of another.
        """
        before = first_record.get("origin")
        if not isinstance(before, dict):
            return False
        for flag, value in self.origin.items():
            if before.get(flag) != value:
                raise ValueError(
                    f"--skip-done: what is in {self.path.parent} was found with {flag} {before.get(flag)}, "
                    f"this run has {value}; name another --output-dir, or begin anew without --skip-done"
                )
        return True

    def is_done(self, record: dict, files: dict[str, str]) -> bool:
        """Whether a line is whole, and of a file that is as it was."""
        if not record.keys() >= RECORD_KEYS or record["fault"]:
            return False
        is_drawn = not self.has_pictures or self.picture_of(record["file_name"]).exists()
        return is_drawn and files.get(record["file_name"], record["file"]) == record["file"]

    def picture_of(self, name: str) -> Path:
        return self.pictures / f"{name}.png"

    def add(self, records: Iterable[dict]) -> None:
        """Takes what was found in some images, with ``RECORD_KEYS`` each."""
        add_records(self.path, records)

    def finish(self, names: list[str]) -> None:
        """Writes detections.json: of all images, in the order of ``names``, with one of them in memory at a time."""
        places = {}
        with self.path.open("rb") as file:
            place = file.tell()
            for line in file:
                places[parse(line).get("file_name")] = place
                place += len(line)

            def parts() -> Iterator[bytes]:
                separator = "["
                for name in names:
                    file.seek(places[name])
                    for found in parse(file.readline())["detections"]:
                        yield f"{separator}{json.dumps({'file_name': name, **found})}".encode()
                        separator = ",\n"
                yield b"]" if separator != "[" else b"[]"

            ssd.write_file(parts(), self.results)


def describe_file(path: str | Path) -> str:
    """What tells a file from another that has taken its place."""
    status = Path(path).stat()
    return f"{status.st_size} bytes, {status.st_mtime_ns} ns"
