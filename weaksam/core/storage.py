"""Reads and writes URIs: local paths, `file:`, `s3://`, `gs://`, `memory://` and any other scheme of fsspec.

A write is atomic (local: temporary file and rename; object store: one PUT), so a reader gets the whole object or
none. Faults of network and permission raise `StorageError`; a missing object raises `FileNotFoundError`, because only
the caller knows whether that is a fault; a file that was altered after it was written raises `DamagedError`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs as pafs

from weaksam.core.filesystems import filesystem, request
from weaksam.core.object_stores import list_entries
from weaksam.core.uris import absolute as absolute
from weaksam.core.uris import is_local, join, local_path
from weaksam.core.uris import is_uri as is_uri
from weaksam.errors import ConfigError, DamagedError, MissingFileError

SIZES_ALONE = "(sizes alone)"


@dataclass(frozen=True)
class FileInfo:
    """A file of a listing: `path` is relative to the listed folder, `modified` is in seconds since 1970.

    `etag` is set if the store has no modification times.
    """

    uri: str
    path: str
    size: int
    modified: float | None
    etag: str | None = None


def relative_to(folder: str, uri: str) -> str | None:
    """Returns the path of `uri` below `folder` ("" for the folder itself), symlinks resolved; None if not inside."""
    folder, uri = (
        os.path.realpath(local_path(location)) if is_local(location) else location for location in (folder, uri)
    )
    folder, uri = folder.rstrip("/") + "/", uri.rstrip("/") + "/"
    return uri[len(folder) :].rstrip("/") if uri.startswith(folder) else None


def read_bytes(uri: str, *, offset: int = 0, length: int | None = None) -> bytes:
    """Reads an object, or `length` bytes of it from `offset`.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: the object could not be read.
    """

    def read() -> bytes:
        files, path = filesystem(uri)
        if offset == 0 and length is None:
            with files.open_input_stream(path, compression=None) as stream:
                return stream.read()
        with files.open_input_file(path) as handle:
            handle.seek(offset)
            return handle.read(length) if length is not None else handle.read()

    return request(read, uri, "read")


def read_replaceable(uri: str) -> bytes:
    """Reads a small object that may be replaced at the same time, as one writer wrote it.

    pyarrow reads as many bytes as the object had when it was opened. If a shorter object replaces it, the rest is
    uninitialised memory; if a longer one does, its end is missing. Sizes are therefore compared after reading.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: the object could not be read, or was replaced during every attempt.
    """

    def read() -> bytes:
        files, path = filesystem(uri)
        before = files.get_file_info(path)
        with files.open_input_stream(path, compression=None) as stream:
            data = stream.read()
        after = files.get_file_info(path)
        if len(data) == after.size and (before.size, before.mtime) == (after.size, after.mtime):
            return data
        raise OSError("it was replaced while it was read")

    return read_bytes(uri) if is_local(uri) else request(read, uri, "read")


def write_bytes(uri: str, data: bytes) -> None:
    """Writes an object atomically, replacing an existing one."""

    def write() -> None:
        files, path = filesystem(uri)
        if is_local(uri):
            _write_local(Path(path), data)
        else:
            with files.open_output_stream(path) as stream:
                stream.write(data)

    request(write, uri, "write")


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """Returns a new, short name in the folder of `path`: the name of `path` may have the maximum length already.

    The leading dot keeps files of killed processes out of listings.
    """
    return path.with_name(f".{uuid.uuid4().hex}.tmp")


def read_json(uri: str) -> dict:
    """Reads a JSON object; raises DamagedError if the content is not JSON."""
    try:
        return json.loads(read_replaceable(uri))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{uri}: not valid JSON ({error}): remove the file if it is damaged") from error


def write_json(uri: str, value: dict) -> None:
    """Writes a dict as indented JSON, in its key order; raises ValueError for NaN or inf, which JSON does not have."""
    write_bytes(uri, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def delete(uri: str) -> None:
    """Deletes an object if it exists."""
    files, path = filesystem(uri)
    with suppress(FileNotFoundError):
        request(lambda: files.delete_file(path), uri, "delete")


def exists(uri: str) -> bool:
    """Whether a file or folder exists."""

    def look() -> bool:
        files, path = filesystem(uri)
        return files.get_file_info(path).type != pafs.FileType.NotFound

    try:
        return request(look, uri, "look up")
    except FileNotFoundError:  # not a valid name of a file
        return False


def size(uri: str) -> int:
    """Returns the size of an object in bytes; 0 if it does not exist."""

    def look() -> int:
        files, path = filesystem(uri)
        return files.get_file_info(path).size or 0

    try:
        return request(look, uri, "look up")
    except FileNotFoundError:
        return 0


def list_files(uri: str, *, recursive: bool = True) -> list[FileInfo]:
    """Lists the files below a folder, sorted by path, without hidden and temporary files (leading dot).

    A folder that does not exist is empty. No file is opened. A file whose name is not UTF-8 has no URI: it is skipped
    with a warning.

    Raises:
        ConfigError: `uri` is a file.
    """
    base = filesystem(uri)[1].rstrip("/") + "/"
    try:
        entries = request(lambda: list_entries(*filesystem(uri), recursive=recursive), uri, "list")
    except FileNotFoundError:  # not a valid name of a folder
        return []
    except NotADirectoryError as error:
        raise ConfigError(f"{uri}: a file, not a folder: name the folder") from error
    files = []
    for entry in entries:
        path = (
            entry.path[len(base) :]
            if entry.path.startswith(base)
            else entry.path.lstrip("/").removeprefix(base.lstrip("/"))
        )
        if entry.is_file and not any(part.startswith(".") for part in path.split("/")):
            files.append(FileInfo(join(uri, path), path, entry.size, entry.modified, entry.etag))
    return sorted(files, key=lambda file: file.path)


def list_folders(uri: str) -> list[str]:
    """Lists the names of the folders directly below `uri`, sorted; empty if there is no such folder.

    Raises:
        ConfigError: `uri` is a file.
    """
    try:
        entries = request(lambda: list_entries(*filesystem(uri), recursive=False), uri, "list")
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise ConfigError(f"{uri}: a file, not the folder of a run or of a dataset: name the folder") from error
    return sorted(entry.path.rstrip("/").rpartition("/")[2] for entry in entries if entry.is_folder)


def identity(uri: str) -> str:
    """Returns an id of a file's content: its size with its SHA-256 (local) or ETag (object store).

    Raises:
        MissingFileError: there is no such file.
        StorageError: the file cannot be read.
    """
    files, path = filesystem(uri)
    try:
        info = request(lambda: files.get_file_info(path), uri, "look up")
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(uri)
        if is_local(uri):
            return f"{info.size}-{request(lambda: sha256_of(path, info.size, info.mtime_ns), uri, 'read')}"
        etag = request(lambda: _etag(files, path), uri, "read")
    except FileNotFoundError as error:
        raise MissingFileError(f"{uri}: no such file: check the path") from error
    if etag is None:  # a store without ETags: hash the content
        return f"{info.size}-{hashlib.sha256(read_bytes(uri)).hexdigest()}"
    return f"{info.size}-{etag}"


def _etag(files: pafs.FileSystem, path: str) -> str | None:
    with files.open_input_stream(path, compression=None) as stream:
        metadata = {_text(key): _text(value) for key, value in (stream.metadata() or {}).items()}
    return metadata["ETag"].strip('"') if "ETag" in metadata else None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def listing_identity(files: list[FileInfo]) -> str:
    """Returns an id that changes when a file of a listing is added, removed or rewritten. No file is opened.

    It ends with `SIZES_ALONE` if the store has neither modification times nor ETags.
    """
    digest = hashlib.sha256()
    for file in files:
        version = file.modified if file.modified is not None else file.etag
        digest.update(f"{file.path}\0{file.size}\0{version}\n".encode())
    by_size = any(file.modified is None and file.etag is None for file in files)
    return f"{len(files)} files {digest.hexdigest()[:16]}" + (f" {SIZES_ALONE}" if by_size else "")


@functools.lru_cache(maxsize=64)
def sha256_of(path: str, size: int, modified_ns: int) -> str:
    """Returns the SHA-256 of a local file; a file rewritten in place is hashed again."""
    del size, modified_ns  # part of the cache key
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
