"""How much memory a process has for itself."""

import re
from pathlib import Path


def private_memory(pid: int | str = "self") -> float:
    """MiB of a process that no other process shares."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kib) for kib in re.findall(r"^Private_\w+: +(\d+) kB$", text, re.MULTILINE)) / 1024
