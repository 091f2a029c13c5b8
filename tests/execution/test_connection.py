"""How a run gets its Ray: addresses, tokens, folders and memory that it cannot start with, a cluster that is lost."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from testing.places import ROOT
from weaksam.core.cache import cache_folder
from weaksam.errors import ClusterError, ConfigError
from weaksam.execution import connection, lost_cluster, own_cluster, ray_env

GIB = 2**30


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("", "RAY_ADDRESS is empty: unset it"),
        (" ", "RAY_ADDRESS is empty: unset it"),
        ("http://head:8265", "a dashboard is for `weaksam submit --address`"),
        ("https://head", "a dashboard is for `weaksam submit --address`"),
        ("head", "no address of a cluster"),
        ("head:port", "no address of a cluster"),
        ("head:0", "no address of a cluster"),
        (":6379", "no address of a cluster"),
        ("head:6379/path", "no address of a cluster"),
    ],
)
def test_an_address_that_is_none_is_a_fault_of_the_command(address: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        connection.cluster_address({"RAY_ADDRESS": address})


@pytest.mark.parametrize("address", ["local", "auto", "10.0.0.1:6379", "ray://head:10001", "[::1]:6379"])
def test_addresses_of_clusters_are_taken_as_they_are(address: str) -> None:
    assert connection.cluster_address({"RAY_ADDRESS": address}) == address


def test_without_an_address_a_cluster_is_started_here() -> None:
    assert connection.cluster_address({}) == "local"


def test_a_head_that_does_not_answer_is_given_up_soon() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # nobody listens
        began = time.monotonic()
        with pytest.raises(ClusterError, match=rf"the cluster at {address} cannot be joined .*Connection refused"):
            connection.check_reachable(address, seconds=0.0)
        assert time.monotonic() - began < 30


def test_a_head_that_answers_late_is_waited_for() -> None:
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        threading.Timer(0.5, late.listen).start()
        connection.check_reachable(f"127.0.0.1:{late.getsockname()[1]}", seconds=60.0)


def test_a_new_token_and_an_old_one_are_for_their_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0o022)
    try:
        assert ray_env.give_token({}) == {}
    finally:
        os.umask(before)
    file = tmp_path / ".ray" / "auth_token"
    token = file.read_text()
    assert (len(token), stat.S_IMODE(file.stat().st_mode)) == (64, 0o600)
    file.chmod(0o644)
    assert ray_env.give_token({}) == {}
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == (token, 0o600)


def test_without_a_home_folder_a_cluster_has_a_token_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))  # whoever runs this, there can be no folder below it
    first, second = ray_env.give_token({}), ray_env.give_token({})
    assert list(first) == list(second) == ["RAY_AUTH_TOKEN"]
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first != second
    assert ray_env.give_token({"RAY_AUTH_TOKEN": "given"}) == {}
    assert ray_env.give_token({"RAY_AUTH_TOKEN_PATH": "/given"}) == {}


def test_a_user_without_a_name_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(_: int) -> None:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert ray_env.missing_name() == {"USER": "user12345"}
    monkeypatch.setenv("USER", "someone")
    assert ray_env.missing_name() == {}


def test_memory_that_ray_cannot_start_in_is_told_before_it_does() -> None:
    with pytest.raises(ConfigError, match=r"has 1\.5 GiB of memory, Ray and one worker need about 2"):
        own_cluster.check_memory(GIB, int(1.5 * GIB))
    with pytest.raises(ClusterError, match=r"1\.0 GiB of 16\.0 GiB of memory are free"):
        own_cluster.check_memory(GIB, 16 * GIB)
    own_cluster.check_memory(2 * GIB, 2 * GIB)


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (Exception("The current node timed out during startup."), ClusterError, "did not start in time"),
        (OSError("AF_UNIX path length cannot exceed 107 bytes: /x"), ConfigError, "/long/scratch: too long a path"),
        (PermissionError(errno.EACCES, "Permission denied", "/long/scratch/ray"), ConfigError, "set RAY_TMPDIR to a"),
    ],
)
def test_why_ray_did_not_start_is_a_sentence(error: Exception, kind: type[Exception], told: str) -> None:
    found = own_cluster.explain(error, {"RAY_TMPDIR": "/long/scratch"})
    assert isinstance(found, kind)
    assert told in str(found)


def test_what_is_not_known_is_raised_as_it_is() -> None:
    assert own_cluster.explain(ValueError("else"), {}) is None
    assert own_cluster.explain(PermissionError(errno.EACCES, "Permission denied", "/other"), {}) is None


def test_a_share_of_a_cpu_counts_as_one(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(own_cluster, "check_memory", lambda available, limit: None)
    monkeypatch.setattr(ray_env, "prepare_own_cluster", lambda: None)
    monkeypatch.setattr("ray.init", lambda **options: asked.append(options))
    for quota in (0.5, 1.5, None):
        monkeypatch.setattr(own_cluster, "cpu_quota", lambda quota=quota: quota)
        with caplog.at_level(logging.INFO, "weaksam"):
            own_cluster.start({})
    assert [options.get("num_cpus") for options in asked] == [1, None, None]
    assert caplog.messages == ["this container has 0.5 CPU: it counts as one, the least that Ray works with"]


_LISTENING = """
import json, os
from pathlib import Path
from weaksam.execution import connection
from testing.local_ray import disconnect

