"""What all tests share: one local Ray cluster and S3 server a session, tiny steps, and where real data would lie."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from testing.local_ray import local_ray
from testing.places import ROOT
from testing.s3.server import CephServer
from testing.s3.world import make_bucket
from weaksam.execution import ray_env

ray_env.prepare()  # before anything imports Ray; programs that tests start inherit it
if not torch.cuda.is_available():  # before anything imports Triton, which asks then
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Test processes that share the CPUs would wait for each other's threads.
if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    torch.set_num_threads(max(1, torch.get_num_threads() // int(processes)))

settings.register_profile("weaksam", deadline=None)  # no test is timed: the first call loads code, machines are busy
settings.load_profile("weaksam")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    with local_ray(store_bytes=400_000_000):
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[CephServer]:
    installed = subprocess.run([str(ROOT / "testing" / "s3" / "install.sh")], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"no S3 server: {(installed.stdout + installed.stderr)[-300:]}")
    folder = Path(tempfile.mkdtemp(prefix="wss3", dir="/tmp"))  # short: sockets live there
    ceph = CephServer(folder / "ceph")
    try:
        ceph.start()
        yield ceph
    finally:
        ceph.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def bucket(s3_server: CephServer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A new bucket's URI; the environment names the server."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return make_bucket(s3_server, f"test-{abs(hash(request.node.name)) % 10**9}")
