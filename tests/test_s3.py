"""Storage on a real S3 server: what is written is read, faults are told from absence, interruptions are waited out."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import fs as pafs

from tests.s3.server import CephServer
from weaksam import object_stores, storage
from weaksam.errors import StorageError


@pytest.fixture(scope="session")
def server() -> Iterator[CephServer]:
    installed = subprocess.run([str(Path(__file__).parent / "s3" / "install.sh")], capture_output=True, text=True)
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
def bucket(server: CephServer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A new bucket's URI; the environment names the server."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    name = f"test-{abs(hash(request.node.name)) % 10**9}"
    pafs.S3FileSystem(
        endpoint_override=server.endpoint.partition("://")[2], scheme="http", allow_bucket_creation=True
    ).create_dir(name)
    return f"s3://{name}"


def test_what_is_written_is_read_listed_and_found(bucket: str) -> None:
    uri = storage.join(bucket, "a", "b.bin")
    assert not storage.exists(uri)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)
    assert storage.list_files(bucket) == storage.list_folders(bucket) == []
    storage.write_bytes(uri, b"0123456789")
    storage.write_bytes(storage.join(bucket, "z.json"), b"{}")
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_bytes(uri, offset=3, length=4) == b"3456"
    assert [(file.path, file.size) for file in storage.list_files(bucket)] == [("a/b.bin", 10), ("z.json", 2)]
    assert [file.path for file in storage.list_files(bucket, recursive=False)] == ["z.json"]
    assert storage.list_folders(bucket) == ["a"]


def test_a_large_object_comes_back_as_it_was(bucket: str) -> None:
    uri, data = storage.join(bucket, "large"), bytes(range(256)) * 2**17  # 32 MiB: several parts
    storage.write_bytes(uri, data)
    assert storage.read_bytes(uri) == data
    before = storage.identity(uri)
    assert storage.identity(uri) == before
    storage.write_bytes(uri, data[1:])
    assert storage.identity(uri) != before


def test_identity_and_fetch_follow_the_content(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAKSAM_CACHE", str(tmp_path))
    uri = storage.join(bucket, "weights.pth")
    with pytest.raises(StorageError, match="no such file"):
        storage.identity(uri)
    storage.write_bytes(uri, b"one")
    path = storage.fetch(uri)
    assert path.read_bytes() == b"one"
    storage.write_bytes(uri, b"two")
    assert storage.fetch(uri).read_bytes() == b"two"


def test_a_table_is_read_by_columns(bucket: str) -> None:
    uri, sink = storage.join(bucket, "part.parquet"), pa.BufferOutputStream()
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1, 2], "b": ["x", "y"]}), sink)
    storage.write_bytes(uri, sink.getvalue().to_pybytes())
    assert storage.read_parquet(uri, columns=["b"]).to_pydict() == {"b": ["x", "y"]}


def test_a_wrong_secret_and_a_missing_bucket_are_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = storage.join(bucket, "x")
    storage.write_bytes(uri, b"x")
    with pytest.raises((StorageError, FileNotFoundError), match="no-such-bucket"):
        storage.write_bytes("s3://no-such-bucket-here/x", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    object_stores._object_store.cache_clear()
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"not allowed to read .*which must have the right s3:GetObject"):
        storage.read_bytes(uri)
    with pytest.raises(StorageError, match=r"not allowed to write .*which must have the right s3:PutObject"):
        storage.write_bytes(uri, b"y")
    assert time.monotonic() - start < 10  # not tried again
    object_stores._object_store.cache_clear()


def test_a_server_that_pauses_or_is_started_again_is_waited_for(bucket: str, server: CephServer) -> None:
    uri = storage.join(bucket, "patience")
    server.pause_gateway()
    timer = threading.Timer(4, server.resume_gateway)
    timer.start()
    storage.write_bytes(uri, b"after a pause")
    timer.join()
    assert storage.read_bytes(uri) == b"after a pause"
    server.kill_gateway()
    timer = threading.Timer(2, server.start_gateway)
    timer.start()
    storage.write_bytes(uri, b"after a restart")
    timer.join()
    assert storage.read_bytes(uri) == b"after a restart"
