"""Records when each actor of a pool worked and when it waited, beside the parts; `weaksam plan` reads the records.

They are `times/<random>.json` in the step's folder, one file per actor, on request (`resources.record_times`). Nothing
else reads them.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict, dataclass

import pyarrow as pa

from weaksam.core import storage

FOLDER = "times"
FETCH_SECONDS = "fetch_seconds"  # column: for each image, its share of the time of the task that fetched it


@dataclass(frozen=True)
class Batch:
    """A batch of an actor. `began` and `ended` are seconds since 1970.

    `waited` is the idle time of the actor before the batch, None for its first batch; `fetch_seconds` is the time that
    a task took to fetch these images.
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
    """The time at which an actor was constructed (seconds since 1970), and its batches."""

    ready: float
    batches: list[Batch]


class TimesWriter:
    """Writes the batches of an actor after every batch, since an actor is not notified before it stops."""

    def __init__(self, folder: str) -> None:
        """Records that the actor is constructed now; `folder` is the step's."""
        self._uri = storage.join(folder, FOLDER, f"{uuid.uuid4().hex}.json")
        self._times = ActorTimes(time.time(), [])
        self._idle_since: float | None = None

    def add(self, began: float, ended: float, fetch_seconds: list[float]) -> None:
        """Adds a batch, with the column FETCH_SECONDS of its images."""
        waited = None if self._idle_since is None else began - self._idle_since
        self._times.batches.append(Batch(began, ended, len(fetch_seconds), waited, sum(fetch_seconds)))
        storage.write_json(self._uri, asdict(self._times))
        self._idle_since = time.time()


def read_times(folder: str) -> list[ActorTimes]:
    """Returns the times of the actors of a step that processed a batch, sorted by when they were constructed."""
    files = storage.list_files(storage.join(folder, FOLDER))
    records = [storage.read_json(file.uri) for file in files]
    actors = [ActorTimes(record["ready"], [Batch(**batch) for batch in record["batches"]]) for record in records]
    return sorted(actors, key=lambda actor: actor.ready)


def take_fetch_seconds(batch: pa.Table) -> tuple[pa.Table, list[float]]:
    """Returns the batch without the column FETCH_SECONDS, and that column; zeros if it is missing."""
    if FETCH_SECONDS not in batch.column_names:
        return batch, [0.0] * batch.num_rows
    return batch.drop_columns([FETCH_SECONDS]), batch.column(FETCH_SECONDS).to_pylist()
