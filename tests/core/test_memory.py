"""The memory that is left, from files as Linux writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from weaksam.core.memory import available_memory, cpu_quota, memory_limit

GIB = 2**30


def system(root: Path, cgroup: str, groups: dict[str, dict[str, object]], *, available: int = 8 * GIB) -> Path:
    """A root folder with 16 GiB in the machine."""
    files: dict[str, object] = {
        "proc/meminfo": f"MemTotal: 16777216 kB\nMemAvailable:   {available // 1024} kB\nHugePages_Total:       0\n",
        "proc/self/cgroup": cgroup,
    }
    files |= {f"sys/fs/cgroup/{group}/{name}": value for group, all in groups.items() for name, value in all.items()}
    for path, value in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{value}\n")
    return root


def v1(limit: int, used: int, cache: int = 0) -> dict[str, object]:
    stat = f"cache {cache}\ninactive_file 1\ntotal_inactive_file {cache}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


def v2(limit: int | str, used: int, cache: int = 0) -> dict[str, object]:
    return {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 5\ninactive_file {cache}"}


@pytest.mark.parametrize(
    ("cgroup", "groups", "left"),
    [
        ("0::/", {}, 8),
        ("0::/", {".": v2(4 * GIB, 3 * GIB)}, 1),
        ("0::/", {".": v2(4 * GIB, 3 * GIB, 2 * GIB)}, 3),  # files that were read
        ("0::/", {".": v2("max", 3 * GIB)}, 8),
        ("0::/", {".": v2(64 * GIB, 3 * GIB)}, 8),
        ("0::/", {".": v2(4 * GIB, 5 * GIB)}, 0),
        ("0::/a/b", {"a": v2(4 * GIB, 2 * GIB), "a/b": v2("max", GIB)}, 2),  # a limit of the group around it
        ("0::/a/b", {"a": v2("max", 2 * GIB), "a/b": v2(6 * GIB, GIB)}, 5),
        ("0::/../c", {".": v2(4 * GIB, 3 * GIB)}, 1),
        ("3:cpuset:/\n2:memory:/", {"memory": v1(4 * GIB, 3 * GIB, 2 * GIB)}, 3),
        ("2:cpu,memory:/docker/1", {"memory": v1(4 * GIB, 3 * GIB)}, 1),  # the container's own is on top
        ("2:memory:/a\n0::/", {"memory": v1(2**63 - 4096, 9), "memory/a": v1(6 * GIB, GIB)}, 5),
        ("2:cpu:/a\n0::/", {"cpu/a": v1(GIB, 0)}, 8),
    ],
)
def test_the_least_of_machine_and_groups_is_left(tmp_path: Path, cgroup: str, groups: dict, left: float) -> None:
    assert available_memory(system(tmp_path, cgroup, groups)) == left * GIB


def test_without_control_groups_it_is_that_of_the_machine(tmp_path: Path) -> None:
    root = system(tmp_path, "", {})
    (root / "proc/self/cgroup").unlink()
    assert available_memory(root) == 8 * GIB


def test_where_nothing_says_what_is_available_it_is_all_there_is(tmp_path: Path) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert available_memory(tmp_path) == total
    assert 0 < available_memory() <= total


@pytest.mark.parametrize(
    ("cgroup", "groups", "limit"),
    [
        ("0::/", {}, 16),
        ("0::/", {".": v2(4 * GIB, 3 * GIB)}, 4),
        ("0::/a/b", {"a": v2(2 * GIB, GIB), "a/b": v2("max", GIB)}, 2),
        ("2:cpu,memory:/docker/1", {"memory": v1(3 * GIB, GIB)}, 3),
        ("0::/", {".": v2(64 * GIB, GIB)}, 16),
    ],
)
def test_the_limit_is_what_machine_and_groups_have_in_all(
    tmp_path: Path, cgroup: str, groups: dict, limit: float
) -> None:
    assert memory_limit(system(tmp_path, cgroup, groups)) == limit * GIB


@pytest.mark.parametrize(
    ("cgroup", "groups", "cpus"),
    [
        ("0::/", {}, None),
        ("0::/", {".": {"cpu.max": "max 100000"}}, None),
        ("0::/", {".": {"cpu.max": "50000 100000"}}, 0.5),
        ("0::/a/b", {"a": {"cpu.max": "150000 100000"}, "a/b": {"cpu.max": "400000 100000"}}, 1.5),
        ("2:cpu,cpuacct:/a", {"cpu": {"cpu.cfs_quota_us": 25000, "cpu.cfs_period_us": 100000}}, 0.25),
        ("2:cpu:/", {"cpu": {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000}}, None),
    ],
)
def test_a_share_of_a_cpu_is_known(tmp_path: Path, cgroup: str, groups: dict, cpus: float | None) -> None:
    assert cpu_quota(system(tmp_path, cgroup, groups)) == cpus
