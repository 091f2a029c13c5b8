"""Fits the actor pool of a running step to the nodes of the cluster as they come and go.

Ray Data keeps the size that a pool began with. After a node is lost, its actors wait for another node while blocks are
queued to them, or they fill the remaining nodes and leave no CPU to read and write with. A node that joins stays idle.
So a pass whose pool no longer fits is ended: its parts stay, and the next pass begins with a pool that fits. While
other work occupies the cluster, the pool waits, and a warning says so.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray._private import state

from weaksam.errors import ConfigError
from weaksam.execution.pools import DRIVER_CPUS_VARIABLE, Pool, fit_pool

log = logging.getLogger(__name__)

Nodes = Sequence[Mapping[str, float]]

_LOOK_SECONDS = 2.0
_LOST_SECONDS = 15.0  # the pass waits this long for a lost node to be replaced
_JOINED_SECONDS = 60.0  # a joining node ends a pass too, and the nodes of a growing cluster come one by one
_WAIT_SECONDS = 600.0  # the wait for a node when no actor fits the remaining nodes
_COUNT_SECONDS = 10.0  # the time between counts of restarted workers
_PLACE_SECONDS = 60.0  # without a placed actor for this long, the cluster counts as busy
_DEATHS = 6  # worker deaths per actor without a written block; Ray would restart the workers for ever

_POOL_ACTOR = "MapWorker("  # how Ray Data names the class of a pool's actors


class PoolChangedError(Exception):
    """The pool of a pass no longer fits the cluster. Ends the pass and never leaves `runtime`."""


class WorkersDieError(Exception):
    """Workers of a pass die as fast as they start. Ends the pass and never leaves `runtime`."""


def alive_nodes() -> list[dict[str, float]]:
    """Returns the resources of each node that is alive, less the CPUs that this job's driver reserves."""
    nodes = {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}
    if reserved := float(os.environ.get(DRIVER_CPUS_VARIABLE, 0)):
        own = nodes[ray.get_runtime_context().get_node_id()]
        own["CPU"] = max(0.0, own.get("CPU", 0.0) - reserved)
    return list(nodes.values())


def fit_again(pool: Pool) -> Pool:
    """Returns the pool for the current nodes; waits for a node while no actor fits.

    Raises:
        ConfigError: no actor fits after the wait.
    """
    end = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            return fit_pool(pool.resources, alive_nodes())
        except ConfigError as error:
            if time.monotonic() > end:
                raise
            log.warning("waiting for a node: %s", error)
            time.sleep(10.0)


def count_restarts() -> int:
    """Returns how often Ray has restarted workers of this job's actors."""
    return sum(max(0, int(actor["NumRestarts"])) for actor in _actors_of_this_job())


def has_pool_started() -> bool:
    """Returns whether a pool actor of this job is placed on a node; it may still load weights."""
    actors = [actor for actor in _actors_of_this_job() if actor["ActorClassName"].startswith(_POOL_ACTOR)]
    # an actor without a place has no node id, or that of no node, which is all f
    return any(actor["State"] != "DEAD" and actor["Address"]["NodeID"].strip("f") for actor in actors)


def _actors_of_this_job() -> list[dict[str, Any]]:
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return list(state.actors(job_id=job).values())


class Watcher:
    """Watches a pass: Ray Data calls it at each step of the execution.

    It ends the pass when the pool no longer fits the nodes, and when workers die as fast as they start. It logs one
    warning when no actor is placed on a node.

    Args:
        pool: the pool that the pass began with.
        blocks: number of blocks of the pass; more actors than these have no use.
        parts: returns how many blocks are written.
        restarts: returns how often workers were restarted.
        started: returns whether an actor of the pool is placed on a node.
        nodes: returns the resources of each node.
        free: returns the resources of the cluster that nothing has reserved.
        clock: returns seconds.
    """

    def __init__(
        self,
        pool: Pool,
        blocks: int,
        *,
        parts: Callable[[], int] = lambda: 0,
        restarts: Callable[[], int] = lambda: 0,
        started: Callable[[], bool] = lambda: True,
        nodes: Callable[[], Nodes] = alive_nodes,
        free: Callable[[], Mapping[str, float]] = ray.available_resources,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool, self.blocks, self.actors = pool, blocks, min(pool.actors, blocks)
        self.count_parts, self.count_restarts, self.has_started = parts, restarts, started
        self.nodes, self.free, self.clock = nodes, free, clock
        self.began = self.looked = self.fitted_at = self.counted = clock()
        self.waits = True  # until an actor is placed or the warning is logged
        self.deaths: int | None = None  # the restarts when a block was last written
        self.parts = 0  # the parts written by then

    def before_execution_starts(self, executor: Any) -> None: ...

    def on_execution_step(self, executor: Any) -> None:
        """Checks the pass every few seconds.

        Raises:
            PoolChangedError: the pool has not fitted the nodes for a while.
            WorkersDieError: workers die as fast as they start.
        """
        now = self.clock()
        if now - self.looked < _LOOK_SECONDS:
            return
        self.looked = now
        if now - self.counted >= _COUNT_SECONDS:
            self.counted = now
            self.count_deaths()
            self.warn_of_waiting(now)
        self.compare_nodes(now)

    def compare_nodes(self, now: float) -> None:
        """Raises PoolChangedError when another number of actors has fitted the nodes for long enough."""
        try:
            fits = min(fit_pool(self.pool.resources, self.nodes()).actors, self.blocks)
        except ConfigError:  # no actor fits: the pass waits for a node, too
            fits = self.actors
        if fits == self.actors:
            self.fitted_at = now
        elif now - self.fitted_at > (_LOST_SECONDS if fits < self.actors else _JOINED_SECONDS):
            raise PoolChangedError(f"{fits} actors fit the nodes there are now instead of {self.actors}")

    def count_deaths(self) -> None:
        """Raises WorkersDieError when workers were restarted many times and no block was written meanwhile."""
        deaths = self.count_restarts()
        if self.deaths is None:
            self.deaths, self.parts = deaths, self.count_parts()
        elif deaths - self.deaths >= _DEATHS * self.actors:
            if (parts := self.count_parts()) == self.parts:
                raise WorkersDieError(
                    f"workers were started again {deaths - self.deaths} times and finished nothing meanwhile, for "
                    "want of memory if nothing else is known"
                )
            self.deaths, self.parts = deaths, parts

    def warn_of_waiting(self, now: float) -> None:
        """Logs once that the pool waits, when no actor was placed and no block was written since the start."""
        self.waits = self.waits and not self.has_started()
        if not self.waits or now - self.began < _PLACE_SECONDS:
            return
        self.waits = False
        if self.count_parts() > self.parts:
            return
        nodes = self.nodes()
        log.warning(
            "the pool waits for resources: no actor has started for %.0f s; it asks for %d actors of %s each, the "
            "cluster has %s in all, of which %s are free now: it goes on by itself once other work on the cluster ends",
            now - self.began,
            self.actors,
            _amounts({"CPU": self.pool.actor_cpus, "GPU": self.pool.actor_gpus}),
            _amounts({kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}),
            _amounts(self.free()),
        )

    def after_execution_succeeds(self, executor: Any) -> None: ...

    def after_execution_fails(self, executor: Any, error: Exception) -> None: ...


def _amounts(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0.0):g} CPU and {resources.get('GPU', 0.0):g} GPU"
