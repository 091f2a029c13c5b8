"""Rows get to storage exactly once: in a clean run, after crashes, after bad images, after a resume."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.execution.pixel import PIXEL
from weaksam.core import schemas, storage, tables
from weaksam.core.config import StageConfig
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import ClusterError, ConfigError, StageError, StorageError, WeightsError
from weaksam.execution.mapping import ImageMapper, Row
from weaksam.execution.nodes import has_pool_started
from weaksam.execution.pools import PoolResources, fit_pool
from weaksam.execution.rows import Fetch, PartSink

SIZES = pa.schema([("image_id", pa.string()), ("status", pa.string()), ("message", pa.string()), ("size", pa.int32())])
SCHEMA = schemas.with_metadata(SIZES, fingerprint="f", class_names=["a"])
RESOURCES = PoolResources(actor_cpus=1.0, max_actors=2, batch_size=4, image_timeout_s=20.0)


class CountBytes(ImageMapper):
    """The simplest mapper: the number of bytes after the pixel of each file. Content can make it misbehave."""

    def __init__(self, log: str, broken: str = "") -> None:
        if broken:
            raise WeightsError(broken)
        self.log = log

    def make(self, image: np.ndarray, row: Row, prepared: object) -> Row:
        content = row["data"].removeprefix(PIXEL)
        with open(self.log, "a") as handle:
            handle.write(row["image_id"] + "\n")
        if content == b"kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if content == b"bug":
            raise ZeroDivisionError("a bug in the callable")
        return {"size": len(content)}


def a_step(folder: Path) -> Step:
    stage = Stage("count", 1, StageConfig, lambda step: Outcome(0), writes="counts")
    return Step("count", stage, StageConfig(), {}, {}, "f", str(folder / "count-f"))


def images(folder: Path, contents: dict[str, bytes]) -> pa.Table:
    """Files of one pixel each, and what follows it."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(PIXEL + content)
    return source_of({name: str(folder / name) for name in contents})


def source_of(uris: dict[str, str]) -> pa.Table:
    table = pa.table({"image_id": list(uris), "uri": list(uris.values())})
    return table.replace_schema_metadata(SCHEMA.metadata)


def run(
    tmp_path: Path, source: pa.Table, broken: str = "", resources: PoolResources = RESOURCES
) -> tuple[Outcome, list[dict]]:
    from weaksam.execution import runtime

    step = a_step(tmp_path)
    factory = partial(CountBytes, str(tmp_path / "log"), broken)
    outcome = runtime.map_images(step, source, factory, schema=SIZES, max_pixels=1, resources=resources)
    manifest = {"parts": outcome.parts, "excluded": outcome.excluded}
    return outcome, tables.read_table(step.folder, manifest).to_pylist()


pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.mark.ray
def test_every_image_gets_one_row_with_the_declared_types(tmp_path: Path) -> None:
    source = images(tmp_path / "images", {f"{i:03}": b"x" * i for i in range(100)})
    outcome, rows = run(tmp_path, source)
    assert [row["size"] for row in rows] == list(range(100))
    assert (outcome.rows, outcome.failed, outcome.computed) == (100, 0, 100)
    part = tables.read_parts(a_step(tmp_path).folder, outcome.parts[:1])[0]
    assert part.schema.equals(SCHEMA, check_metadata=True)


class LookAtPool(ImageMapper):
    """Looks for the actor that it is in."""

    def make(self, image: np.ndarray, row: Row, prepared: object) -> Row:
        return {"size": int(has_pool_started())}


@pytest.mark.ray
def test_an_actor_at_work_has_a_place(tmp_path: Path) -> None:
    """Holds Ray to what `has_pool_started` reads of it, which is not part of its interface."""
    import ray

    from weaksam.execution import runtime

    source, step = images(tmp_path / "images", {"a": b""}), a_step(tmp_path)
    runtime.map_images(step, source, LookAtPool, schema=SIZES, max_pixels=1, resources=RESOURCES)
    (row,) = tables.read_parts(step.folder, tables.list_parts(step.folder))[0].to_pylist()
    assert row["size"] == 1
    actor: Any = ray.remote(type("MapWorker(too large)", (), {"call": lambda self: None}))
    waiting = actor.options(num_cpus=99).remote()
    end = time.monotonic() + 120
    while has_pool_started():  # until the pool of the step has ended, whose handles may be in a circle of references
        assert time.monotonic() < end
        gc.collect()
        time.sleep(0.1)
    ray.kill(waiting)


@pytest.mark.ray
def test_a_missing_image_is_a_row_with_a_reason(tmp_path: Path) -> None:
    source = images(tmp_path / "images", {"a": b"1", "b": b"22"})
    (tmp_path / "images" / "b").unlink()
    outcome, rows = run(tmp_path, source)
    assert [row["status"] for row in rows] == ["ok", "not_found"]
    assert outcome.failed == 1
    assert outcome.failures[0].startswith("b: not_found: ")


