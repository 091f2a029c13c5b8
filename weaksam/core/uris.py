"""Parses URIs of local paths and stores, without reading anything.

A `file:` URI has the form of RFC 8089: `file:///path`, `file:/path` or `file://localhost/path`, with %20 for a space.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote_to_bytes

from weaksam.errors import ConfigError
from weaksam.masking import has_credentials, masked_url

_FILE = "file:"
_LONGEST_PART = 255  # bytes of a file name, on all common file systems


def is_uri(text: str) -> bool:
    """Whether `text` has a scheme; a plain path has none."""
    return "://" in text or text.startswith(_FILE)


def is_local(uri: str) -> bool:
    """Whether `uri` is a plain path or a `file:` URI."""
    return not is_uri(uri) or uri.startswith(_FILE)


def local_path(uri: str) -> Path:
    """Returns the absolute path of a local URI.

    Raises:
        ConfigError: a `file:` URI with another machine or without an absolute path.
    """
    if not uri.startswith(_FILE):
        return Path(os.path.abspath(os.path.expanduser(uri)))
    path = uri.removeprefix(_FILE)
    if path.startswith("//"):
        host, slash, rest = path[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise ConfigError(
                f"{uri}: names the machine {host!r}: the URI of a file here is file:///absolute/path, or give its path"
            )
        path = slash + rest
    decoded = os.fsdecode(unquote_to_bytes(os.fsencode(path)))
    if not decoded.startswith("/") or "\0" in decoded:
        raise ConfigError(f"{uri}: no absolute path: the URI of a file here is file:///absolute/path, or give its path")
    return Path(os.path.abspath(decoded))


def absolute(uri: str) -> str:
    """Returns `uri` independent of the working directory, without a trailing slash."""
    return str(local_path(uri)) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """Returns `uri` with path parts appended."""
    base = absolute(uri) if uri.startswith(_FILE) else uri  # parts are plain names, not percent-encoded
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def fault_of_folder(uri: str) -> str | None:
    """Returns why a local `uri` cannot be a folder; None if it can."""
    if not is_local(uri):
        return None
    path = local_path(uri)
    for place in (path, *path.parents):
        if os.path.lexists(place):
            return None if place.is_dir() else f"{uri}: {place} is a file: name a folder"
    return None


def fault_of(uri: str) -> str | None:
    """Returns why `uri` is invalid, with secrets masked; None if it is valid."""
    if has_credentials(uri):
        return f"{masked_url(uri)}: holds credentials, which would be stored and shown: leave them to the environment"
    if (fault := fault_of_text(uri)) is not None or not is_local(uri):
        return fault
    try:
        path = local_path(uri)
    except ConfigError as error:
        return str(error)
    if long := [part for part in path.parts if len(os.fsencode(part)) > _LONGEST_PART]:
        length = len(os.fsencode(long[0]))
        return f"{long[0][:40]}... has {length} bytes, a name of a file or folder {_LONGEST_PART} at most"
    return None


def fault_of_text(uri: str) -> str | None:
    """Returns why `uri` cannot be the name of a file, folder or object; None if it can."""
    if "\0" in uri:
        return f"{uri!a}: holds a NUL character, which no name has"
    try:
        uri.encode()
    except UnicodeEncodeError:
        return f"{uri!a}: is not UTF-8: rename what it names"
    return None


def check_place(uri: str, what: str, *, is_folder: bool = False) -> None:
    """Raises ConfigError if `uri` cannot be read or written, by its form alone; `what` names the setting."""
    if (fault := fault_of(uri) or (fault_of_folder(uri) if is_folder else None)) is not None:
        raise ConfigError(f"{what}: {fault}")
