"""Down, denied, expired, missing: what a store answers decides the error, and which advice it gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testing.s3.small import SmallS3, small_s3
from weaksam.core import object_stores, storage, storage_faults
from weaksam.errors import ConfigError, DeniedError, MissingFileError, StorageError


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallS3]:
    """A small server that the environment names; clients try once."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(object_stores, "_ATTEMPTS", 1)
    monkeypatch.setattr(storage_faults, "ATTEMPTS", 1)
    with small_s3() as server:
        named = {"AWS_ENDPOINT_URL_S3": server.endpoint, "AWS_REGION": "us-east-1"}
        for name, value in (named | {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}).items():
            monkeypatch.setenv(name, value)
        server.objects["data/run/a"] = b"one"
        yield server


@pytest.mark.parametrize(
    ("refusal", "advice"),
    [
        ((403, "AccessDenied", "Access Denied"), "check the credentials, which must have the right"),
        ((400, "ExpiredToken", "The provided token has expired."), "the credentials have expired: renew them"),
        ((403, "RequestTimeTooSkewed", "The difference is too large."), "set the clock of this machine"),
    ],
)
def test_a_store_that_does_not_let_us_in_says_why(s3: SmallS3, refusal: tuple[int, str, str], advice: str) -> None:
    s3.refusal = refusal
    for look in (storage.read_bytes, storage.identity, storage.exists):
        with pytest.raises(DeniedError, match=rf"s3://data/run/a: not allowed to .*{advice}") as found:
            look("s3://data/run/a")
        assert found.value.exit_code == 4
    with pytest.raises(DeniedError, match=advice):
        storage.list_files("s3://data/run")


def test_a_store_that_is_down_is_neither_empty_nor_denied(s3: SmallS3) -> None:
    s3.refusal = (503, "ServiceUnavailable", "later")
    for look in (storage.read_bytes, storage.exists, storage.list_files, storage.list_folders):
        with pytest.raises(StorageError, match=r"could not .* after 1 tries") as found:
            look("s3://data/run/a")
        assert not isinstance(found.value, DeniedError)


def test_what_is_missing_is_the_users_to_correct(s3: SmallS3) -> None:
    assert not storage.exists("s3://data/run/b")
    with pytest.raises(MissingFileError, match="s3://data/run/b: no such file: check the path") as found:
        storage.identity("s3://data/run/b")
    assert found.value.exit_code == 2


def test_buckets_by_host_name_are_a_setting_that_the_error_names(s3: SmallS3, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.host = "localhost"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://localhost:{s3.port}")
    with pytest.raises(ConfigError, match=r"host name alone.*set `addressing: virtual` in the run file"):
        storage.read_bytes("s3://data/run/a")
    monkeypatch.setenv("AWS_S3_ADDRESSING_STYLE", "virtual")
    assert storage.read_bytes("s3://data/run/a") == b"one"


def test_requests_go_through_the_proxy_of_the_environment(s3: SmallS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3.example.test")
    monkeypatch.setenv("HTTP_PROXY", f"http://user:pass%40word@127.0.0.1:{s3.port}")
    monkeypatch.setenv("http_proxy", f"http://user:pass%40word@127.0.0.1:{s3.port}")
    assert storage.read_bytes("s3://data/run/a") == b"one"
    assert s3.requests[-1] == "GET http://s3.example.test/data/run/a"

    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint)  # loopback: not through it
    assert storage.read_bytes("s3://data/run/a") == b"one"
    assert s3.requests[-1] == "GET /data/run/a"


def test_web_addresses_that_are_refused_are_not_missing(s3: SmallS3) -> None:
    uri = f"http://127.0.0.1:{s3.port}/data/run/a?X-Amz-Signature=abc"
    assert storage.read_bytes(uri) == b"one"
    s3.refusal = (403, "AccessDenied", "Request has expired")
    with pytest.raises(
        DeniedError, match=r"/data/run/a\?\*\*\*: not allowed to read .*expires: get a new one"
    ) as found:
        storage.read_bytes(uri)
    assert "abc" not in str(found.value)
    s3.refusal = (500, "InternalError", "")
    with pytest.raises(StorageError, match="could not look up"):
        storage.identity(uri)
    s3.refusal = (404, "NoSuchKey", "")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)


@pytest.mark.parametrize(
    ("text", "is_expired"),
    [
        ("AWS Error UNKNOWN (HTTP status 400): ExceptionName: ExpiredToken", True),
        ("The provided token has expired", True),
        ("ExpiredAuthenticationToken", True),
        ("Token has been expired or revoked", True),
        ("Request has expired", True),
        ("the timer expired while it waited for a connection", False),
    ],
)
def test_an_expired_token_is_recognised_in_the_words_of_each_store(text: str, is_expired: bool) -> None:
    fault = storage_faults._fault_of("gs://bucket/a", "read", text, False)
    assert (fault is not None and "expired: renew" in str(fault)) is is_expired
