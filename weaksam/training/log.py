"""The log of a training: rows of metrics, the same for TensorBoard, warnings of its workers. Does not depend on Ray.

Workers on any node write it to the step's folder; the driver reads it from there and logs new rows.
"""

from __future__ import annotations

import json
import logging
import math
import struct
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]  (made when imported)
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from weaksam.core import storage
from weaksam.errors import WeakSamError
from weaksam.execution.progress import duration, repeatedly
from weaksam.training.settings import TrainSettings
from weaksam.training.written import METRICS, read_metrics

log = logging.getLogger(__name__)

_WARNINGS = "warnings.jsonl"
_MOST_WARNINGS = 20


class WarningsToFile(logging.Handler):
    """Writes the first warnings of a worker to a file for the driver, since worker logs stay on their nodes."""

    def __init__(self, folder: str) -> None:
        super().__init__(logging.WARNING)
        self._uri, self._messages = storage.join(folder, _WARNINGS), list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message in self._messages or len(self._messages) == _MOST_WARNINGS:
            return
        self._messages.append(message)
        try:
            storage.write_bytes(self._uri, "".join(json.dumps(text) + "\n" for text in self._messages).encode())
        except (WeakSamError, OSError):  # a warning must never stop the work
            self.handleError(record)


def follow(folder: str, settings: TrainSettings) -> AbstractContextManager[None]:
    """Logs new rows of metrics and new warnings, read from the run folder, since workers may run on any node."""

    def rows() -> list[dict[str, Any]]:
        try:
            return read_metrics(folder, warns=False)
        except (WeakSamError, OSError):  # progress must never stop the work
            return []

    def warnings() -> list[str]:
        try:
            lines = storage.read_replaceable(storage.join(folder, _WARNINGS)).splitlines()
            return [message for line in lines if isinstance(message := json.loads(line), str)]
        except (WeakSamError, OSError, ValueError):  # missing or cut off
            return []

    last = max((row["step"] for row in rows()), default=0)
    known = set(warnings())

    def report() -> None:
        nonlocal last
        for message in warnings():
            if message not in known:
                log.warning("%s", message)
                known.add(message)
        for row in rows():
            if row["step"] > last:
                log.info("%s", progress_line(row, settings))
                last = row["step"]

    return repeatedly(report, seconds=2.0)


def progress_line(row: Mapping[str, Any], settings: TrainSettings) -> str:
    """Formats a row of metrics as a log line."""
    left = (settings.steps - row["step"]) * settings.batch_size / max(row["images_per_second"], 1e-9)
    others = ("step", "lr", "images_per_second", "seconds", "at")
    shown = {key: value for key, value in row.items() if key not in others and value is not None}
    means = "  ".join(f"{key} {value:.3g}" for key, value in shown.items())
    return (
        f"step {row['step']}/{settings.steps}  {means}  lr {row['lr']:.2g}  {row['images_per_second']:.0f} images/s  "
        f"eta {duration(left)}"
    )


class TrainingLog:
    """Writes the rows of `training_log.jsonl`, each step once even after interruptions, and the same for TensorBoard.

    Both files are small and written in full each time, because object stores cannot append.
    """

    def __init__(self, folder: str, settings: TrainSettings, step: int) -> None:
        """Keeps the rows up to `step`, from which training resumes."""
        self._folder, self._settings = folder, settings
        self._uri = storage.join(folder, METRICS)
        self._events = bytearray(_record(Event(wall_time=time.time(), file_version="brain.Event:2")))
        self._rows: list[dict[str, Any]] = []
        for row in read_metrics(folder):
            if row["step"] <= step:
                self._add(row)
        self._began = self._then = time.monotonic()
        self._step = step

    def write(self, step: int, means: dict[str, float], *, lr: float) -> None:
        """Appends a row: `seconds` is the duration since the last row, `at` the time since the loop began."""
        now = time.monotonic()
        seconds, at = now - self._then, now - self._began
        speed = (step - self._step) * self._settings.batch_size / seconds
        row = {"step": step, **_as_json(means), "lr": lr, "images_per_second": round(speed, 2)}
        self._add(row | {"seconds": round(seconds, 4), "at": round(at, 4)})
        lines = (json.dumps(row, allow_nan=False) + "\n" for row in self._rows)
        storage.write_bytes(self._uri, "".join(lines).encode())
        events = storage.join(self._folder, "tensorboard", "events.out.tfevents.0.run")
        storage.write_bytes(events, bytes(self._events))
        self._then, self._step = time.monotonic(), step  # the time to write the row does not count

    def _add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        for key, value in row.items():
            if key != "step" and value is not None:
                event = Event(wall_time=time.time(), step=int(row["step"]), summary=scalar(key, value))
                self._events += _record(event)


def _as_json(means: dict[str, float]) -> dict[str, float | None]:
    """Replaces values that are not finite by null: JSON has no NaN."""
    return {key: value if math.isfinite(value) else None for key, value in means.items()}


def _record(event: Event) -> bytes:
    """Encodes an event as a TensorBoard record: length, its checksum, the event, its checksum.

    tensorboardX's writers of records take the path of a file that they begin anew; this log is kept in memory, restored
    from its rows after an interruption, and written to object storage.
    """
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    return length + struct.pack("<I", masked_crc32c(length)) + content + struct.pack("<I", masked_crc32c(content))
