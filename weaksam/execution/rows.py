"""The callables of the Ray Data pipeline: fetch the bytes of images, map them to rows, write one part per task."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from ray.data import Datasink

from weaksam.core import schemas, storage, tables
from weaksam.errors import StorageError, WeakSamError
from weaksam.execution import telemetry
from weaksam.execution.mapping import ImageMapper, map_batch
from weaksam.execution.times import FETCH_SECONDS, TimesWriter, take_fetch_seconds
from weaksam.masking import masked_url

_FETCH_THREADS = 8
_EARLIER = (schemas.EARLIER_STATUS, schemas.EARLIER_MESSAGE)
_FETCHED = (("data", pa.large_binary()), ("status", pa.string()), ("message", pa.string()))


class Fetch:
    """Adds `data`, `status`, `message` to rows with a `uri`.

    A missing object is the image's own fault and becomes its status, unless all of `folder` is gone, too. That and any
    other fault is the storage's: the row is left out, so that a later pass retries it, or the fault is raised with
    `strict`. `timed` adds the column FETCH_SECONDS. An image that failed in an earlier step (`earlier_status`) is not
    fetched: it keeps its status.
    """

    def __init__(self, *, strict: bool = False, timed: bool = False, folder: str | None = None) -> None:
        self.strict, self.timed, self.folder = strict, timed, folder

    def __call__(self, batch: pa.Table) -> pa.Table:
        began = time.monotonic()
        with ThreadPoolExecutor(_FETCH_THREADS) as pool:
            fetched = list(pool.map(self._fetch, batch.column("uri").to_pylist(), *_earlier_states(batch)))
        batch = batch.drop_columns([name for name in _EARLIER if name in batch.column_names])
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


def _earlier_states(batch: pa.Table) -> tuple[list[str], list[str]]:
    """Returns status and message of each image in an earlier step; ok and "" if the step reads no earlier rows."""
    if schemas.EARLIER_STATUS not in batch.column_names:
        return [schemas.OK] * batch.num_rows, [""] * batch.num_rows
    status, message = (batch.column(name).to_pylist() for name in _EARLIER)
    return status, message


def common_folder(uris: Sequence[str]) -> str | None:
    """Returns the innermost folder that contains all of `uris`; None if it cannot be listed."""
    first, last = min(uris), max(uris)  # the common prefix of these two is that of all
    length = next((index for index, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    shared = first[:length].rpartition("/")[0]
    if shared.startswith(("http:", "https:")) or shared.endswith(("/", ":")):  # no listing; nothing but a scheme
        return None
    return shared or None


def is_gone(folder: str) -> bool:
    """Returns whether a folder does not exist, or is empty like the mount point of an unmounted file system.

    Raises:
        StorageError: the store does not answer.
    """
    if not storage.is_local(folder):
        return not storage.exists(folder)
    try:
        return next(os.scandir(storage.local_path(folder)), None) is None
    except OSError:
        return True


@dataclass(frozen=True)
class WorkerSpec:
    """The specification of the workers of a step; picklable.

    Attributes:
        factory: makes the mapper, in the actor.
        schema: schema of the rows, with metadata.
        max_pixels: images of more pixels are refused with status `too_large`.
        step: name of the step, for telemetry.
        stage: name of its stage, for telemetry.
        times: folder of the step, to which each actor writes its times; None: no times are written.
    """

    factory: Callable[[], ImageMapper]
    schema: pa.Schema
    max_pixels: int
    step: str = ""
    stage: str = ""
    times: str | None = None


class Worker:
    """Maps batches in an actor.

    Ray passes on only the text of an exception of a constructor, but keeps the class of an exception of a call. So the
    first call raises an error for the user that the factory raised.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        telemetry.set_tags(step=spec.step, stage=spec.stage)
        self.spec = spec
        self.idle_since: float | None = None  # None until the end of the first batch, which waited only for the start
        self.times = None
        try:
            self.mapper = spec.factory()
            self.times = TimesWriter(spec.times) if spec.times else None
        except WeakSamError as error:
            self.mapper = None
            self.error = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self.mapper is None:
            raise self.error
        if (since := self.idle_since) is not None:
            waited = time.monotonic() - since
            telemetry.observe("weaksam_wait_seconds", lambda: waited)
        batch, fetch_seconds = take_fetch_seconds(batch)
        began = time.time()
        rows = map_batch(self.mapper, batch, schema=self.spec.schema, max_pixels=self.spec.max_pixels)
        if self.times is not None:
            self.times.add(began, time.time(), fetch_seconds)
        done = rows.column("status").to_pylist().count(schemas.OK)
        telemetry.count("weaksam_images_done", done)
        telemetry.count("weaksam_images_failed", rows.num_rows - done)
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
