"""Files of a json object per line, which grow while a run lives and survive its end, whatever it is."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import ssd


def read_records(path: Path) -> Iterator[dict]:
    """What the lines hold, without those that are no object, as one that a crash cut short; none of a missing file."""
    if path.exists():
        with path.open("rb") as file:
            yield from filter(None, map(parse, file))


def parse(line: bytes) -> dict:
    """The object of a line; an empty one where there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def write_records(path: Path, records: Iterable[dict]) -> None:
    """Puts a file of ``records``, which may be read from it, in the place of the one that there is."""
    ssd.write_file((f"{json.dumps(record)}\n".encode() for record in records), path)


def add_records(path: Path, records: Iterable[dict]) -> None:
    """Adds lines to a file, which is open no longer than that: a run that fails leaves nothing open."""
    with path.open("a") as file:
        for record in records:
            print(json.dumps(record), file=file)
