"""Nodes that die and come in the middle of each kind of step: the tables and weights of a calm run, and no hang."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from testing.local_cluster import LocalCluster
from testing.processes import actors_of
from tests.execution.test_resume import ROOT, clear_up
from weaksam import pipeline
from weaksam.core import tables
from weaksam.core.step import Step
from weaksam.execution.nodes import PoolChangedError, Watcher, WorkersDieError, alive_nodes
from weaksam.execution.pools import DRIVER_CPUS_VARIABLE, PoolResources, fit_pool

IMAGES = 60
CONFIG = """
run: {base}/{name}
steps:
  images: {{stage: index, format: folder, root: {base}/data}}
  proposals: {{stage: proposals, images: images, sam: {{model: vit_xs}}, grid: {{points_per_side: 4}}}}
  mist: {{stage: train_wsod, images: images, proposals: proposals, split: train, backbone: frozen_sam, dropblock: "off",
    scales: [48], min_side: 4, steps: 30, batch_size: 4, lr: 1.0e-3, warmup: 0, checkpoint_every: 4, log_every: 2,
    resources: {{cpus_per_worker: 1}}}}  # one thread adds up in one order, whatever the node
  found: {{stage: detect, images: images, proposals: proposals, detector: mist, scales: [48], flip: false}}
"""


def write_run(base: Path, name: str) -> str:
    path = base / f"{name}.yaml"
    path.write_text(CONFIG.format(base=base, name=name))
    return str(path)


def run_of(config: str) -> list[str]:
    return [sys.executable, "-m", "jobs.pipeline", config]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "data" / "train").mkdir(parents=True)
    draw = np.random.default_rng(3)
    rows = ["file,labels"]
    for i in range(IMAGES):
        small = Image.fromarray(draw.integers(0, 255, (4, 5, 3), np.uint8))  # patches of colour: a few boxes each
        small.resize((80, 64), Image.Resampling.NEAREST).save(tmp_path / "data" / "train" / f"{i:03}.png")
        rows.append(f"train/{i:03}.png,{'cat' if i % 2 else 'dog'}")
    (tmp_path / "data" / "labels.csv").write_text("\n".join([*rows, ""]))
    return tmp_path


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    one = LocalCluster(os.environ)
    yield one
    one.stop()


def wait_for(reached: Callable[[], object], driver: subprocess.Popen, log: Path, *, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert driver.poll() is None, f"ended too early: {log.read_text()}"
        assert time.monotonic() < end, f"no progress in {seconds:.0f} s: {log.read_text()}"
        time.sleep(0.05)


def kill_one(cluster: LocalCluster, kind: str) -> None:
    """Kills the node with most actors of a kind."""
    actors = {node: len(actors_of(raylet, kind)) for node, raylet in cluster.nodes.items()}
    assert any(actors.values()), "no node to kill works"
    cluster.kill_node(max(actors, key=lambda node: actors[node]))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nodes_lost_in_every_kind_of_step_cost_nothing(base: Path, cluster: LocalCluster) -> None:
    calm, rough, ray_folder = (
        write_run(base, "calm"),
        write_run(base, "rough"),
        tempfile.mkdtemp(prefix="ws", dir="/tmp"),
    )
    try:
        subprocess.run(run_of(calm), cwd=ROOT, env={**os.environ, "RAY_TMPDIR": ray_folder}, check=True, timeout=300)
    finally:
        clear_up(ray_folder)

    _, proposals, mist, found = pipeline.load(rough)
    log = base / "log"
    with open(log, "wb") as told:
        driver = subprocess.Popen(run_of(rough), cwd=ROOT, env=cluster.environment, stderr=told)
    try:
        wait_for(lambda: tables.list_parts(proposals.folder), driver, log)
        kill_one(cluster, "MapWorker")  # and none comes: what is left must not be filled with actors alone
        wait_for(lambda: list(Path(mist.folder).glob("checkpoint/checkpoint_2*/state.pt")), driver, log)
        cluster.add_node()
        kill_one(cluster, "RayTrainWorker")
        wait_for(lambda: tables.list_parts(found.folder), driver, log)
        cluster.add_node()
        kill_one(cluster, "MapWorker")
        assert driver.wait(200) == 0, log.read_text()
    finally:
        driver.kill()
        driver.wait()
    for one, other in zip(pipeline.load(calm), pipeline.load(rough), strict=True):
        if one.stage.name == "train_wsod":
            weights, again = (load_file(Path(step.folder, "checkpoint", "model.safetensors")) for step in (one, other))
            assert all(np.array_equal(value, again[key]) for key, value in weights.items())
        else:
            check_rows(one, other)


def check_rows(one: Step, other: Step) -> None:
    manifest = other.manifest()
    assert manifest is not None
    assert (manifest["rows"], manifest["failed"]) == (IMAGES, 0)
    assert one.read().equals(other.read())


def test_what_the_driver_reserves_is_not_there_for_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with all CPUs of the driver's node would wait for ever."""
    rows = [("a", True, {"CPU": 2.0}), ("b", True, {"CPU": 4.0, "GPU": 1.0}), ("c", False, {"CPU": 8.0})]
    nodes = [{"NodeID": name, "Alive": alive, "Resources": has} for name, alive, has in rows]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "b"))
    monkeypatch.delenv(DRIVER_CPUS_VARIABLE, raising=False)
    assert alive_nodes() == [{"CPU": 2.0}, {"CPU": 4.0, "GPU": 1.0}]
    monkeypatch.setenv(DRIVER_CPUS_VARIABLE, "1.5")
    assert alive_nodes() == [{"CPU": 2.0}, {"CPU": 2.5, "GPU": 1.0}]


