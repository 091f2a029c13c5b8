"""How much memory can still be used: of the machine, or of the container where that has a limit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Folder below /sys/fs/cgroup, and the files of a limit, of what is used, and in memory.stat of what can be given up
_V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("", "memory.max", "memory.current", "inactive_file")


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can still be used without swapping, at most what a control group's limit leaves.

    Where the system does not say (macOS), all memory of the machine.

    Args:
        root: folder that holds `proc` and `sys`.
    """
    try:
        available = _read_fields(root / "proc/meminfo")["MemAvailable:"] * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([available, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """What the limits of this process's control group and of those around it leave."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, *names = _V1 if controllers else _V2
        top = root / "sys/fs/cgroup" / base
        inner = top / path.strip("/")
        # a container may see its own group as the top one, under whatever path
        folders = [top] if ".." in inner.parts else [one for one in (inner, *inner.parents) if one.is_relative_to(top)]
        for folder in folders:
            if (left := _left_in(folder, *names)) is not None:
                yield left


def _left_in(group: Path, limit: str, usage: str, cache: str) -> int | None:
    """None without a limit."""
    try:
        largest, used = (int((group / name).read_text()) for name in (limit, usage))
        given_up = _read_fields(group / "memory.stat").get(cache, 0)
    except (OSError, ValueError):  # no such group, or the limit is "max"
        return None
    return max(0, largest - used + given_up)  # files that were read count as used until the memory is needed


def _read_fields(file: Path) -> dict[str, int]:
    """The number of each line by the word before it."""
    rows = (line.split() for line in file.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2}
