"""Actor pools: the resources that a step requests, fitted to the cluster before anything starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field, model_validator

from weaksam.core.config import Settings
from weaksam.errors import ConfigError

TASK_CPUS = 0.25  # CPUs of a fetch or write task, which mostly waits
WORKER_MEMORY = 2**29  # bytes: the least private memory of a worker with torch and a small SAM
DRIVER_CPUS_VARIABLE = "WEAKSAM_DRIVER_CPUS"  # the CPUs of its node that a submitted job's driver reserves


class PoolResources(Settings):
    """The resources of a stage's workers; they never change its results."""

    max_actors: int | None = Field(default=None, ge=1)
    """Most actors of the pool; as many as fit into the cluster when left out."""
    grow: bool = False
    """Whether the cluster starts nodes by itself: `max_actors` are requested even while they do not fit into it yet."""
    actor_cpus: float = Field(default=1.0, gt=0)
    """CPUs reserved for one actor; its compute threads are this number rounded up."""
    actor_gpus: float | None = Field(default=None, ge=0)
    """GPUs reserved for one actor, fractions allowed; 1 on a cluster with GPUs, else 0, when left out."""
    batch_size: int = Field(default=8, ge=1)
    """Images of a batch, which an actor processes in one call."""
    image_timeout_s: float = Field(default=600.0, gt=0)
    """Longest time one image may take when it is run alone after a crash."""
    record_times: bool = False
    """Whether to write the times at which each actor worked and waited, to `times/` of the step's folder; `weaksam
    plan` sets it."""

    @model_validator(mode="after")
    def _growth_has_an_end(self) -> PoolResources:
        if self.grow and (self.max_actors is None or self.actor_gpus is None):
            raise ValueError("grow needs max_actors and actor_gpus: what will come cannot be seen yet")
        return self


class CpuPoolResources(PoolResources):
    """The resources of the workers of a stage that has no use for a GPU."""

    actor_gpus: float | None = Field(default=0.0, ge=0, le=0)
    """0: the GPUs that a cluster sets for its pools do not apply to this stage."""


@dataclass(frozen=True)
class Pool:
    """Pool resources fitted to a cluster."""

    actors: int
    fetches: int
    """Most fetch tasks at a time."""
    actor_cpus: float
    actor_gpus: float
    batch_size: int
    image_timeout_s: float
    resources: PoolResources
    """The resources it was fitted from, with the chosen GPUs: a pool fitted again uses these, too."""


def fit_pool(resources: PoolResources, nodes: Sequence[Mapping[str, float]]) -> Pool:
    """Returns the pool for a cluster of `nodes`, each as its resources by Ray's names; an actor runs on one node.

    A node whose memory Ray reports gets no more actors than fit into the memory, but at least one.

    Raises:
        ConfigError: one actor would leave nothing for reading and writing, so the run could never move.
    """
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    actor_gpus = resources.actor_gpus if resources.actor_gpus is not None else min(1.0, gpus)
    spare = 2 * TASK_CPUS  # one fetch and one write task
    on_nodes = sum(_actors_on(node, resources.actor_cpus, actor_gpus) for node in nodes)
    fits = min(on_nodes, math.floor((cpus - spare) / resources.actor_cpus + 1e-6))
    if resources.grow:
        fits = resources.max_actors or fits
    if fits < 1:
        raise ConfigError(
            f"resources: an actor of {resources.actor_cpus:g} CPU and {actor_gpus:g} GPU does not fit: "
            f"the cluster has {cpus:g} CPU and {gpus:g} GPU on {len(nodes)} node(s), "
            f"of which {spare:g} CPU stay free for reading and writing: "
            "lower actor_cpus or actor_gpus, or set grow if nodes will come"
        )
    actors = min(resources.max_actors or fits, fits)
    # Ray Data keeps a sixth of the cluster for an unbounded fetch. If that and the actors leave no room for a task that
    # writes, nothing is written until all images are fetched. Two fetches for each actor are enough to feed it.
    idle = (cpus - actors * resources.actor_cpus) / TASK_CPUS
    return Pool(
        actors=actors,
        fetches=2 * actors if resources.grow else max(1, min(2 * actors, math.floor(idle + 1e-6) - 1)),
        actor_cpus=resources.actor_cpus,
        actor_gpus=actor_gpus,
        batch_size=resources.batch_size,
        image_timeout_s=resources.image_timeout_s,
        resources=resources.model_copy(update={"actor_gpus": actor_gpus}),
    )


def _actors_on(node: Mapping[str, float], actor_cpus: float, actor_gpus: float) -> int:
    by_cpu = math.floor(node.get("CPU", 0.0) / actor_cpus + 1e-6)
    if (memory := node.get("memory")) is not None:
        by_cpu = min(by_cpu, max(1, int(memory // WORKER_MEMORY)))
    return min(by_cpu, math.floor(node.get("GPU", 0.0) / actor_gpus + 1e-6)) if actor_gpus > 0 else by_cpu