def test_a_pass_ends_when_its_pool_has_not_fitted_for_a_while() -> None:
    """Lost nodes count sooner than new ones; a node replaced soon, or none left at all, ends nothing."""
    two, now = [{"CPU": 2.0}] * 2, 0.0
    nodes = two

    def look(at: float, there: list[dict[str, float]]) -> None:
        nonlocal now, nodes
        now, nodes = at, there
        watch.on_execution_step(None)

    watch = Watcher(fit_pool(PoolResources(), two), 100, nodes=lambda: nodes, clock=lambda: now)
    look(10, two[:1])
    look(20, two)  # came back
    look(30, two[:1])
    look(34, two[:1])
    with pytest.raises(PoolChangedError, match="1 actors fit the nodes there are now instead of 3"):
        look(46, two[:1])
    look(50, [])
    look(100, [])
    look(110, two * 2)
    look(150, two * 2)
    with pytest.raises(PoolChangedError, match="7 actors"):
        look(171, two * 2)
    for resources, blocks in ((PoolResources(max_actors=3), 100), (PoolResources(), 3)):  # no use for more
        watch = Watcher(
            fit_pool(resources, two), blocks, nodes=lambda: two * 2, clock=iter(range(0, 900, 100)).__next__
        )
        for _ in range(5):
            watch.on_execution_step(None)


def test_a_pool_fitted_again_has_the_gpus_it_had() -> None:
    pool = fit_pool(PoolResources(), [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 8.0}])
    assert (pool.actors, pool.actor_gpus) == (1, 1.0)
    assert pool.resources.actor_gpus == 1.0  # so that a cluster whose GPUs are lost waits for them


def test_a_pass_ends_when_its_workers_die_as_fast_as_they_start() -> None:
    """Twelve deaths of two workers without a block written between."""
    now, deaths, parts = 0.0, 3, 0
    there = [{"CPU": 3.0}]
    pool = fit_pool(PoolResources(), there)
    assert pool.actors == 2
    watch = Watcher(pool, 100, parts=lambda: parts, restarts=lambda: deaths, nodes=lambda: there, clock=lambda: now)
    for now, deaths, parts in ((11, 3, 0), (22, 14, 0), (33, 15, 1), (44, 26, 1)):  # noqa: B007
        watch.on_execution_step(None)
    now, deaths = 55, 27
    with pytest.raises(WorkersDieError, match="started again 12 times and finished nothing meanwhile"):
        watch.on_execution_step(None)


WAITS = "the pool waits for resources"


def test_a_pool_without_a_place_for_a_minute_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    now, nodes = 0.0, [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 6.0}]
    watch = Watcher(
        fit_pool(PoolResources(actor_cpus=1.5, actor_gpus=0), nodes),
        100,
        started=lambda: False,
        nodes=lambda: nodes,
        free=lambda: {"CPU": 0.5, "memory": 1e9},
        clock=lambda: now,
    )
    for now in (10.0, 30.0, 58.0):  # noqa: B007
        watch.on_execution_step(None)
    assert WAITS not in caplog.text
    for now in (69.0, 80.0, 400.0):  # noqa: B007
        watch.on_execution_step(None)
    assert [record.getMessage() for record in caplog.records] == [
        "the pool waits for resources: no actor has started for 69 s; it asks for 5 actors of 1.5 CPU and 0 GPU each, "
        "the cluster has 8 CPU and 1 GPU in all, of which 0.5 CPU and 0 GPU are free now: it goes on by itself once "
        "other work on the cluster ends"
    ]


@pytest.mark.parametrize("moves", ["an actor starts", "a block is written"])
def test_a_pool_that_moves_does_not_wait(moves: str, caplog: pytest.LogCaptureFixture) -> None:
    now, nodes = 0.0, [{"CPU": 4.0}]
    watch = Watcher(
        fit_pool(PoolResources(), nodes),
        100,
        parts=lambda: 3 + (moves == "a block is written" and now > 20),
        started=lambda: moves == "an actor starts" and 20 < now < 50,  # and was lost
        nodes=lambda: nodes,
        clock=lambda: now,
    )
    for now in range(11, 200, 11):  # noqa: B007
        watch.on_execution_step(None)
    assert WAITS not in caplog.text


def test_a_pool_is_no_larger_than_memory_allows() -> None:
    gib = float(2**30)
    assert fit_pool(PoolResources(), [{"CPU": 9.0, "memory": 2 * gib}]).actors == 4
    assert fit_pool(PoolResources(), [{"CPU": 9.0, "memory": 64 * gib}]).actors == 8
    assert fit_pool(PoolResources(), [{"CPU": 9.0, "memory": 0.1 * gib}]).actors == 1  # an estimate refuses nothing
