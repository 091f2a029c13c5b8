"""The nodes of the cluster while a step runs: they come and go, and its pool of actors follows.

Ray Data holds on to the size a pool began with. Actors of a lost node then wait for another one with blocks queued to
them, or fill the nodes that are left and leave no CPU to read and write with; and a node that joins stays idle. So a
pass whose pool no longer fits is ended: what it wrote stays, and the next one begins with a pool that fits. Where other
work holds the cluster, the pool waits, and a warning says so.
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
_LOST_SECONDS = 15.0  # a lost node that is replaced this soon is best waited for
_JOINED_SECONDS = 60.0  # joining ends a pass too, and nodes of a growing cluster come one by one
_WAIT_SECONDS = 600.0  # for a node, when those that are left hold no actor
_COUNT_SECONDS = 10.0  # between counts of workers that were started again
_PLACE_SECONDS = 60.0  # without a place for any actor: the cluster is busy
_DEATHS = 6  # of workers for each actor without one block written: Ray would start them again for ever

_POOL_ACTOR = "MapWorker("  # how Ray Data names the class of a pool's actors


class PoolChangedError(Exception):
    """The pool of a pass no longer fits the cluster. Ends the pass and never leaves `runtime`."""


class WorkersDieError(Exception):
    """Workers of a pass die as fast as they start. Ends the pass and never leaves `runtime`."""


def alive_nodes() -> list[dict[str, float]]:
    """The resources of each node that is alive, less the CPUs that this job's driver reserves."""
    nodes = {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}
    if reserved := float(os.environ.get(DRIVER_CPUS_VARIABLE, 0)):
        own = nodes[ray.get_runtime_context().get_node_id()]
        own["CPU"] = max(0.0, own.get("CPU", 0.0) - reserved)
    return list(nodes.values())


def fit_again(pool: Pool) -> Pool:
    """The pool for the nodes there are now; waits for one while no actor fits.

    Raises:
        ConfigError: none came.
    """
    end = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            return fit_pool(pool.asked, alive_nodes())
        except ConfigError as error:
            if time.monotonic() > end:
                raise
            log.warning("waiting for a node: %s", error)
            time.sleep(10.0)


def count_restarts() -> int:
    """How often Ray has started workers of this job's actors again."""
    return sum(max(0, int(actor["NumRestarts"])) for actor in _actors_of_this_job())


def has_pool_started() -> bool:
    """Whether an actor of a pool of this job has a place on a node; it may still load weights there."""
    actors = [actor for actor in _actors_of_this_job() if actor["ActorClassName"].startswith(_POOL_ACTOR)]
    return any(actor["State"] != "DEAD" and actor["Address"]["NodeID"] for actor in actors)


def _actors_of_this_job() -> list[dict[str, Any]]:
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return list(state.actors(job_id=job).values())


class Watcher:
    """Watches a pass: Ray Data calls it at each step of the execution.

    It ends the pass when the pool no longer fits the nodes, and when workers die as fast as they start. It logs one
    warning when no actor gets a place.

    Args:
        pool: the pool that the pass began with.
        blocks: number of blocks of the pass; more actors than these have no use.
        parts: returns how many blocks are written.
        restarts: returns how often workers were started again.
        started: returns whether an actor of the pool has a place on a node.
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
        self.waits = True  # until an actor has a place or the warning is logged
        self.deaths: int | None = None  # when a block was last written
        self.parts = 0  # written by then

    def before_execution_starts(self, executor: Any) -> None: ...

    def on_execution_step(self, executor: Any) -> None:
        """Looks at the pass every few seconds.

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
            fits = min(fit_pool(self.pool.asked, self.nodes()).actors, self.blocks)
        except ConfigError:  # no node to go on with: the pass waits for one, too
            fits = self.actors
        if fits == self.actors:
            self.fitted_at = now
        elif now - self.fitted_at > (_LOST_SECONDS if fits < self.actors else _JOINED_SECONDS):
            raise PoolChangedError(f"{fits} actors fit the nodes there are now instead of {self.actors}")

    def count_deaths(self) -> None:
        """Raises WorkersDieError when workers were started again and again and no block was written meanwhile."""
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
        """Logs once that the pool waits, when no actor has had a place and no block was written since the start."""
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
