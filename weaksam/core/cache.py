"""Local copies of remote files, in a folder of this machine."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from weaksam.core import storage
from weaksam.core.filesystems import filesystem, request
from weaksam.core.uris import is_local, local_path
from weaksam.errors import ConfigError, MissingFileError, WeightsError
from weaksam.masking import without_secrets


def cache_folder() -> Path:
    """Returns `$WEAKSAM_CACHE`, else `~/.cache/weaksam`, else a folder in /tmp if the home folder is not writable.

    Raises:
        ConfigError: the folder in /tmp belongs to another user.
    """
    if named := os.environ.get("WEAKSAM_CACHE"):
        return Path(named).expanduser()
    try:
        folder = Path.home() / ".cache" / "weaksam"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        pass
    folder = Path(tempfile.gettempdir()) / f"weaksam-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder}: belongs to another user: set WEAKSAM_CACHE to a folder of your own")
    return folder


def fetch(uri: str, *, sha256: str | None = None) -> Path:
    """Returns a local path with the content of `uri`: its own path if local, else a copy in the node's cache.

    The cache is `cache_folder`; a copy is made once per content.

    Raises:
        WeightsError: the SHA-256 is not `sha256`.
        MissingFileError: there is no such file.
        StorageError: the file cannot be read.
    """
    path = local_path(uri) if is_local(uri) else _cached(uri)
    if not path.is_file():
        raise MissingFileError(f"{uri}: no such file: check the path")
    if sha256 is not None:
        stat = path.stat()
        digest = storage.sha256_of(str(path), stat.st_size, stat.st_mtime_ns)
        if digest != sha256.lower():
            raise WeightsError(f"{uri}: SHA-256 is {digest}, {sha256.lower()} was asked for: download the file again")
    return path


def _cached(uri: str) -> Path:
    cache = cache_folder()
    named = without_secrets(uri)  # a new signature of a URL does not cause another copy
    key = hashlib.sha256(f"{named}\0{storage.identity(uri)}".encode()).hexdigest()[:16]
    path = cache / key / named.rstrip("/").rsplit("/", 1)[-1]
    if not path.is_file():
        request(lambda: _copy(uri, path), uri, "read")
    return path


def _copy(uri: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files, remote = filesystem(uri)
    temporary = storage.temporary_beside(path)
    try:
        with files.open_input_stream(remote, compression=None) as stream, open(temporary, "wb") as copy:
            while block := stream.read(1 << 22):
                copy.write(block)
        os.replace(temporary, path)  # each concurrent process writes a whole file; the last one remains
    finally:
        temporary.unlink(missing_ok=True)