@pytest.mark.ray
def test_an_image_that_kills_its_worker_costs_only_its_own_row(tmp_path: Path) -> None:
    import ray
    from ray._private import state

    source = images(tmp_path / "images", {f"{i:03}": b"kill" if i == 17 else b"x" for i in range(60)})
    free = ray.available_resources()["CPU"]
    gc.disable()  # a collection by chance would hide actors that were not let go
    try:
        outcome, rows = run(tmp_path, source)
        end = time.monotonic() + 60
        while (left := ray.available_resources().get("CPU", 0.0)) < free and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        gc.enable()
    alive = [actor for actor in state.actors().values() if actor["State"] != "DEAD"]
    assert left >= free, f"actors of a pass that is over keep their CPUs: {alive}"
    assert len(rows) == 60
    assert {row["image_id"]: row["status"] for row in rows if row["status"] != "ok"} == {"017": "crash"}
    assert outcome.failed == 1


@pytest.mark.ray
def test_an_image_that_raises_costs_only_its_own_row_and_keeps_the_reason(tmp_path: Path) -> None:
    source = images(tmp_path / "images", {f"{i:03}": b"bug" if i == 3 else b"x" for i in range(30)})
    _, rows = run(tmp_path, source)
    failed = [row for row in rows if row["status"] != "ok"]
    assert [(row["image_id"], row["status"]) for row in failed] == [("003", "crash")]
    assert failed[0]["message"] == "ZeroDivisionError: a bug in the callable"


@pytest.mark.slow
@pytest.mark.ray
def test_when_every_image_fails_it_is_not_the_images(tmp_path: Path) -> None:
    source = images(tmp_path / "images", {f"{i:03}": b"bug" for i in range(12)})
    with pytest.raises(StageError, match=r"every image fails.*ZeroDivisionError: a bug"):
        run(tmp_path, source)


@pytest.mark.ray
def test_a_fault_of_the_weights_ends_the_step_and_says_so(tmp_path: Path) -> None:
    source = images(tmp_path / "images", {"a": b"1"})
    with pytest.raises(WeightsError, match=r"sam\.pth is truncated"):
        run(tmp_path, source, broken="sam.pth is truncated")


@pytest.mark.ray
def test_rows_that_are_there_are_not_computed_again(tmp_path: Path) -> None:
    source = images(tmp_path / "images", {f"{i:03}": b"x" * i for i in range(50)})
    _, whole = run(tmp_path, source)
    folder = a_step(tmp_path).folder
    lost = tables.list_parts(folder)[:2]
    lost_rows = sum(tables.rows_in(part) for part in lost)
    for part in lost:
        os.unlink(storage.join(folder, part))
    (tmp_path / "log").unlink()
    outcome, again = run(tmp_path, source)
    assert again == whole
    assert outcome.computed == lost_rows
    assert len((tmp_path / "log").read_text().split()) == lost_rows


@pytest.mark.slow
@pytest.mark.ray
def test_a_pool_of_nearly_every_cpu_leaves_enough_to_read_and_write(tmp_path: Path) -> None:
    source = images(tmp_path / "images", {f"{i:03}": b"x" for i in range(40)})
    full = PoolResources(actor_cpus=0.875, batch_size=4)  # four of them leave half of one of the cluster's four CPUs
    outcome, rows = run(tmp_path, source, resources=full)
    assert (outcome.computed, len(rows)) == (40, 40)


