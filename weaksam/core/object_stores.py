"""Configured clients of object stores: S3 and compatible servers, GCS, Azure and any other scheme of fsspec.

Credentials come from the sources of each store's own tools (environment, configuration file, role of the machine) and
are never part of a run file. The key `endpoint` of a run file names an S3 server other than Amazon's; it takes
precedence over the environment's `AWS_ENDPOINT_URL_S3` and `AWS_ENDPOINT_URL`.
"""

from __future__ import annotations

import functools
import logging
import os
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pyarrow import fs as pafs

from weaksam.core.fsspec_stores import Entry, FreshHandler
from weaksam.core.proxies import proxy_for, proxy_options
from weaksam.errors import ConfigError

log = logging.getLogger(__name__)

ENDPOINT_VARIABLE = "AWS_ENDPOINT_URL_S3"
ADDRESSING_VARIABLE = "AWS_S3_ADDRESSING_STYLE"
VARIABLES = (ENDPOINT_VARIABLE, ADDRESSING_VARIABLE)  # set from a run file; required in every process of a run

_ATTEMPTS = 10  # per request; the standard strategy has a budget of attempts for all requests, which runs out
_CONNECT_TIMEOUT = 10.0  # seconds
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure", "adl": "azure"}


def object_store(scheme: str, bucket: str) -> pafs.FileSystem:
    """Returns the client of a bucket; clients are cached.

    Raises:
        ImportError: the package for the scheme is not installed.
        ValueError: the scheme is unknown.
        OSError: the store cannot be reached.
    """
    return _object_store_at(scheme, bucket, s3_endpoint() if scheme == "s3" else None, s3_is_virtual())


def list_entries(files: pafs.FileSystem, path: str, *, recursive: bool) -> list[Entry]:
    """Returns all entries below a folder, uncached; an empty list if there is no such folder.

    An entry whose name is not UTF-8 has no URI: it is skipped with a warning.

    Raises:
        NotADirectoryError: `path` is a file.
    """
    handler = files.handler if isinstance(files, pafs.PyFileSystem) else None
    if isinstance(handler, FreshHandler):
        return list(handler.entries(path, recursive=recursive))
    entries, unreadable = [], []
    for info in files.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=recursive)):
        modified = info.mtime_ns / 1e9 if info.mtime_ns is not None else None
        is_file, is_folder = (info.type == kind for kind in (pafs.FileType.File, pafs.FileType.Directory))
        try:
            entries.append(Entry(info.path, is_file, is_folder, info.size or 0, modified))
        except UnicodeDecodeError as error:
            unreadable.append(bytes(error.object))
    if unreadable:
        _warn_of_names(path, len(unreadable), ", ".join(ascii(name)[2:-1] for name in sorted(unreadable)[:10]))
    return entries


@functools.lru_cache(maxsize=64)  # a folder is listed several times: warn once
def _warn_of_names(path: str, count: int, names: str) -> None:
    log.warning("%s: %d entries are left out, their names are not UTF-8: rename %s", path, count, names)


def s3_endpoint() -> str | None:
    """Returns the URL of the S3 server in the environment; None: Amazon's.

    Raises:
        ConfigError: the value is not the URL of a server.
    """
    for name in (ENDPOINT_VARIABLE, "AWS_ENDPOINT_URL"):
        if url := os.environ.get(name):
            if (fault := _fault_of_endpoint(url)) is not None:
                raise ConfigError(f"{name}: {fault}")
            return url
    return None


def s3_is_virtual() -> bool:
    """Whether the environment selects virtual-hosted addresses, https://bucket.host/key, for any server."""
    return os.environ.get(ADDRESSING_VARIABLE, "").lower() == "virtual"


