"""Storage through a proxy that refuses, fails, drops and stalls: every result is right, whatever it takes.

And what no patience can fix, a missing right or object, is told at once.
"""

from __future__ import annotations

import pickle
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from testing.s3.proxy import Faults, FaultyProxy
from testing.s3.server import CephServer
from weaksam.core import object_stores, parquet_files, storage, tables
from weaksam.core.cache import fetch
from weaksam.errors import StorageError

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def proxy(bucket: str, s3_server: CephServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A running proxy, which the environment names instead of the server; one request in five goes wrong."""
    one = FaultyProxy(tmp_path / "proxy", s3_server.port, Faults())
    one.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", one.endpoint)
    yield one
    one.stop()


def objects(count: int) -> dict[str, bytes]:
    draw = random.Random(5)
    return {f"{i:03}": draw.randbytes(draw.randrange(1, 20_000)) for i in range(count)}


@pytest.mark.usefixtures("proxy")
def test_what_is_written_is_listed_and_read_whole(bucket: str) -> None:
    contents = objects(150)
    uris = {name: storage.join(bucket, "many", name) for name in contents}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: storage.write_bytes(uris[name], contents[name]), contents))
        for _ in range(3):
            assert [file.path for file in storage.list_files(storage.join(bucket, "many"))] == list(contents)
        assert list(pool.map(lambda name: storage.read_bytes(uris[name]), contents)) == list(contents.values())
        assert all(pool.map(storage.exists, uris.values()))
        cut = list(pool.map(lambda name: storage.read_bytes(uris[name], offset=1, length=100), contents))
    assert cut == [content[1:101] for content in contents.values()]


@pytest.mark.usefixtures("proxy")
def test_parts_of_a_table_are_all_there_and_read_by_columns(bucket: str) -> None:
    folder = storage.join(bucket, "table")
    ids = [f"{i:04}" for i in range(400)]
    for start in range(0, 400, 20):
        some = ids[start : start + 20]
        tables.write_part(folder, pa.table({"image_id": some, "length": [[len(one)] * 50 for one in some]}))
    parts = tables.list_parts(folder)
    assert len(parts) == 20
    for columns in (["image_id"], None):
        found = pa.concat_tables(
            parquet_files.read_parquet(storage.join(folder, part), columns=columns) for part in parts
        )
        assert sorted(found.column("image_id").to_pylist()) == ids


@pytest.mark.usefixtures("proxy")
def test_large_objects_of_many_requests_come_back_as_they_were(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEAKSAM_CACHE", str(tmp_path / "cache"))
    for turn in range(4):
        uri, data = storage.join(bucket, f"large-{turn}"), random.Random(turn).randbytes(24 * 2**20)
        storage.write_bytes(uri, data)
        assert storage.read_bytes(uri) == data
        assert fetch(uri).read_bytes() == data


def test_a_proxy_that_is_paused_or_killed_in_the_middle_is_waited_for(bucket: str, proxy: FaultyProxy) -> None:
    contents = objects(120)
    data = random.Random(9).randbytes(24 * 2**20)
    stop = threading.Event()

    def disturb() -> None:
        for _ in range(2):
            stop.wait(0.5)
            proxy.pause()
            stop.wait(1.0)
            proxy.resume()
            stop.wait(0.5)
            proxy.kill()
            stop.wait(2.0)
            proxy.start()

    disturber = threading.Thread(target=disturb)
    disturber.start()
    turns = 0
    try:
        while disturber.is_alive() or not turns:
            with ThreadPoolExecutor(8) as pool:
                large = pool.submit(storage.write_bytes, storage.join(bucket, "large"), data)
                list(pool.map(lambda name: storage.write_bytes(storage.join(bucket, name), contents[name]), contents))
                large.result()
                read = list(pool.map(lambda name: storage.read_bytes(storage.join(bucket, name)), contents))
            assert read == list(contents.values())
            assert storage.read_bytes(storage.join(bucket, "large")) == data
            turns += 1
    finally:
        stop.set()
        disturber.join()
    assert [file.path for file in storage.list_files(bucket)] == [*contents, "large"]


def test_a_client_that_travelled_to_another_process_is_as_patient(
    bucket: str, s3_server: CephServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = FaultyProxy(tmp_path / "proxy", s3_server.port, Faults(330, 0, 0, 0, 0))
    proxy.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        files, path = storage.filesystem(storage.join(bucket, "travelled"))
        travelled = pickle.loads(pickle.dumps(files))
        for turn in range(60):  # pyarrow's own tries three times once it is unpickled
            with travelled.open_output_stream(f"{path}-{turn}") as stream:
                stream.write(b"x" * turn)
            assert travelled.get_file_info(f"{path}-{turn}").size == turn
    finally:
        proxy.stop()


@pytest.mark.usefixtures("proxy")
def test_a_missing_right_and_a_missing_object_are_told_at_once(
    bucket: str, s3_server: CephServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = storage.join(bucket, "private")
    storage.write_bytes(uri, b"x")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(bucket, "nothing"))
    stranger = s3_server.add_user("stranger")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, stranger[key])
    object_stores._object_store.cache_clear()
    start = time.monotonic()
    with pytest.raises(StorageError, match=rf"{uri}: not allowed to read .*s3:GetObject"):
        storage.read_bytes(uri)
    with pytest.raises(StorageError, match=rf"{uri}: not allowed to write .*s3:PutObject"):
        storage.write_bytes(uri, b"y")
    with pytest.raises(StorageError, match=rf"{bucket}: not allowed to list .*s3:ListBucket"):
        storage.list_files(bucket)
    assert time.monotonic() - start < 15  # not tried again, but for what the proxy did
    object_stores._object_store.cache_clear()
