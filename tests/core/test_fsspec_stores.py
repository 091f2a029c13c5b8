"""Stores of fsspec: every look is fresh, a fault is no missing object, a replaced file is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import fsspec
import pytest

from weaksam.core import object_stores, storage, storage_faults
from weaksam.errors import ConfigError, StorageError

CONTENT: dict[str, tuple[bytes, dict[str, Any]]] = {}  # what "another process" writes to
FAULTS: list[Exception] = []


class Remembering(fsspec.AbstractFileSystem):
    """Answers from listings that it remembers, as clients of object stores do."""

    protocol = "remembering"

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        if FAULTS:
            raise FAULTS[0]
        path = path.rstrip("/")
        if path not in self.dircache:
            self.dircache[path] = self._entries(path)
        found = self.dircache[path] if path in self.dircache else self._entries(path)
        if not found:
            raise FileNotFoundError(path)
        return found if detail else [one["name"] for one in found]

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()

    def _entries(self, path: str) -> list[dict[str, Any]]:
        if path in CONTENT:
            return [{"name": path, "type": "file", "size": len(CONTENT[path][0]), **CONTENT[path][1]}]
        below = [name for name in CONTENT if name.startswith(f"{path}/")]
        files = [name for name in below if "/" not in name[len(path) + 1 :]]
        folders = sorted({f"{path}/{name[len(path) + 1 :].split('/')[0]}" for name in below} - set(files))
        found = [{"name": name, "type": "file", "size": len(CONTENT[name][0]), **CONTENT[name][1]} for name in files]
        return [*found, *({"name": name, "type": "directory", "size": 0} for name in folders)]

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        import io

        return io.BytesIO(CONTENT[path][0][: self.info(path)["size"]])


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(storage_faults, "ATTEMPTS", 1)
    fsspec.register_implementation("remembering", Remembering, clobber=True)
    Remembering.clear_instance_cache()
    object_stores._object_store.cache_clear()
    yield
    CONTENT.clear()
    FAULTS.clear()


def put(name: str, data: bytes, **info: Any) -> None:
    CONTENT[f"bucket/{name}"] = data, info


def test_what_another_process_writes_is_there_at_once() -> None:
    put("run/a", b"1")
    assert storage.exists("remembering://bucket/run/a")
    assert not storage.exists("remembering://bucket/run/b")
    put("run/b", b"22")
    put("run/deep/c", b"")
    assert storage.exists("remembering://bucket/run/b")
    assert [file.path for file in storage.list_files("remembering://bucket/run")] == ["a", "b", "deep/c"]
    assert storage.list_folders("remembering://bucket/run") == ["deep"]
    put("run/a", b"fourteen bytes")
    assert storage.read_replaceable("remembering://bucket/run/a") == b"fourteen bytes"
    assert storage.read_bytes("remembering://bucket/run/a") == b"fourteen bytes"
    del CONTENT["bucket/run/b"]
    assert not storage.exists("remembering://bucket/run/b")


def test_listings_are_fresh_even_where_the_option_is_not_heard() -> None:
    files, path = storage.filesystem("remembering://bucket/run")
    put("run/a", b"1")
    files.handler.fs.dircache.use_listings_cache = True
    assert len(object_stores.list_entries(files, path, recursive=True)) == 1
    put("run/b", b"2")
    assert len(object_stores.list_entries(files, path, recursive=True)) == 2


@pytest.mark.parametrize("fault", [OSError("503 service unavailable"), RuntimeError("connection lost")])
def test_a_store_that_is_down_is_neither_empty_nor_without_the_object(fault: Exception) -> None:
    put("run/a", b"1")
    FAULTS.append(fault)
    for look in (storage.exists, storage.list_files, storage.list_folders, storage.read_bytes, storage.identity):
        with pytest.raises(StorageError, match=f"could not .*{fault}"):
            look("remembering://bucket/run/a")


def test_a_file_in_the_place_of_a_folder_is_an_error() -> None:
    put("run", b"1")
    with pytest.raises(ConfigError, match="a file, not a folder"):
        storage.list_files("remembering://bucket/run")
    assert storage.list_files("remembering://bucket/nothing") == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"etag": "0x1"}, {"etag": "0x2"}),
        ({"last_modified": datetime(2026, 11, 1, tzinfo=UTC)}, {"last_modified": datetime(2026, 11, 2, tzinfo=UTC)}),
        ({"LastModified": datetime(2026, 11, 1, tzinfo=UTC)}, {"LastModified": datetime(2026, 11, 2, tzinfo=UTC)}),
        ({"Last-Modified": "Sun, 01 Nov 2026"}, {"Last-Modified": "Mon, 02 Nov 2026"}),
        ({"mtime": 1.0}, {"mtime": 2.0}),
    ],
)
def test_a_file_replaced_by_one_of_the_same_size_is_another_dataset(before: Any, after: Any) -> None:
    def look() -> str:
        return storage.listing_identity(storage.list_files("remembering://bucket/data"))

    put("data/0.jpg", b"one", **before)
    first = look()
    assert look() == first
    put("data/0.jpg", b"two", **after)
    assert look() != first
    assert not first.endswith("(sizes alone)")


def test_a_store_that_knows_sizes_alone_is_named() -> None:
    put("data/0.jpg", b"one")
    assert storage.listing_identity(storage.list_files("remembering://bucket/data")).endswith(" (sizes alone)")
