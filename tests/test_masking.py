"""Secrets of URLs are masked wherever text is shown or stored; variables that hold some are recognised."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytest

from testing.s3.small import small_s3
from weaksam.cli.terminal import set_up_logging
from weaksam.core import storage
from weaksam.core.cache import fetch
from weaksam.errors import ConfigError, ImageError, StorageError
from weaksam.masking import has_credentials, is_secret, masked, masked_url, masked_values, without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@host/w.pth", "https://***@host/w.pth"),
        ("https://host/w.pth?X-Amz-Signature=abc&x=1: no such file", "https://host/w.pth?***: no such file"),
        ("url=URL('https://host/w?sig=abc'), 403", "url=URL('https://host/w?***'), 403"),
        ("(https://u:p@host/w?sig=abc) and http://host/", "(https://***@host/w?***) and http://host/"),
        ("s3://KEY:SEC/RET@bucket/x", "s3://***@bucket/x"),
        ("az://box/w.pth?sv=1&sig=abc", "az://box/w.pth?***"),
        ("s3://bucket/a?b.jpg", "s3://bucket/a?b.jpg"),  # a key may have a question mark
        ("abfss://container@account/x", "abfss://container@account/x"),
        ("http://[::1]:80/x http://host:8265/a@b", "http://[::1]:80/x http://host:8265/a@b"),
        ("/data/a?b@c", "/data/a?b@c"),
        (
            "'https://b.s3.host/k.pth?content=filename='a.pth'&X-Amz-Signature=hidden': 403",
            "'https://b.s3.host/k.pth?***': 403",
        ),
        ('https://h/k?c=filename="a"&sig=hidden is gone', "https://h/k?*** is gone"),
        ("https://h/k?c=filename=''&sig=hidden", "https://h/k?***"),
        ("https://u:p'ss@h/x", "https://***@h/x"),
        ("s3://KEY:SE'CRET@bucket/x", "s3://***@bucket/x"),
        (
            "got 'https://h/x', not ['https://u:p@h/y','https://h/z?sig=1']",
            "got 'https://h/x', not ['https://***@h/y','https://h/z?***']",
        ),
        ('{"a":"https://h/x?sig=1","b":2}', '{"a":"https://h/x?***","b":2}'),
        ("<https://h/x?sig=1>", "<https://h/x?***>"),
    ],
)
def test_user_information_and_queries_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert masked(shown) == shown


def test_a_setting_is_one_url_whatever_it_has_in_it() -> None:
    signed = "https://b.s3.host/my weights.pth?content=filename='a b.pth'&X-Amz-Signature=hidden."
    assert masked_values([signed]) == ["https://b.s3.host/my weights.pth?***"]
    assert without_secrets(signed) == "https://b.s3.host/my weights.pth"
    assert masked_url("s3://bucket/a? b.jpg") == "s3://bucket/a? b.jpg"
    assert has_credentials("s3://KEY:SE'C RET@bucket/x")


def test_what_is_kept_or_raised_is_masked(caplog: pytest.LogCaptureFixture) -> None:
    secret = "https://u:hidden@host/w?sig=hidden"
    kept = {"settings": {"weights": secret, "scales": [1, secret]}, secret: None}
    assert masked_values(kept) == {
        "settings": {"weights": masked(secret), "scales": [1, masked(secret)]},
        masked(secret): None,
    }
    errors = (ConfigError(secret), StorageError(f"{secret}: down"), ImageError("not_found", secret))
    assert not any("hidden" in f"{error} {error.args} {vars(error)}" for error in errors)


def test_log_lines_are_masked() -> None:
    logger = logging.getLogger("weaksam")
    before = logger.handlers, logger.propagate, logger.level
    try:
        set_up_logging()
        line = logger.handlers[0].format(logging.makeLogRecord({"msg": "%s", "args": ("https://h/w?sig=hidden",)}))
    finally:
        logger.handlers, logger.propagate, level = before
        logger.setLevel(level)
    assert line.endswith("https://h/w?***")


def test_signed_urls_of_one_file_are_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAKSAM_CACHE", str(tmp_path))
    with small_s3() as server:
        server.objects["models/sam.safetensors"] = b"weights"
        uri = f"{server.endpoint}/models/sam.safetensors"
        path = fetch(f"{uri}?X-Amz-Signature=hidden", sha256=hashlib.sha256(b"weights").hexdigest())
        assert (path.name, path.suffix) == ("sam.safetensors", ".safetensors")
        assert fetch(f"{uri}?X-Amz-Signature=other") == path
        assert storage.identity(f"{uri}?X-Amz-Signature=hidden") == storage.identity(f"{uri}?X-Amz-Signature=other")
    assert "hidden" not in "".join(map(str, tmp_path.rglob("*")))
    assert without_secrets("https://u:p@host/a?b=c") == "https://host/a"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "x") for name in ("AZURE_STORAGE_KEY", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS_TOKEN")),
        *(
            (name, "x")
            for name in ("MY_SAS", "DB_PASS", "DB_PASSWORD", "PGPASSWORD", "AWS_SESSION_TOKEN", "SENTRY_DSN")
        ),
        ("HTTPS_PROXY", "http://user:word@proxy:3128"),
        ("DATABASE_URL", "postgresql://user:word@host/db"),
        ("PIP_INDEX_URL", "https://ghp_abc@host/simple"),
        ("STORE", "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=abc=="),
        ("WEIGHTS", "https://host/w.pth?X-Amz-Signature=abc"),
        ("WHO", "AKIA" + "A1B2" * 4),
        ("WHAT", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKE1"),
        ("PEM", "-----BEGIN RSA PRIVATE KEY-----"),
        *(
            (name, "x")
            for name in ("DBPASS", "SMTPPASS", "PGPASS", "DBPWD", "AUTHORIZATION", "CREDS", "GCP_CRED", "GH_PAT")
        ),
        ("HTTPS_PROXY", "user:pw@proxy:3128"),
        ("HEADER", "Basic dXNlcjpwdw=="),
        ("WHO", "github_pat_" + "11ABCDEFG0" * 3),
        ("WHO", "glpat-" + "x" * 20),
        ("WHO", "sk-proj-" + "aB3" * 10),
        ("WEIGHTS", "https://host/w.pth?access_key=abc"),
    ],
)
def test_names_and_values_of_credentials_are_recognised(name: str, value: str) -> None:
    assert is_secret(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_REGION", "us-east-1"),
        ("HTTPS_PROXY", "http://proxy:3128"),
        ("NO_PROXY", "localhost,.example.com"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("RAY_AUTH_MODE", "token"),
        ("WEAKSAM_GIT_COMMIT", "792a795c0ffee792a795c0ffee792a795c0ffee7"),
        ("OMP_NUM_THREADS", "1"),
        ("COMPASS", "north"),
        ("LD_LIBRARY_PATH", "/opt/a:/opt/b@2"),
        ("OLDPWD", "/home"),
        ("IMAGE", "ubuntu:22.04@sha256:abc"),
        ("MODELS", "s3://bucket/sk-learn-models-of-last-year"),
        ("HTTPS_PROXY", "proxy:3128"),
    ],
)
def test_other_variables_pass(name: str, value: str) -> None:
    assert not is_secret(name, value)
