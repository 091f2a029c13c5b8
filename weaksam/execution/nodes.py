"""The nodes of the cluster while a step runs: they come and go, and its pool of actors follows.

Ray Data holds on to the size a pool began with. Actors of a lost node then wait for another one with blocks queued to
them, or fill the nodes that are left and leave no CPU to read and write with; and a node that joins stays idle. So a
pass whose pool no longer fits is ended: what it wrote stays, and the next one begins with a pool that fits.
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
_DEATHS = 6  # of workers for each actor without one block written: Ray would start them again for ever


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
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return sum(max(0, int(actor["NumRestarts"])) for actor in state.actors(job_id=job).values())


def watcher(
    pool: Pool,
    blocks: int,
    *,
    parts: Callable[[], int] = lambda: 0,
    restarts: Callable[[], int] = lambda: 0,
    nodes: Callable[[], Nodes] = alive_nodes,
    clock: Callable[[], float] = time.monotonic,
) -> type:
    """A class whose instances Ray Data calls at each step of a pass; they end it when its pool fits no more.

    Args:
        pool: that the pass began with.
        blocks: of the pass; more actors than these have no use.
        parts: gives how many blocks are written.
        restarts: gives how often workers were started again.
        nodes: gives the nodes there are.
        clock: gives seconds.
    """
    actors = min(pool.actors, blocks)

    class Watcher:
        def __init__(self) -> None:
            self.looked = self.fitted_at = self.counted = clock()
            self.deaths: int | None = None  # when a block was last written
            self.parts = 0

        def before_execution_starts(self, executor: Any) -> None: ...

        def on_execution_step(self, executor: Any) -> None:
            now = clock()
            if now - self.looked < _LOOK_SECONDS:
                return
            self.looked = now
            if now - self.counted >= _COUNT_SECONDS:
                self.counted = now
                self.count_deaths()
            try:
                fits = min(fit_pool(pool.asked, nodes()).actors, blocks)
            except ConfigError:  # no node to go on with: the pass waits for one, too
                fits = actors
            if fits == actors:
                self.fitted_at = now
            elif now - self.fitted_at > (_LOST_SECONDS if fits < actors else _JOINED_SECONDS):
                raise PoolChangedError(f"{fits} actors fit the nodes there are now instead of {actors}")

        def count_deaths(self) -> None:
            deaths = restarts()
            if self.deaths is None:
                self.deaths, self.parts = deaths, parts()
            elif deaths - self.deaths >= _DEATHS * actors:
                if (written := parts()) == self.parts:
                    raise WorkersDieError(
                        f"workers were started again {deaths - self.deaths} times and finished nothing meanwhile, for "
                        "want of memory if nothing else is known"
                    )
                self.deaths, self.parts = deaths, written

        def after_execution_succeeds(self, executor: Any) -> None: ...

        def after_execution_fails(self, executor: Any, error: Exception) -> None: ...

    return Watcher
