"""``evaluate.py --images``: what was found, image by image, so that a run goes on where another was stopped."""

import json
from collections.abc import Iterable
from pathlib import Path

from .json_lines import add_records, read_records, write_records


class Journal:
    """``detections.jsonl`` in an output folder: first what it is of, then a line for each image that is done.

    Args:
        output_dir: the folder.
        origin: what all detections are of, by the names of flags.
        has_pictures: whether an image is done only once ``pictures`` has it.
    """

    def __init__(self, output_dir: Path, origin: dict, has_pictures: bool):
        self.output_dir = output_dir
        self.path = output_dir / "detections.jsonl"
        self.origin = origin
        self.has_pictures = has_pictures

    def begin(self, names: list[str], go_on: bool) -> list[str]:
        """Begins anew, or if it is to ``go_on``, after what was done before.

        Args:
            names: of all image files.
            go_on: not without asking whether what was done before is of the same origin.

        Returns:
            The names of those that are not done.

        Raises:
            ValueError: what was done before is of another origin.
        """
        origin, *records = read_records(self.path) or [self.origin]
        for flag in self.origin if go_on else ():
            if origin.get(flag) != self.origin[flag]:
                raise ValueError(
                    f"--skip-done: what is in {self.output_dir} was found with {flag} {origin.get(flag)}, this run has "
                    f"{self.origin[flag]}; name another --output-dir, or begin anew without --skip-done"
                )
        done = {one["file_name"]: one for one in records if go_on and self.is_done(one)}
        for record in records:
            if record["file_name"] not in done:
                self.picture_of(record["file_name"]).unlink(missing_ok=True)
        write_records(self.path, [self.origin, *done.values()])
        return [name for name in names if name not in done]

    def is_done(self, record: dict) -> bool:
        is_drawn = not self.has_pictures or self.picture_of(record["file_name"]).exists()
        return is_drawn and not record["fault"]

    def picture_of(self, name: str) -> Path:
        return self.output_dir / "pictures" / f"{name}.png"

    def add(self, records: Iterable[dict]) -> None:
        """Takes what was found in some images: of each ``file_name``, ``fault`` and ``detections``."""
        add_records(self.path, records)

    def finish(self, names: list[str]) -> None:
        """Writes detections.json: of all images, in the order of ``names``."""
        found = {one["file_name"]: one["detections"] for one in read_records(self.path)[1:]}
        results = [{"file_name": name, **one} for name in names for one in found[name]]
        (self.output_dir / "detections.json").write_text(json.dumps(results))
