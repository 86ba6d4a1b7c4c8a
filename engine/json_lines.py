"""Files of a json object per line, which grow while a run lives and survive its end, whatever it is."""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path


def read_records(path: Path) -> list[dict]:
    """What the lines hold, without one that a crash cut short; none of a file that is missing."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def write_records(path: Path, records: Iterable[dict]) -> None:
    """Puts a file of ``records`` in the place of the one that there is."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(temporary, path)


def add_records(path: Path, records: Iterable[dict]) -> None:
    """Adds lines to a file, which is open no longer than that: a run that fails leaves nothing open."""
    with path.open("a") as file:
        for record in records:
            print(json.dumps(record), file=file)
