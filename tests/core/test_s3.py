"""Storage on a real S3 server, beyond `test_storage`: large objects, denials, interruptions that are waited out."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from testing.s3.server import CephServer
from weaksam.core import object_stores, parquet_files, storage
from weaksam.core.cache import fetch
from weaksam.errors import MissingFileError, StorageError


def test_a_large_object_comes_back_as_it_was(bucket: str) -> None:
    uri, data = storage.join(bucket, "large"), bytes(range(256)) * 2**17  # 32 MiB: several parts
    storage.write_bytes(uri, data)
    assert storage.read_bytes(uri) == data
    before = storage.identity(uri)
    assert storage.identity(uri) == before
    storage.write_bytes(uri, data[1:])
    assert storage.identity(uri) != before


@pytest.mark.parametrize("later", [b"b" * 617, b"c" * 700])
def test_an_object_replaced_while_it_is_read_comes_back_whole(
    bucket: str, monkeypatch: pytest.MonkeyPatch, later: bytes
) -> None:
    uri, find, opened = storage.join(bucket, "training_log.jsonl"), storage.filesystem, []

    def put(data: bytes) -> None:
        files, path = find(uri)
        with files.open_output_stream(path) as stream:
            stream.write(data)

    class Replacing:
        """Right after the object was opened for the first time, another takes its place."""

        def __init__(self, files: Any) -> None:
            self.files = files

        def __getattr__(self, name: str) -> Any:
            return getattr(self.files, name)

        def open_input_stream(self, path: str, **kwargs: Any) -> Any:
            stream = self.files.open_input_stream(path, **kwargs)
            if not opened:
                put(later)
            opened.append(path)
            return stream

    monkeypatch.setattr(storage, "filesystem", lambda asked: (Replacing(find(asked)[0]), find(asked)[1]))
    put(b"a" * 650)
    assert storage.read_bytes(uri) not in (b"a" * 650, later)  # why there is another way to read
    opened.clear()
    put(b"a" * 650)
    assert storage.read_replaceable(uri) == later
    assert len(opened) == 2


def test_identity_and_fetch_follow_the_content(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAKSAM_CACHE", str(tmp_path))
    uri = storage.join(bucket, "weights.pth")
    with pytest.raises(MissingFileError, match="no such file"):
        storage.identity(uri)
    storage.write_bytes(uri, b"one")
    path = fetch(uri)
    assert path.read_bytes() == b"one"
    storage.write_bytes(uri, b"two")
    assert fetch(uri).read_bytes() == b"two"


def test_a_table_is_read_by_columns(bucket: str) -> None:
    uri, sink = storage.join(bucket, "part.parquet"), pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1, 2], "b": ["x", "y"]}), sink)
    storage.write_bytes(uri, sink.getvalue().to_pybytes())
    assert parquet_files.read_parquet(uri, columns=["b"]).to_pydict() == {"b": ["x", "y"]}


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


def test_a_server_that_pauses_or_is_started_again_is_waited_for(bucket: str, s3_server: CephServer) -> None:
    uri = storage.join(bucket, "patience")
    s3_server.pause_gateway()
    timer = threading.Timer(4, s3_server.resume_gateway)
    timer.start()
    storage.write_bytes(uri, b"after a pause")
    timer.join()
    assert storage.read_bytes(uri) == b"after a pause"
    s3_server.kill_gateway()
    timer = threading.Timer(2, s3_server.start_gateway)
    timer.start()
    storage.write_bytes(uri, b"after a restart")
    timer.join()
    assert storage.read_bytes(uri) == b"after a restart"
