"""The filesystem of a URI, and requests to it, which are retried."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pyarrow import fs as pafs

# first: it sets variables that clients read when they are imported
from weaksam.core.object_stores import object_store
from weaksam.core.storage_faults import retrying
from weaksam.core.uris import fault_of, fault_of_text, is_local, local_path
from weaksam.errors import ConfigError, StorageError
from weaksam.masking import has_credentials

T = TypeVar("T")


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Returns the pyarrow filesystem of `uri` and the path inside it.

    Raises:
        ConfigError: the URI cannot be used, contains credentials, or has an unknown scheme.
        StorageError: the store cannot be reached.
    """
    if (fault := fault_of_text(uri)) is not None:
        raise ConfigError(fault)
    if is_local(uri):
        return pafs.LocalFileSystem(), str(local_path(uri))
    if has_credentials(uri):
        raise ConfigError(str(fault_of(uri)))
    scheme, _, rest = uri.partition("://")
    try:
        inside = uri if scheme in ("http", "https") else rest.rstrip("/")  # fsspec needs the full URL
        return object_store(scheme, rest.split("/")[0]), inside
    except (ImportError, ValueError) as error:  # no request was made: the same command would fail again
        raise ConfigError(f"{uri}: cannot be used ({error}): check the URI and its scheme") from error
    except OSError as error:
        raise StorageError(f"{uri}: cannot be reached ({error})") from error


def request(action: Callable[[], T], uri: str, doing: str) -> T:
    """Returns the result of a request to a store, retried as `retrying` says; messages say what it was `doing`."""
    return retrying(action, uri, doing, ask=lambda: _reason(uri))


def _reason(uri: str) -> str:
    """Returns why a store denies access, from a request whose error has a text; empty if that request succeeds."""
    if not uri.startswith("s3://"):
        return ""
    files, path = filesystem(uri)
    try:
        files.get_file_info(pafs.FileSelector(f"{path.split('/')[0]}/.weaksam-no-such-folder", allow_not_found=True))
    except OSError as error:
        return str(error)
    return ""
