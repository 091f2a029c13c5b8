"""Finds the processes of a run on this machine, from /proc."""

from __future__ import annotations

import subprocess
from pathlib import Path


def actors_of(driver: int, kind: str = "MapWorker") -> list[int]:
    """Returns process ids of the Ray actors of a class, by default Ray Data's, that descend from process `driver`."""
    pids = []
    listing = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True)
    for line in listing.stdout.splitlines():
        pid, _, command = line.strip().partition(" ")
        if command.startswith(f"ray::{kind}") and driver in _ancestors(int(pid)):
            pids.append(int(pid))
    return pids


def resident_bytes(pid: int) -> int:
    """Returns resident memory without shared memory, as the object store has a fixed size; 0 for an ended process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    sizes = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if "Rss" in name
    }
    return sizes.get("RssAnon", 0) + sizes.get("RssFile", 0)


def _ancestors(pid: int) -> list[int]:
    pids = []
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            break
        pids.append(pid)
    return pids
