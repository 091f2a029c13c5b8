"""What actors write down of their time, and that nothing of it gets into rows."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.execution.pixel import PIXEL
from weaksam.core import schemas
from weaksam.errors import ConfigError
from weaksam.execution.mapping import ImageMapper, Row
from weaksam.execution.rows import Fetch, Worker, WorkerSpec
from weaksam.execution.times import FETCH_SECONDS, read_times

SCHEMA = pa.schema([schemas.HYGIENE.field(name) for name in ("image_id", "status")])


class Slow(ImageMapper):
    """Takes a moment and keeps the names of the columns."""

    def __init__(self) -> None:
        self.columns: list[list[str]] = []

    def make(self, image: np.ndarray, row: Row, prepared: object) -> Row:
        self.columns.append(list(row))
        time.sleep(0.02)
        return {}


def source(folder: Path, count: int) -> pa.Table:
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(PIXEL)
    return pa.table(
        {"image_id": [f"{i}" for i in range(count)], "uri": [str(folder / f"{i}.jpg") for i in range(count)]}
    )


def test_an_actor_writes_down_its_batches_and_the_mapper_sees_nothing_of_it(tmp_path: Path) -> None:
    spec = WorkerSpec(Slow, SCHEMA, max_pixels=1, times=str(tmp_path / "step"))
    began, worker, batch = time.time(), Worker(spec), source(tmp_path, 3)
    fetched = Fetch(timed=True)(batch)
    assert sum(fetched.column(FETCH_SECONDS).to_pylist()) > 0
    for _ in range(2):
        rows = worker(fetched)
        time.sleep(0.1)
    assert rows.column_names == ["image_id", "status"]
    (actor,) = read_times(str(tmp_path / "step"))
    assert began <= actor.ready <= actor.batches[0].began
    assert [one.rows for one in actor.batches] == [3, 3]
    assert all(one.busy > 0.04 for one in actor.batches)
    assert actor.batches[0].waited is None
    assert actor.batches[1].waited is not None
    assert actor.batches[1].waited > 0.05
    assert actor.batches[1].fetch_seconds == pytest.approx(sum(fetched.column(FETCH_SECONDS).to_pylist()))
    assert isinstance(worker.mapper, Slow)
    assert len(worker.mapper.columns) == 6
    assert not [names for names in worker.mapper.columns if FETCH_SECONDS in names]


def test_without_being_asked_nothing_is_written_down(tmp_path: Path) -> None:
    fetched = Fetch()(source(tmp_path, 2))
    assert FETCH_SECONDS not in fetched.column_names
    Worker(WorkerSpec(Slow, SCHEMA, max_pixels=1))(fetched)
    assert not list(tmp_path.rglob("*.json"))
    assert read_times(str(tmp_path)) == []


def test_an_actor_whose_mapper_cannot_be_made_says_so_as_ever(tmp_path: Path) -> None:
    def fail() -> ImageMapper:
        raise ConfigError("no weights")

    worker = Worker(WorkerSpec(fail, SCHEMA, max_pixels=1, times=str(tmp_path)))
    with pytest.raises(ConfigError, match="no weights"):
        worker(Fetch(timed=True)(source(tmp_path, 1)))
