"""What values of annotation and results files must be, and what is wrong with those that are not."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # control characters, line ends, surrogates
INTEGER = re.compile(r"\s*[+-]?\d{1,15}\s*", re.ASCII)


class DataError(ValueError):
    """A fault in the user's data, in one line that names the file, image or annotation and the remedy.

    A loader worker's exception is raised again in the main process with a traceback for message; only the line counts.
    """

    def __init__(self, message: str):
        if message.startswith("Caught DataError in "):
            message = message.rpartition("DataError: ")[2].strip()
        super().__init__(message)


class Rule(NamedTuple):
    """What a field must hold.

    Args:
        is_valid: tells whether a value will do.
        expected: what that asks for, in words.
        mend: what a value that will not do stands for; it returns the value itself where it does not know.
        note: what is said of mended values, of which ``{}`` is an example.
    """

    is_valid: Callable[[object], bool]
    expected: str
    mend: Callable[[object], object] = lambda value: value
    note: str = ""


def as_integer(value):
    """The integer that a float or a text such as 3.0 or "3" stands for; any other value as it is."""
    if type(value) is float and value.is_integer():
        return int(value)
    if type(value) is str and INTEGER.fullmatch(value):
        return int(value)
    return value


def unseen(is_valid: Callable[[object], bool]) -> Callable[[object], bool]:
    """A rule that holds for valid values, for each the first time."""
    seen = set()

    def is_first(value) -> bool:
        is_new = is_valid(value) and value not in seen
        if is_new:
            seen.add(value)
        return is_new

    return is_first


def is_integer(value) -> bool:
    return type(value) is int and 0 <= value < 10**15  # float64 holds it, and so do the scorers


def is_annotation_id(value) -> bool:
    return is_integer(value) and value != 0


def is_any_id(value) -> bool:
    """An annotation's, which may be anything that programs number things by, or missing."""
    return type(value) in (int, str) or value is None or type(as_integer(value)) is int


def is_side(value) -> bool:
    return is_integer(value) and value > 0


def is_text(value) -> bool:
    return type(value) is str and value != "" and not UNPRINTABLE.search(value)


def is_file_name(value) -> bool:
    return is_text(value) and not os.path.isabs(value) and Path(os.path.normpath(value)).parts[:1] != ("..",)


def is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e100  # so that areas are finite as well


def is_box(value) -> bool:
    return type(value) is list and len(value) == 4 and all(map(is_number, value)) and value[2] >= 0 and value[3] >= 0


def is_area_or_missing(value) -> bool:
    return value is None or (is_number(value) and value >= 0)


def is_flag_or_missing(value) -> bool:
    return value is None or (type(value) in (int, bool) and value in (0, 1))
