"""fsspec stores as pyarrow file systems: no cached listings, and an unreachable store raises an error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pyarrow import fs as pafs

# Keys that fsspec stores use for the time of the last change, and for the version of the content
_MODIFIED = ("mtime", "last_modified", "LastModified", "updated", "modified", "Last-Modified")
_ETAG = ("etag", "ETag", "generation", "content_md5", "Content-MD5", "md5Hash", "checksum")


@dataclass(frozen=True)
class Entry:
    """An entry of a listing: `modified` in seconds since 1970, `etag` if the store has no such time."""

    path: str
    is_file: bool
    is_folder: bool
    size: int
    modified: float | None
    etag: str | None = None


class FreshHandler(pafs.FSSpecHandler):
    """An fsspec store without cached listings, in which a fault is not reported as a missing object.

    fsspec stores cache listings for the life of the process. pyarrow's own handler uses calls (`isfile`, `isdir`,
    `exists`, a tolerant `find`) that return False if the store is down or denies access.
    """

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        infos = []
        for path in paths:
            try:
                info = self._info(path)
            except FileNotFoundError:
                infos.append(pafs.FileInfo(path, pafs.FileType.NotFound))
                continue
            entry = _entry(path, info)
            kind = pafs.FileType.File if entry.is_file else pafs.FileType.Directory
            size = info.get("size") if entry.is_file else None
            infos.append(pafs.FileInfo(path, kind, size=size, mtime=entry.modified))
        return infos

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return [
            pafs.FileInfo(
                entry.path,
                pafs.FileType.File if entry.is_file else pafs.FileType.Directory,
                size=entry.size if entry.is_file else None,
                mtime=entry.modified,
            )
            for entry in self.entries(selector.base_dir, recursive=selector.recursive)
        ]

    def entries(self, base: str, *, recursive: bool) -> Iterator[Entry]:
        """Yields the entries below `base`; see `list_entries`."""
        self.fs.invalidate_cache()
        try:
            listing = self._find(base) if recursive else {info["name"]: info for info in self.fs.ls(base, detail=True)}
        except FileNotFoundError as error:
            _raise_fault(error)
            return
        for path, info in listing.items():
            if path.strip("/") != base.strip("/"):
                yield _entry(path, info)
            elif info["type"] == "file" and not path.endswith("/"):
                raise NotADirectoryError(base)

    def open_input_stream(self, path: str) -> Any:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> Any:
        from pyarrow import PythonFile

        if self._info(path)["type"] != "file":
            raise FileNotFoundError(path)
        return PythonFile(self.fs.open(path, mode="rb"), mode="r")

    def _info(self, path: str) -> dict[str, Any]:
        self.fs.invalidate_cache()
        try:
            return self.fs.info(path)
        except FileNotFoundError as error:
            _raise_fault(error)
            raise

    def _find(self, base: str) -> dict[str, Any]:
        from fsspec import AbstractFileSystem
        from fsspec.asyn import AsyncFileSystem

        kind = type(self.fs)
        walks = (
            kind._find is AsyncFileSystem._find
            if issubclass(kind, AsyncFileSystem)
            else kind.find is AbstractFileSystem.find
        )
        # The generic walk of fsspec skips folders that it cannot list; stores with their own listing do not.
        return self.fs.find(base, withdirs=True, detail=True, **({"on_error": "raise"} if walks else {}))


def _raise_fault(error: FileNotFoundError) -> None:
    """Raises the original fault if an fsspec client reported it as a missing object."""
    cause = error.__cause__
    status = getattr(cause, "status", None)
    if cause is None or isinstance(cause, (FileNotFoundError, KeyError)) or status in (404, 410):
        return
    if status in (401, 403):
        raise PermissionError(f"HTTP status {status}") from error
    raise OSError(f"{type(cause).__name__}: {cause}") from error


def _entry(path: str, info: dict[str, Any]) -> Entry:
    modified = next((info[key] for key in _MODIFIED if info.get(key) is not None), None)
    seconds = modified.timestamp() if isinstance(modified, datetime) else modified
    etag = next((str(info[key]) for key in _ETAG if info.get(key)), None)
    if not isinstance(seconds, (int, float)):
        seconds, etag = None, etag if modified is None else f"{etag or ''} {modified}"
    is_file = info["type"] == "file" and not path.endswith("/")  # an object whose name ends with / only marks a folder
    return Entry(path, is_file, info["type"] == "directory", int(info.get("size") or 0), seconds, etag)
