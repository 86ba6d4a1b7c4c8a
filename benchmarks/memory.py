"""How much memory a process has."""

import re
from pathlib import Path


def private_memory(pid: int | str = "self") -> float:
    """MiB that a process shares with no other and that are no file's content.

    Pages of a mapped file are the system's cache, though Linux calls them private while only one process looks at them.
    """
    kib = 0
    mapping = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ (?P<inode>\d+).*\n(?P<fields>(?:[A-Z].*\n)+)", re.MULTILINE)
    for match in mapping.finditer(Path(f"/proc/{pid}/smaps").read_text()):
        if match["inode"] == "0":
            kib += sum(int(value) for value in re.findall(r"^Private_\w+: +(\d+) kB$", match["fields"], re.MULTILINE))
    return kib / 1024


def peak_memory() -> float:
    """Most MiB that this program ever had in memory.

    Not ``ru_maxrss``, which a process inherits from the one that started it.
    """
    return read_status("VmHWM")


def resident_memory() -> float:
    """MiB of this process that are in memory now."""
    return read_status("VmRSS")


def read_status(field: str) -> float:
    """A field of /proc/self/status that is a size, in MiB."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) / 1024