def inodes(pid):
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            yield os.readlink(link)
        except OSError:
            pass

connection.connect()
import ray
ray.get(ray.remote(lambda: 1).remote())
stats = {int(p.name): (p / "stat").read_text() for p in Path("/proc").glob("[0-9]*")}
parents = {pid: int(text.rsplit(")", 1)[1].split()[1]) for pid, text in stats.items()}
below = {os.getpid()}
for _ in range(6):
    below |= {pid for pid, parent in parents.items() if parent in below}
own = {link for pid in below for link in inodes(pid)}
found = []
for family in ("tcp", "tcp6"):
    for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
            found.append(fields[1].split(":")[0])
disconnect()
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_of_this_machine_listens_on_loopback_alone() -> None:
    folder = tempfile.mkdtemp(prefix="ws", dir="/tmp")  # short: sockets live there
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", _LISTENING]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=own | {"RAY_TMPDIR": folder}, timeout=200
    )
    shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    addresses = json.loads(done.stdout.splitlines()[-1])
    assert len(addresses) > 3  # the head, the raylet and workers
    assert {address[-8:] for address in addresses} == {"0100007F"}  # 127.0.0.1, also as an address of IPv6


def watched(tmp_path: Path) -> tuple[socket.socket, socket.socket, threading.Thread, list[str]]:
    """A head, a raylet, and a thread that watches both."""
    head, raylet = socket.socket(), socket.socket(socket.AF_UNIX)
    head.bind(("127.0.0.1", 0))
    head.listen(64)
    raylet.bind(str(tmp_path / "raylet"))
    raylet.listen()
    told: list[str] = []
    lost_cluster._stop.clear()
    arguments = (f"127.0.0.1:{head.getsockname()[1]}", str(tmp_path / "raylet"), told.append)
    thread = threading.Thread(target=lost_cluster.watch, args=arguments, kwargs={"seconds": 0.4}, daemon=True)
    thread.start()
    return head, raylet, thread, told


def test_a_raylet_that_ends_is_noticed_at_once(tmp_path: Path) -> None:
    head, raylet, thread, told = watched(tmp_path)
    connection_to_it, _ = raylet.accept()
    raylet.close()
    connection_to_it.close()
    thread.join(60)
    head.close()
    assert told == ["Ray's process of this node (raylet) ended"]


def test_a_head_that_falls_silent_is_noticed(tmp_path: Path) -> None:
    head, raylet, thread, told = watched(tmp_path)
    raylet.accept()[0].close()  # a raylet closes connections on which nothing is said: that is no end
    head.close()
    thread.join(60)
    raylet.close()
    assert len(told) == 1
    assert "the head of the cluster (GCS at 127.0.0.1:" in told[0]


@pytest.mark.parametrize(("is_joined", "code"), [(True, ClusterError.exit_code), (False, 0)])
def test_a_lost_cluster_ends_the_process_with_a_sentence(is_joined: bool, code: int) -> None:
    lines = f"import ray; ray.is_initialized = lambda: {is_joined}; lost_cluster._end('the raylet ended')"
    command = [sys.executable, "-c", f"from weaksam.execution import lost_cluster; {lines}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == code
    assert ("error: the raylet ended: ended from outside, out of memory" in done.stderr) is is_joined
    assert done.stderr.endswith("the same command goes on\n") is is_joined


def test_a_cluster_that_is_left_may_end(tmp_path: Path) -> None:
    head, raylet, thread, told = watched(tmp_path)
    lost_cluster.stop_watching()
    thread.join(60)
    head.close()
    raylet.close()
    assert (thread.is_alive(), told) == (False, [])


def test_a_cache_needs_no_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEAKSAM_CACHE", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "weaksam"
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    found = cache_folder()
    assert found == tmp_path / f"weaksam-{os.getuid()}"
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    monkeypatch.setenv("WEAKSAM_CACHE", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
