"""How images enter a callable and rows leave it: bytes fetched with a status, one part written a task.

A callable is a plain class, `Callable(**kwargs)(batch) -> pa.Table`: `batch` has the source's columns and `data`
(bytes or null), `status`, `message`; the result has the step's schema, a row an image.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from ray.data import Datasink

from weaksam.core import schemas, storage, tables
from weaksam.data.images import decode_image
from weaksam.errors import ImageError, StorageError, WeakSamError
from weaksam.execution import metrics
from weaksam.execution.times import FETCH_SECONDS, TimesWriter, take_fetch_seconds
from weaksam.masking import masked_url

_FETCH_THREADS = 8
_GIVEN = (schemas.GIVEN_STATUS, schemas.GIVEN_MESSAGE)
_FETCHED = (("data", pa.large_binary()), ("status", pa.string()), ("message", pa.string()))


def decode_ahead(batch: pa.Table, max_pixels: int) -> Iterator[np.ndarray | ImageError]:
    """Images of fetched rows in order, the next one decoded in a thread while the caller works on this one."""

    def decode(row: int) -> np.ndarray | ImageError:
        status = batch.column("status")[row].as_py()
        if status != schemas.OK:
            return ImageError(status, batch.column("message")[row].as_py())
        try:
            return decode_image(batch.column("data")[row].as_py(), max_pixels=max_pixels)
        except ImageError as error:
            return error

    if not batch.num_rows:
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(decode, 0)
        for row in range(batch.num_rows):
            image = ahead.result()
            if row + 1 < batch.num_rows:
                ahead = pool.submit(decode, row + 1)
            yield image


def make_rows(
    batch: pa.Table,
    max_pixels: int,
    make: Callable[[np.ndarray, dict[str, Any], Any], dict[str, Any]],
    *,
    prepare: Callable[[np.ndarray, dict[str, Any]], Any] = lambda *_: None,
) -> list[dict[str, Any]]:
    """A row for each fetched image: its size and what `make` knows of it, or why there is nothing to know.

    Args:
        batch: fetched rows.
        max_pixels: larger images are refused.
        make: of an image (H, W, 3) uint8, the other columns of its row and what was prepared; may raise ImageError.
        prepare: the same of an image and its columns, done for the next image before `make` of one: a GPU has work
            while the program is busy with what came of it. May raise ImageError.
    """
    given = batch.drop_columns([name for name, _ in _FETCHED]).to_pylist()
    rows = []
    for own, image, prepared in _prepare_ahead(given, decode_ahead(batch, max_pixels), prepare):
        try:
            if isinstance(image, ImageError):
                raise image
            row = {"image_id": own["image_id"], "status": schemas.OK, "message": ""}
            rows.append(row | {"height": image.shape[0], "width": image.shape[1]} | make(image, own, prepared))
        except ImageError as error:
            rows.append(failed_row(own["image_id"], error.status, error.message))
    return rows


def _prepare_ahead(
    given: list[dict[str, Any]],
    images: Iterator[np.ndarray | ImageError],
    prepare: Callable[[np.ndarray, dict[str, Any]], Any],
) -> Iterator[tuple[dict[str, Any], np.ndarray | ImageError, Any]]:
    """Columns, image and what was prepared, one row late."""
    last = None
    for own, image in zip(given, images, strict=True):
        ready = own, image, None
        try:
            if not isinstance(image, ImageError):
                ready = own, image, prepare(image, own)
        except ImageError as error:
            ready = own, error, None
        if last is not None:
            yield last
        last = ready
    if last is not None:
        yield last


def failed_row(image_id: str, status: str, message: str) -> dict[str, Any]:
    """The row of an image that could not be used; its other columns become null."""
    return {"image_id": image_id, "status": status, "message": message[:500]}


class Fetch:
    """Adds `data`, `status`, `message` to rows with a `uri`.

    A missing object is the image's own fault and becomes its status, unless all of `folder` is gone, too. That and any
    other fault is the storage's: the row is left out and so tried again by a later pass, or raised when `strict`. With
    `timed` a column tells what it took. Of a row that failed in an earlier step (`given_status`) nothing is fetched: it
    keeps its status.
    """

    def __init__(self, *, strict: bool = False, timed: bool = False, folder: str | None = None) -> None:
        self.strict, self.timed, self.folder = strict, timed, folder

    def __call__(self, batch: pa.Table) -> pa.Table:
        began = time.monotonic()
        with ThreadPoolExecutor(_FETCH_THREADS) as pool:
            fetched = list(pool.map(self._fetch, batch.column("uri").to_pylist(), *_given_states(batch)))
        batch = batch.drop_columns([name for name in _GIVEN if name in batch.column_names])
        for index, (name, kind) in enumerate(_FETCHED):
            values = [None if row is None else row[index] for row in fetched]
            batch = batch.append_column(name, pa.array(values, kind))
        if self.timed:
            share = (time.monotonic() - began) / max(batch.num_rows, 1)
            batch = batch.append_column(FETCH_SECONDS, pa.array([share] * batch.num_rows, pa.float64()))
        return batch.filter(pa.array([row is not None for row in fetched], pa.bool_()))

    def _fetch(self, uri: str, status: str, message: str) -> tuple[bytes | None, str, str] | None:
        if status != schemas.OK:
            return None, status, message
        try:
            return self._read(uri)
        except StorageError:
            if self.strict:
                raise
            return None

    def _read(self, uri: str) -> tuple[bytes | None, str, str]:
        try:
            return storage.read_bytes(uri), schemas.OK, ""
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            if self.folder is not None and is_gone(self.folder):
                raise StorageError(
                    f"{self.folder}: the folder of the images is gone or empty: the same command goes on once it is "
                    "back"
                ) from None
            return None, schemas.NOT_FOUND, f"{masked_url(uri)}: no such object"


def _given_states(batch: pa.Table) -> tuple[list[str], list[str]]:
    """Status and message that each row was given; ok, and none, where the step reads no earlier rows."""
    if schemas.GIVEN_STATUS not in batch.column_names:
        return [schemas.OK] * batch.num_rows, [""] * batch.num_rows
    status, message = (batch.column(name).to_pylist() for name in _GIVEN)
    return status, message


def common_folder(uris: Sequence[str]) -> str | None:
    """The innermost folder that all of `uris` are below; None where that cannot be looked at."""
    first, last = min(uris), max(uris)  # what these two share, all share
    length = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    shared = first[:length].rpartition("/")[0]
    if shared.startswith(("http:", "https:")) or shared.endswith(("/", ":")):  # no listing; nothing but a scheme
        return None
    return shared or None


def is_gone(folder: str) -> bool:
    """Whether a folder is not there, or is as empty as the place of a file system that is not mounted.

    Raises:
        StorageError: the store cannot be asked.
    """
    if not storage.is_local(folder):
        return not storage.exists(folder)
    try:
        return next(os.scandir(storage.local_path(folder)), None) is None
    except OSError:
        return True


class Worker:
    """Holds a callable in an actor; a user's fault in its constructor is raised by the first call instead.

    Ray passes on only the text of what a constructor raises, a call's exception keeps its class. `times` is the step's
    folder when it is to be written down there when the actor worked.
    """

    def __init__(
        self, callable_class: type, kwargs: dict[str, Any], *, step: str = "", stage: str = "", times: str | None = None
    ) -> None:
        metrics.set_tags(step=step, stage=stage)
        self.idle_since: float | None = None  # the first batch waited for nothing but the start
        self.times = None
        try:
            self.callable = callable_class(**kwargs)
            self.times = TimesWriter(times) if times else None
        except WeakSamError as error:
            self.callable = None
            self.error = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self.callable is None:
            raise self.error
        if (since := self.idle_since) is not None:
            waited = time.monotonic() - since
            metrics.observe("weaksam_wait_seconds", lambda: waited)
        batch, fetch_seconds = take_fetch_seconds(batch)
        began = time.time()
        rows = self.callable(batch)
        if self.times is not None:
            self.times.add(began, time.time(), fetch_seconds)
        done = rows.column("status").to_pylist().count(schemas.OK)
        metrics.count("weaksam_images_done", done)
        metrics.count("weaksam_images_failed", rows.num_rows - done)
        self.idle_since = time.monotonic()
        return rows


class PartSink(Datasink[int]):
    """Writes the blocks of a task as one part; see `tables` for why this makes rows count once."""

    def __init__(self, folder: str, schema: pa.Schema) -> None:
        self.folder = folder
        self.schema = schema

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> int:
        """Writes all rows of the task; nothing for a task without rows."""
        parts = [pa.table(block).cast(self.schema) for block in blocks if block.num_rows]
        if not parts:
            return 0
        table = pa.concat_tables(parts).replace_schema_metadata(self.schema.metadata)
        tables.write_part(self.folder, table)
        return table.num_rows
