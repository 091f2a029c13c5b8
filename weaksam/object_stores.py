"""Clients of object stores, set for the servers there are: S3 and its kin, Google's, Azure's, what else fsspec knows.

Credentials come from where each store's own tools have them (environment, configuration file, role of the machine) and
are never part of a run file. An S3 server other than Amazon's is named by `endpoint` in a run file, which goes before
the environment's `AWS_ENDPOINT_URL_S3` and `AWS_ENDPOINT_URL`.
"""

from __future__ import annotations

import functools
import os
from contextlib import suppress
from typing import Any

# pyarrow's S3 client sends trailing checksums by default, which several S3 servers reject or store as data.
os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")

from pyarrow import fs as pafs

ENDPOINT_VARIABLE = "AWS_ENDPOINT_URL_S3"

_ATTEMPTS = 10  # within the client; the standard strategy shares its attempts between all requests and runs out
_CONNECT_TIMEOUT = 10.0  # seconds
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure", "adl": "azure"}


def object_store(scheme: str, bucket: str) -> pafs.FileSystem:
    """The client of a bucket; the same one each time.

    Raises:
        ImportError: the package that knows the scheme is not installed.
        ValueError: nobody knows the scheme.
        OSError: the store cannot be reached.
    """
    return _object_store(scheme, bucket, s3_endpoint())


def s3_endpoint() -> str | None:
    """The S3 server that is named by the environment; None: Amazon's."""
    return os.environ.get(ENDPOINT_VARIABLE) or os.environ.get("AWS_ENDPOINT_URL") or None


def use_s3_endpoint(url: Any) -> list[str]:
    """Names the S3 server for this process and those that it starts; a list of faults if this is no URL of one."""
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        return [f"endpoint: must be the URL of an S3 server, http://... or https://..., got {url!r}"]
    if "@" in url:
        return ["endpoint: holds credentials: leave them to the environment"]
    os.environ[ENDPOINT_VARIABLE] = url
    return []


@functools.lru_cache(maxsize=32)
def _object_store(scheme: str, bucket: str, endpoint: str | None) -> pafs.FileSystem:
    if scheme == "s3":
        return _s3(bucket, endpoint)
    import fsspec

    try:
        return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem(scheme)))
    except ImportError as error:
        extra = f": pip install 'weaksam[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else ""
        raise ImportError(f"{error}{extra}") from error


class _S3(pafs.S3FileSystem):
    """Is made anew where it is unpickled: pyarrow's own forgets how often it is to try again, and gives up early."""

    def __init__(self, bucket: str, endpoint: str | None, **options: Any) -> None:
        super().__init__(**options)
        self._made_of = ("s3", bucket, endpoint)

    def __reduce__(self) -> tuple[Any, ...]:
        return _object_store, self._made_of


def _s3(bucket: str, endpoint: str | None) -> pafs.S3FileSystem:
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    where: dict[str, str] = {}
    if endpoint is not None:
        scheme, separator, host = endpoint.rstrip("/").partition("://")
        if not separator or scheme not in ("http", "https"):
            raise ValueError(f"the S3 endpoint {endpoint!r} must begin with http:// or https://")
        where = {"scheme": scheme, "endpoint_override": host}
    elif region is None:
        with suppress(OSError):  # not allowed, or no such bucket: the first request says so
            region = pafs.resolve_s3_region(bucket)
    return _S3(
        bucket,
        endpoint,
        region=region or "us-east-1",
        connect_timeout=_CONNECT_TIMEOUT,
        allow_delayed_open=True,  # a small object is one request instead of three
        retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=_ATTEMPTS),
        **where,
    )
