"""Clients of object stores, set for the servers there are: S3 and its kin, Google's, Azure's, what else fsspec knows.

Credentials come from where each store's own tools have them (environment, configuration file, role of the machine) and
are never part of a run file. An S3 server other than Amazon's is named by `endpoint` in a run file, which goes before
the environment's `AWS_ENDPOINT_URL_S3` and `AWS_ENDPOINT_URL`.
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
VARIABLES = (ENDPOINT_VARIABLE, ADDRESSING_VARIABLE)  # what a run file sets, and every process of a run must have

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
    return _object_store_at(scheme, bucket, s3_endpoint() if scheme == "s3" else None, s3_is_virtual())


def list_entries(files: pafs.FileSystem, path: str, *, recursive: bool) -> list[Entry]:
    """Everything below a folder as it is now; nothing when there is no such folder.

    An entry whose name is not UTF-8 has no URI: it is left out with a warning.

    Raises:
        NotADirectoryError: it is a file.
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


@functools.lru_cache(maxsize=64)  # a folder is listed several times: once is enough
def _warn_of_names(path: str, count: int, names: str) -> None:
    log.warning("%s: %d entries are left out, their names are not UTF-8: rename %s", path, count, names)


def s3_endpoint() -> str | None:
    """The S3 server that is named by the environment; None: Amazon's.

    Raises:
        ConfigError: it is no URL of one.
    """
    for name in (ENDPOINT_VARIABLE, "AWS_ENDPOINT_URL"):
        if url := os.environ.get(name):
            if (fault := _fault_of_endpoint(url)) is not None:
                raise ConfigError(f"{name}: {fault}")
            return url
    return None


def s3_is_virtual() -> bool:
    """Whether the environment asks for buckets by host name, https://bucket.host/key, also of a named server."""
    return os.environ.get(ADDRESSING_VARIABLE, "").lower() == "virtual"


@dataclass(frozen=True)
class S3Server:
    """The S3 server that a run file names; where it names none, the environment does.

    Attributes:
        endpoint: URL of the server, http://... or https://...
        addressing: `path` (https://host/bucket) or `virtual` (https://bucket.host).
    """

    endpoint: str | None = None
    addressing: str | None = None

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables by which a process, and those that it starts, find this server."""
        named = {ENDPOINT_VARIABLE: self.endpoint, ADDRESSING_VARIABLE: self.addressing}
        return {name: value for name, value in named.items() if value is not None}


def read_server(endpoint: Any, addressing: Any) -> tuple[S3Server, list[str]]:
    """The server of the keys `endpoint` and `addressing` of a run file, and a fault for each that is wrong."""
    faults = []
    if endpoint is not None and (fault := _fault_of_endpoint(endpoint)) is not None:
        faults.append(f"endpoint: {fault}")
    if addressing not in (None, "path", "virtual"):
        faults.append(
            f"addressing: must be path (https://host/bucket) or virtual (https://bucket.host), got {addressing!r}"
        )
    return (S3Server() if faults else S3Server(endpoint, addressing)), faults


def use_server(server: S3Server) -> None:
    """Makes this process and those that it starts read `s3://` URIs from `server`, by the environment."""
    os.environ.update(server.variables)


def _fault_of_endpoint(url: Any) -> str | None:
    """Why a value names no S3 server."""
    if isinstance(url, str) and "@" in url:
        return "holds credentials: leave them to the environment"
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        is_server = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
    except ValueError:  # a port that is none, brackets that are not closed
        is_server = False
    return None if is_server else f"must be the URL of an S3 server, http://... or https://..., got {url!r}"


def _object_store_at(scheme: str, bucket: str, endpoint: str | None, virtual: bool) -> pafs.FileSystem:
    return _object_store(scheme, bucket, endpoint, virtual, proxy_for(_url_of(scheme, bucket, endpoint)))


def _url_of(scheme: str, bucket: str, endpoint: str | None) -> str:
    """Where requests for a bucket go, as far as a proxy depends on it."""
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
    if proxy is not None:  # clients on aiohttp read the environment only when asked to
        options = {"client_kwargs": {"trust_env": True}} if scheme in ("http", "https") else options
        options = {"session_kwargs": {"trust_env": True}} if scheme in ("gs", "gcs") else options
    try:
        return pafs.PyFileSystem(FreshHandler(fsspec.filesystem(scheme, use_listings_cache=False, **options)))
    except ImportError as error:
        extra = f": pip install 'weaksam[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else ""
        raise ImportError(f"{error}{extra}") from error


class _S3(pafs.S3FileSystem):
    """Is made anew where it is unpickled: pyarrow's own forgets how often it is to try again, and gives up early."""

    def __init__(self, bucket: str, endpoint: str | None, virtual: bool, **options: Any) -> None:
        super().__init__(force_virtual_addressing=virtual, **options)
        self._made_of = ("s3", bucket, endpoint, virtual)

    def __reduce__(self) -> tuple[Any, ...]:
        return _object_store_at, self._made_of  # a proxy may have a password: each machine has its own


def _s3(bucket: str, endpoint: str | None, virtual: bool, proxy: str | None) -> pafs.S3FileSystem:
    # A client sends trailing checksums by default, which several S3 servers reject or store as data. There is no
    # argument for it: a client reads the variable when it is made.
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
        allow_delayed_open=True,  # a small object is one request instead of three
        retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=_ATTEMPTS),
        **where,
    )


def _region_of(bucket: str, proxy: str | None) -> str | None:
    """The region of one of Amazon's buckets; None where it is not known: the first request says why."""
    if proxy is None:
        with suppress(OSError):  # not allowed, or no such bucket
            return pafs.resolve_s3_region(bucket)
        return None
    # pyarrow's own question does not go through a proxy. Any answer of the store names the region, also a refusal.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({"https": proxy}))
    request = urllib.request.Request(f"https://s3.amazonaws.com/{bucket}", method="HEAD")
    try:
        with opener.open(request, timeout=_CONNECT_TIMEOUT) as answer:
            return answer.headers.get("x-amz-bucket-region")
    except urllib.error.HTTPError as error:
        return error.headers.get("x-amz-bucket-region")
    except OSError:
        return None
