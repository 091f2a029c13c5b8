"""Runs one step at a time on a cluster that several jobs share.

Two pools on one cluster can each occupy a part of its CPUs and wait for the rest for ever, and Ray Data divides its
memory among all jobs. So a step takes its turn: it creates an actor with a fixed name, which ends with the process that
created it, also after a crash.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from weaksam.execution import ray_env

log = logging.getLogger(__name__)

_NAME, _NAMESPACE = "turn", "weaksam"
_POLL_SECONDS = 2.0


@ray.remote(num_cpus=0)
class _Turn:
    def __init__(self, holder: str) -> None:
        self._holder = holder

    def holder(self) -> str:
        return self._holder


@contextmanager
def turn(step: str) -> Iterator[None]:
    """Waits until no other job's step has this cluster; a local cluster has no other jobs."""
    if ray_env.starts_own_cluster():
        yield
        return
    actor = _take(step)
    try:
        yield
    finally:
        ray.kill(actor)


def _take(step: str) -> Any:
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"name": _NAME, "namespace": _NAMESPACE, "scheduling_strategy": node, "max_restarts": 0}
    is_logged = False
    while True:
        try:
            actor: Any = _Turn.options(**options).remote(f"{step} of job {ray.get_runtime_context().get_job_id()}")
            ray.get(actor.holder.remote())
        except (ValueError, ActorDiedError):  # the name is taken
            if not is_logged:
                log.info("%s: waits for its turn on the cluster: %s has it", step, _holder())
                is_logged = True
            time.sleep(_POLL_SECONDS)
        else:
            return actor


def _holder() -> str:
    try:
        return str(ray.get(ray.get_actor(_NAME, _NAMESPACE).holder.remote(), timeout=10))
    except (ValueError, RayError):
        return "another"
