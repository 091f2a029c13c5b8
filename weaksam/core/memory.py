"""Memory and CPUs of the machine, or of the container if it has a limit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Folder below /sys/fs/cgroup, the files with limit and usage, and the key of reclaimable memory in memory.stat
_Names = tuple[str, ...]
_V1: _Names = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2: _Names = ("", "memory.max", "memory.current", "inactive_file")
# The same for the CPU: files with the quota and its period
_CPU_V1: _Names = ("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")
_CPU_V2: _Names = ("", "cpu.max")


def available_memory(root: Path = Path("/")) -> int:
    """Returns the bytes that can be used without swapping, within the limits of the control groups.

    On systems that do not report it (macOS), returns all memory of the machine.

    Args:
        root: folder that holds `proc` and `sys`.
    """
    try:
        available = _read_fields(root / "proc/meminfo")["MemAvailable:"] * 1024
    except (OSError, KeyError, ValueError):
        return _all_memory()
    left = (_left_in(group, *names) for group, names in _groups(root, "memory", _V1, _V2))
    return min([available, *(num_bytes for num_bytes in left if num_bytes is not None)])


def memory_limit(root: Path = Path("/")) -> int:
    """Returns the most bytes that all processes of the machine or container may use, see `available_memory`."""
    try:
        total = _read_fields(root / "proc/meminfo")["MemTotal:"] * 1024
    except (OSError, KeyError, ValueError):
        return _all_memory()
    limits = (_read_number(group / names[0]) for group, names in _groups(root, "memory", _V1, _V2))
    return min([total, *(limit for limit in limits if limit is not None)])


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Returns the CPU quota of this process's control groups, perhaps below 1; None without a limit."""
    quotas = []
    for group, names in _groups(root, "cpu", _CPU_V1, _CPU_V2):
        with suppress(OSError, ValueError):
            # v2 has quota and period in one file
            quota, period = " ".join((group / name).read_text() for name in names).split()
            if quota != "max" and int(quota) > 0:
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _all_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _groups(root: Path, controller: str, v1: _Names, v2: _Names) -> Iterator[tuple[Path, list[str]]]:
    """Yields the folders of this process's control group and its parents, each with the names of its files."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base, *names = v1 if controllers else v2
        top = root / "sys/fs/cgroup" / base
        inner = top / path.strip("/")
        # in a container its own group may be the top folder, whatever the path
        folders = (
            [top]
            if ".." in inner.parts
            else [folder for folder in (inner, *inner.parents) if folder.is_relative_to(top)]
        )
        yield from ((folder, names) for folder in folders)


def _read_number(file: Path) -> int | None:
    """Returns the number in a file; None if there is no such file, or no limit in it."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _left_in(group: Path, limit: str, usage: str, cache: str) -> int | None:
    """Returns the bytes that a control group may still use; None without a limit."""
    try:
        largest, used = (int((group / name).read_text()) for name in (limit, usage))
        reclaimable = _read_fields(group / "memory.stat").get(cache, 0)
    except (OSError, ValueError):  # no such group, or the limit is "max"
        return None
    return max(0, largest - used + reclaimable)  # the page cache counts as used until the memory is needed


def _read_fields(file: Path) -> dict[str, int]:
    """Returns the number of each line, by the word before it."""
    rows = (line.split() for line in file.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2}
