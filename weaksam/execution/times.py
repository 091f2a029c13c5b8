"""When each actor of a pool worked and when it waited, written down beside the parts: what a plan is made of.

`times/<one an actor>.json` in the step's folder, on request (`resources.record_times`). Nothing else reads them.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict, dataclass

import pyarrow as pa

from weaksam.core import storage

FOLDER = "times"
FETCH_SECONDS = "fetch_seconds"  # column: of each image, its share of the time of the task that fetched it


@dataclass(frozen=True)
class Batch:
    """What an actor did at once. `began` and `ended` are seconds since 1970.

    `waited` is how long it had nothing to do before, None of its first batch; `fetch_seconds` how long a task took to
    fetch these images.
    """

    began: float
    ended: float
    rows: int
    waited: float | None
    fetch_seconds: float

    @property
    def busy(self) -> float:
        """Seconds of work."""
        return self.ended - self.began


@dataclass(frozen=True)
class ActorTimes:
    """Of one actor: since when it stood (seconds since 1970), and its batches."""

    ready: float
    batches: list[Batch]


class TimesWriter:
    """Writes down the batches of an actor, after each of them, because nobody tells an actor that it was the last."""

    def __init__(self, folder: str) -> None:
        """The actor stands now; `folder` is the step's."""
        self._uri = storage.join(folder, FOLDER, f"{uuid.uuid4().hex}.json")
        self._told = ActorTimes(time.time(), [])
        self._idle_since: float | None = None

    def add(self, began: float, ended: float, fetch_seconds: list[float]) -> None:
        """One more batch, with the column FETCH_SECONDS of its images."""
        waited = None if self._idle_since is None else began - self._idle_since
        self._told.batches.append(Batch(began, ended, len(fetch_seconds), waited, sum(fetch_seconds)))
        storage.write_json(self._uri, asdict(self._told))
        self._idle_since = time.time()


def read_times(folder: str) -> list[ActorTimes]:
    """What the actors of a step wrote down, those alone that did something; by when they stood."""
    files = storage.list_files(storage.join(folder, FOLDER))
    told = [storage.read_json(file.uri) for file in files]
    found = [ActorTimes(one["ready"], [Batch(**batch) for batch in one["batches"]]) for one in told]
    return sorted(found, key=lambda one: one.ready)


def take_fetch_seconds(batch: pa.Table) -> tuple[pa.Table, list[float]]:
    """The batch without the column FETCH_SECONDS, and that column; zeros where there is none."""
    if FETCH_SECONDS not in batch.column_names:
        return batch, [0.0] * batch.num_rows
    return batch.drop_columns([FETCH_SECONDS]), batch.column(FETCH_SECONDS).to_pylist()
