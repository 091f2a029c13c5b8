"""URIs of files by RFC 8089, and those that hold credentials."""

from __future__ import annotations

from pathlib import Path

import pytest

from weaksam.core import storage, uris
from weaksam.errors import ConfigError


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("/data/a b", "/data/a b"),
        ("/data/a%20b", "/data/a%20b"),  # no URI: as it is
        ("file:///data/a%20b", "/data/a b"),
        ("file:///data/a b", "/data/a b"),
        ("file:/data/x", "/data/x"),
        ("file://localhost/data/x/", "/data/x"),
        ("file:///data/%C3%A9", "/data/é"),
    ],
)
def test_a_file_uri_is_the_path_that_it_names(uri: str, path: str) -> None:
    assert uris.is_local(uri)
    assert uris.absolute(uri) == path
    assert uris.join(uri, "c%20d") == f"{path if uri.startswith('file') else uri}/c%20d"


@pytest.mark.parametrize("uri", ["file://server/share/x", "file://data/x", "file:x", "file://~/x", "file:///a%00b"])
def test_other_file_uris_are_refused_and_write_nowhere(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="file:///absolute/path"):
        storage.write_bytes(uri, b"")
    assert list(tmp_path.iterdir()) == []


def test_files_with_blanks_and_percent_signs_are_listed_and_read(tmp_path: Path) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    for name in ("a%20b.jpg", "a b.jpg"):
        (folder / name).write_text(name)
    root = f"file://{tmp_path}/my%20data"
    assert [storage.read_bytes(file.uri).decode() for file in storage.list_files(root)] == ["a b.jpg", "a%20b.jpg"]
    storage.write_bytes(storage.join(root, "new"), b"1")
    assert (folder / "new").is_file()


@pytest.mark.parametrize(
    "uri", ["s3://KEY:SECRET@bucket/run", "s3://KEY:SEC/RET@bucket/run", "gs://token@bucket/x", "abfs://c:SECRET@a/x"]
)
def test_credentials_in_the_uri_of_a_store_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"://\*\*\*@.*holds credentials.*leave them to the environment") as found:
        storage.read_bytes(uri)
    assert not any(secret in str(found.value) for secret in ("SEC", "RET", "KEY", "token"))


@pytest.mark.parametrize(
    "uri", ["s3://bucket/a@b:c", "abfss://container@account/x", "s3://arn:aws:s3:us-east-1:1:accesspoint/a/b", "/a@b"]
)
def test_an_at_sign_alone_is_no_credential(uri: str) -> None:
    assert uris.fault_of(uri) is None
