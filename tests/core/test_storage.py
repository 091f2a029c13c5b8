"""Every URI behaves alike: atomic writes, honest errors, listings that read nothing."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from weaksam.core import filesystems, storage, storage_faults
from weaksam.core.cache import fetch
from weaksam.errors import ConfigError, MissingFileError, StorageError, WeightsError


@pytest.fixture(params=["local", "file", "memory", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return request.getfixturevalue("bucket")
    return {"local": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://bucket-{tmp_path.name}"}[
        request.param
    ]


def test_what_is_no_json_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(str(tmp_path / "a.json"), {"score": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_what_is_written_is_read_listed_and_found(base: str) -> None:
    uri = storage.join(base, "a", "b.bin")
    assert not storage.exists(uri)
    assert storage.list_files(base) == storage.list_folders(base) == []
    storage.write_bytes(uri, b"0123456789")
    storage.write_bytes(storage.join(base, "z.json"), b"{}")
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_bytes(uri, offset=3, length=4) == b"3456"
    assert [(file.path, file.size) for file in storage.list_files(base)] == [("a/b.bin", 10), ("z.json", 2)]
    assert [file.path for file in storage.list_files(base, recursive=False)] == ["z.json"]
    assert storage.list_folders(base) == ["a"]
    assert storage.read_bytes(storage.list_files(base)[0].uri) == b"0123456789"


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="run: a file, not the folder of a run or of a dataset"):
        storage.list_folders(str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="run: a file, not a folder: name the folder"):
        storage.list_files(str(tmp_path / "run"))


def test_nothing_lies_under_a_name_that_is_too_long(tmp_path: Path) -> None:
    long = str(tmp_path / ("a" * 300))
    assert (storage.exists(long), storage.size(long), storage.list_files(long), storage.list_folders(long)) == (
        *(False, 0, [], []),
    )


@pytest.mark.parametrize("name", ["a\0b", "a\ud800", "s3://bucket/a\0b"])
def test_a_name_that_is_no_text_is_refused(name: str, tmp_path: Path) -> None:
    uri = name if "://" in name else str(tmp_path / name)
    for look in (storage.exists, storage.read_bytes, storage.list_files, storage.list_folders):
        with pytest.raises(ConfigError, match=r"holds a NUL character, which no name has|is not UTF-8"):
            look(uri)


def test_a_missing_object_is_told_from_a_fault(base: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(base, "missing"))
    with pytest.raises(MissingFileError, match=r"missing: no such file"):
        storage.identity(storage.join(base, "missing"))
    assert storage.list_files(storage.join(base, "missing")) == []


def test_identity_follows_the_content(base: str) -> None:
    uri = storage.join(base, "weights")
    storage.write_bytes(uri, b"one")
    first = storage.identity(uri)
    assert storage.identity(uri) == first
    storage.write_bytes(uri, b"two")
    assert storage.identity(uri) != first


def test_what_a_killed_writer_leaves_is_invisible(tmp_path: Path) -> None:
    (tmp_path / ".part-1.parquet.abc.tmp").write_bytes(b"half")
    assert storage.list_files(str(tmp_path)) == []


def test_the_longest_name_that_a_file_system_takes_can_be_written(tmp_path: Path) -> None:
    uri = str(tmp_path / ("\u732b" * 83 + ".xml"))  # 253 bytes
    storage.write_bytes(uri, b"all of it")
    assert storage.read_bytes(uri) == b"all of it"


def test_a_name_that_is_not_utf8_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inside = os.fsencode(tmp_path)
    os.mkdir(inside + b"/d\xf1")
    for name in (b"a.jpg", b"i\xf1o.jpg", b"d\xf1/b.jpg"):
        Path(os.fsdecode(inside + b"/" + name)).write_bytes(b"x")
    (tmp_path / "whole").mkdir()
    for _ in range(2):
        assert [file.path for file in storage.list_files(str(tmp_path))] == ["a.jpg"]
        assert storage.list_folders(str(tmp_path)) == ["whole"]
    files, folders = [record.getMessage() for record in caplog.records]  # each kind of listing warns once
    assert files.startswith(f"{tmp_path}: 3 entries are left out, their names are not UTF-8: rename ")
    assert f"{tmp_path}/d\\xf1, {tmp_path}/d\\xf1/b.jpg, {tmp_path}/i\\xf1o.jpg" in files
    assert folders.startswith(f"{tmp_path}: 2 entries are left out")


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises((StorageError, OSError), match="out"):
        storage.write_bytes(str(tmp_path / "out"), b"x")


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nosuch://x/y: cannot be used \(Protocol not known: nosuch"):
        storage.read_bytes("nosuch://x/y")


def test_fetch_checks_the_hash_and_keeps_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAKSAM_CACHE", str(tmp_path / "cache"))
    uri = "memory://fetch-test/weights.pth"
    storage.write_bytes(uri, b"weights")
    good = hashlib.sha256(b"weights").hexdigest()
    path = fetch(uri, sha256=good)
    assert (path.name, path.read_bytes()) == ("weights.pth", b"weights")
    assert fetch(uri) == path
    with pytest.raises(WeightsError, match="download the file again"):
        fetch(uri, sha256="0" * 64)
    storage.write_bytes(uri, b"other")
    assert fetch(uri) != path


def test_a_fault_of_the_network_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_faults.time, "sleep", lambda seconds: None)
    tries = []

    def flaky() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise OSError("connection reset")
        return "done"

    assert filesystems.request(flaky, "s3://bucket/key", "read") == "done"


def test_a_fault_that_the_client_does_not_try_again_is_tried_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_faults.time, "sleep", lambda seconds: None)
    tries = []

    def cut_short() -> None:
        tries.append(1)
        raise OSError("AWS Error INTERNAL_FAILURE during GetObject operation: Failed to flush response stream (bad: 1)")

    with pytest.raises(StorageError, match="could not read after 12 tries"):
        filesystems.request(cut_short, "s3://bucket/key", "read")
    assert len(tries) == 12


def test_a_missing_right_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def denied() -> None:
        tries.append(1)
        raise OSError("When reading: AWS Error ACCESS_DENIED during GetObject")

    with pytest.raises(StorageError, match=r"s3://bucket/key: not allowed to read .*check the credentials"):
        filesystems.request(denied, "s3://bucket/key", "read")
    assert len(tries) == 1
