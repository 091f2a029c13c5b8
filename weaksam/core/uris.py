"""What a URI names: a local path, or a place in a store. Nothing is read here.

A `file:` URI is that of RFC 8089: `file:///path`, `file:/path` or `file://localhost/path`, with %20 for a space.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote_to_bytes

from weaksam.errors import ConfigError
from weaksam.masking import has_credentials, masked_url

_FILE = "file:"
_LONGEST_PART = 255  # bytes of a name, on every file system in use


def is_uri(text: str) -> bool:
    """Whether `text` has a scheme; a plain path has none."""
    return "://" in text or text.startswith(_FILE)


def is_local(uri: str) -> bool:
    """Whether `uri` is a plain path or a `file:` URI."""
    return not is_uri(uri) or uri.startswith(_FILE)


def local_path(uri: str) -> Path:
    """The path of a local URI, absolute.

    Raises:
        ConfigError: a `file:` URI that names another machine or no absolute path.
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
    """`uri` in a form that means the same in every process; no trailing slash."""
    return str(local_path(uri)) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """`uri` with path parts behind it."""
    base = absolute(uri) if uri.startswith(_FILE) else uri  # the parts are names as they are, without %20
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def fault_of_folder(uri: str) -> str | None:
    """Why there can be no folder at a local `uri`; None if nothing is known against it."""
    if not is_local(uri):
        return None
    path = local_path(uri)
    for place in (path, *path.parents):
        if os.path.lexists(place):
            return None if place.is_dir() else f"{uri}: {place} is a file: name a folder"
    return None


def fault_of(uri: str) -> str | None:
    """Why `uri` cannot be used anywhere; None if nothing is known against it. Secrets are not repeated."""
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
    """Why no file, folder or object can have such a name; None if one could."""
    if "\0" in uri:
        return f"{uri!a}: holds a NUL character, which no name has"
    try:
        uri.encode()
    except UnicodeEncodeError:
        return f"{uri!a}: is not UTF-8: rename what it names"
    return None


def check_place(uri: str, what: str, *, is_folder: bool = False) -> None:
    """Raises ConfigError unless something may lie at `uri`, or be written there; `what` names the setting."""
    if (fault := fault_of(uri) or (fault_of_folder(uri) if is_folder else None)) is not None:
        raise ConfigError(f"{what}: {fault}")