@pytest.mark.ray
@pytest.mark.parametrize(("told", "kind"), [("node timed out during startup.", ClusterError), ("else", ValueError)])
def test_a_ray_that_does_not_start_in_time_is_told_and_nothing_else_is_hidden(
    monkeypatch: pytest.MonkeyPatch, told: str, kind: type[Exception]
) -> None:
    from weaksam.execution import runtime

    def init(**_: object) -> None:
        raise ValueError(f"The current {told}")

    monkeypatch.setattr(runtime.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(runtime.ray, "init", init)
    with pytest.raises(kind, match="did not start in time" if kind is ClusterError else "else"):
        runtime.connect()


@pytest.mark.ray
def test_workers_wait_for_their_next_task_longer_than_ray_would_let_them() -> None:
    program = """
import os, time
from weaksam.execution import runtime
import ray
runtime.connect()
def work():
    time.sleep(1)  # long enough that each of two tasks has a worker of its own
    return os.getpid()
task = ray.remote(num_cpus=0.1)(work)
both = lambda: sorted(ray.get([task.remote(), task.remote()]))
both()  # starts them
before = both()
time.sleep(4)
print(both() == before)
"""
    environment = os.environ | {"RAY_num_workers_soft_limit": "1"}  # one more is ended after a second without a task
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert told.stdout == "True\n"


def test_rows_of_unknown_images_are_refused(tmp_path: Path) -> None:
    source = images(tmp_path / "images", {"a": b"1"})
    stray = schemas.to_table([{"image_id": "stray", "status": "ok"}], SCHEMA)
    tables.write_part(a_step(tmp_path).folder, stray)
    with pytest.raises(StageError, match="1 rows have no image"):
        run(tmp_path, source)


class HoldingServer(ThreadingHTTPServer):
    """Serves any path as a pixel and its name, but after the first 90 paths holds its answers until `go_on` is set."""

    def __init__(self, go_on: threading.Event) -> None:
        self.waited_in_vain = False
        asked, server = set[str](), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.add(self.path)
                if len(asked) > 90 and not go_on.wait(90):
                    server.waited_in_vain = True
                    go_on.set()
                self.do_HEAD()
                self.wfile.write(PIXEL + self.path.encode())

            def do_HEAD(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(PIXEL) + len(self.path)))
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.mark.ray
def test_rows_are_written_while_others_are_fetched(tmp_path: Path) -> None:
    """Ray Data would keep so much of what this pool leaves for fetching that none is written before all are there."""
    folder, written = a_step(tmp_path).folder, threading.Event()

    def look() -> None:
        while not tables.list_parts(folder):
            time.sleep(0.02)
        written.set()

    with HoldingServer(written) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        threading.Thread(target=look, daemon=True).start()
        ids = [f"{index:03}" for index in range(120)]
        source = source_of({name: f"http://127.0.0.1:{server.server_address[1]}/{name}" for name in ids})
        outcome, rows = run(tmp_path, source, resources=RESOURCES.model_copy(update={"actor_cpus": 3.25}))
        server.shutdown()
    assert (outcome.rows, {row["size"] for row in rows}) == (120, {4})
    assert not server.waited_in_vain


def test_a_pool_that_would_take_every_cpu_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"an actor of 2 CPU.*the cluster has 2 CPU and 0 GPU"):
        fit_pool(PoolResources(actor_cpus=2), [{"CPU": 2.0}])


def test_a_pool_takes_what_the_cluster_holds() -> None:
    assert fit_pool(PoolResources(), [{"CPU": 8.0}]).actors == 7
    assert fit_pool(PoolResources(max_actors=3), [{"CPU": 8.0}]).actors == 3
    grown = PoolResources(max_actors=8, actor_gpus=1, grow=True)
    assert fit_pool(grown, [{"CPU": 1.0}]).actors == 8  # their nodes are still to come
    assert fit_pool(grown, [{"CPU": 1.0}]).fetches == 16  # and what these will need
    assert [fit_pool(PoolResources(max_actors=n), [{"CPU": 8.0}]).fetches for n in (1, 3, 7)] == [2, 6, 3]
    assert fit_pool(PoolResources(actor_cpus=0.75), [{"CPU": 2.0}]).fetches == 1
    with pytest.raises(ValueError, match="grow needs max_actors and actor_gpus"):
        PoolResources(grow=True)
    on_gpus = fit_pool(PoolResources(actor_gpus=0.5, actor_cpus=0.1), [{"CPU": 8.0, "GPU": 2.0}])
    assert (on_gpus.actors, on_gpus.actor_gpus) == (4, 0.5)


def test_an_actor_must_fit_on_one_node() -> None:
    nodes = [{"CPU": 1.0}] * 4
    assert fit_pool(PoolResources(actor_cpus=1.0), nodes).actors == 3
    with pytest.raises(ConfigError, match=r"of 2 CPU.* on 4 node\(s\)"):
        fit_pool(PoolResources(actor_cpus=2.0), nodes)


def test_fetch_leaves_rows_out_whose_storage_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(uri: str) -> bytes:
        if uri == "down":
            raise StorageError("down: network")
        return b"ok"

    monkeypatch.setattr(storage, "read_bytes", read)
    batch = pa.table({"image_id": ["a", "b"], "uri": ["up", "down"]})
    assert Fetch()(batch).column("image_id").to_pylist() == ["a"]
    with pytest.raises(StorageError):
        Fetch(strict=True)(batch)


def test_the_same_rows_in_another_order_are_the_same_part(tmp_path: Path) -> None:
    rows = [{"image_id": str(i), "status": "ok", "size": i} for i in range(5)]
    for order in (rows, rows[::-1]):
        PartSink(str(tmp_path), SCHEMA).write([schemas.to_table(order, SCHEMA)], None)
    assert len(tables.list_parts(str(tmp_path))) == 1


def test_overlapping_parts_are_read_once(tmp_path: Path) -> None:
    for ids in ("ab", "bc"):
        tables.write_part(str(tmp_path), schemas.to_table([{"image_id": i, "status": "ok"} for i in ids], SCHEMA))
    by_part = tables.done_ids(str(tmp_path))
    excluded = tables.first_wins(by_part)
    assert sum(map(len, excluded.values())) == 1
    table = tables.read_table(str(tmp_path), {"parts": list(by_part), "excluded": excluded})
    assert table.column("image_id").to_pylist() == ["a", "b", "c"]