@dataclass(frozen=True)
class S3Server:
    """The S3 server of a run file; fields that are None are left to the environment.

    Attributes:
        endpoint: URL of the server, http://... or https://...
        addressing: `path` (https://host/bucket) or `virtual` (https://bucket.host).
    """

    endpoint: str | None = None
    addressing: str | None = None

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables that select this server in a process and its children."""
        named = {ENDPOINT_VARIABLE: self.endpoint, ADDRESSING_VARIABLE: self.addressing}
        return {name: value for name, value in named.items() if value is not None}


def read_server(endpoint: Any, addressing: Any) -> tuple[S3Server, list[str]]:
    """Returns the server of the keys `endpoint` and `addressing` of a run file, and a fault for each wrong key."""
    faults = []
    if endpoint is not None and (fault := _fault_of_endpoint(endpoint)) is not None:
        faults.append(f"endpoint: {fault}")
    if addressing not in (None, "path", "virtual"):
        faults.append(
            f"addressing: must be path (https://host/bucket) or virtual (https://bucket.host), got {addressing!r}"
        )
    return (S3Server() if faults else S3Server(endpoint, addressing)), faults


def use_server(server: S3Server) -> None:
    """Sets the environment so that this process and its children read `s3://` URIs from `server`."""
    os.environ.update(server.variables)


def _fault_of_endpoint(url: Any) -> str | None:
    """Returns why a value is not the URL of an S3 server; None if it is."""
    if isinstance(url, str) and "@" in url:
        return "holds credentials: leave them to the environment"
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        is_server = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
    except ValueError:  # an invalid port or unbalanced brackets
        is_server = False
    return None if is_server else f"must be the URL of an S3 server, http://... or https://..., got {url!r}"


def _object_store_at(scheme: str, bucket: str, endpoint: str | None, virtual: bool) -> pafs.FileSystem:
    return _object_store(scheme, bucket, endpoint, virtual, proxy_for(_url_of(scheme, bucket, endpoint)))


def _url_of(scheme: str, bucket: str, endpoint: str | None) -> str:
    """Returns the URL that requests for a bucket go to, precise enough to choose a proxy."""
    if scheme in ("http", "https"):
        return f"{scheme}://{bucket}"
    if scheme in ("gs", "gcs"):
        return os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
    return endpoint or f"https://{bucket}.s3.amazonaws.com"


@functools.lru_cache(maxsize=32)
def _object_store(scheme: str, bucket: str, endpoint: str | None, virtual: bool, proxy: str | None) -> pafs.FileSystem:
    if scheme == "s3":
        return _s3(bucket, endpoint, virtual, proxy)
    import fsspec

    options: dict[str, Any] = {}
    if proxy is not None:  # aiohttp clients ignore the environment by default
        options = {"client_kwargs": {"trust_env": True}} if scheme in ("http", "https") else options
        options = {"session_kwargs": {"trust_env": True}} if scheme in ("gs", "gcs") else options
    try:
        return pafs.PyFileSystem(FreshHandler(fsspec.filesystem(scheme, use_listings_cache=False, **options)))
    except ImportError as error:
        extra = f": pip install 'weaksam[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else ""
        raise ImportError(f"{error}{extra}") from error


class _S3(pafs.S3FileSystem):
    """S3 client that is rebuilt when it is unpickled: pyarrow's own loses its retry strategy and gives up early."""

    def __init__(self, bucket: str, endpoint: str | None, virtual: bool, **options: Any) -> None:
        super().__init__(force_virtual_addressing=virtual, **options)
        self._made_of = ("s3", bucket, endpoint, virtual)

    def __reduce__(self) -> tuple[Any, ...]:
        return _object_store_at, self._made_of  # not the proxy: it may have a password; each machine has its own


def _s3(bucket: str, endpoint: str | None, virtual: bool, proxy: str | None) -> pafs.S3FileSystem:
    # Clients send trailing checksums by default, which several S3 servers reject or store as data. There is no
    # argument to disable them: a client reads this variable when it is created.
    os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    where: dict[str, Any] = {}
    if endpoint is not None:
        scheme, _, host = endpoint.rstrip("/").partition("://")
        where = {"scheme": scheme, "endpoint_override": host}
    elif region is None:
        region = _region_of(bucket, proxy)
    if proxy is not None:
        where["proxy_options"] = proxy_options(proxy)
    return _S3(
        bucket,
        endpoint,
        virtual,
        region=region or "us-east-1",
        connect_timeout=_CONNECT_TIMEOUT,
        allow_delayed_open=True,  # reading a small object takes one request instead of three
        retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=_ATTEMPTS),
        **where,
    )


def _region_of(bucket: str, proxy: str | None) -> str | None:
    """Returns the region of an Amazon bucket; None if it cannot be determined: the first request reports why."""
    if proxy is None:
        with suppress(OSError):  # not allowed, or no such bucket
            return pafs.resolve_s3_region(bucket)
        return None
    # pyarrow's own lookup does not use a proxy. Every response of S3 contains the region, even an error.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({"https": proxy}))
    request = urllib.request.Request(f"https://s3.amazonaws.com/{bucket}", method="HEAD")
    try:
        with opener.open(request, timeout=_CONNECT_TIMEOUT) as answer:
            return answer.headers.get("x-amz-bucket-region")
    except urllib.error.HTTPError as error:
        return error.headers.get("x-amz-bucket-region")
    except OSError:
        return None
