"""How much memory a process has for itself."""

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
