"""Runs the images of lost blocks one by one, so that the image at fault is known and gets its row."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from weaksam.core import schemas, tables
from weaksam.core.step import Step
from weaksam.errors import StageError, WeakSamError
from weaksam.execution import telemetry
from weaksam.execution.mapping import failed_row
from weaksam.execution.pools import Pool
from weaksam.execution.rows import Fetch, PartSink, Worker, WorkerSpec

log = logging.getLogger(__name__)

ATTEMPTS = 2  # attempts per image: a first failure may be the node's fault, a second is the image's
HOPELESS = 5  # if this many images fail before the first success, the fault is not the images'
NODE_DEATHS = 20  # lost nodes that a call of `run_alone` survives

Failure = tuple[str, str]  # status, message
NODE_DIED: Failure = ("crash", "the node of its worker died")


def find_user_error(error: BaseException) -> WeakSamError | None:
    """Returns the error for the user inside an exception of Ray, or None."""
    causes: list[BaseException | None] = [error]
    while causes:
        cause = causes.pop()
        # A RayTaskError may be of both classes; its text has a traceback.
        if isinstance(cause, WeakSamError) and not isinstance(cause, RayTaskError):
            return cause
        if cause is not None:
            causes += [cause.__cause__, getattr(cause, "cause", None)]
    return None


@dataclass
class _Running:
    """An image that a worker processes.

    `started` is None while the worker waits for a node or loads weights: that time does not count as the image's.
    """

    actor: Any
    row: pa.Table
    ready: Any
    started: float | None = None


class _Alone:
    """An actor that processes one image at a time."""

    def __init__(self, folder: str, spec: WorkerSpec, images: str | None) -> None:
        self.fetch = Fetch(strict=True, folder=images)
        self.worker = Worker(spec)
        self.sink = PartSink(folder, spec.schema)

    def ready(self) -> None:
        """Returns once the worker is constructed."""

    def run(self, row: pa.Table) -> None:
        self.sink.write([self.worker(self.fetch(row))], None)


def run_alone(step: Step, todo: pa.Table, spec: WorkerSpec, pool: Pool, *, images: str | None) -> None:
    """Runs each image of `todo` by itself; one that fails twice becomes a row with status `crash` or `timeout`.

    Args:
        step: the step; its folder receives the rows.
        todo: (image_id, uri, ...) of the images.
        spec: specification of the workers.
        pool: the size of the pool; each actor processes one image at a time.
        images: folder of all images of the step, if they share one.

    Raises:
        WeakSamError: a fault of something other than an image, such as storage or weights.
        StageError: image after image fails and none succeeds.
    """
    start: Any = ray.remote(_Alone).options(max_restarts=0, num_cpus=pool.actor_cpus, num_gpus=pool.actor_gpus)
    waiting = deque(todo.slice(index, 1) for index in range(todo.num_rows))
    failed: Counter[str] = Counter()
    succeeded = node_deaths = 0
    idle: list[Any] = []
    running: dict[Any, _Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < pool.actors:
                actor: Any = idle.pop() if idle else start.remote(step.folder, spec, images)
                row = waiting.popleft()
                ready = actor.ready.remote()
                running[actor.run.remote(row)] = _Running(actor, row, ready)
            while idle:  # no image waits for them, but an actor that could not start yet may wait for their resources
                ray.kill(idle.pop())
            for ref, failure in _ended(running, pool.image_timeout_s):
                ended = running.pop(ref)
                actor, row = ended.actor, ended.row
                if failure is None:
                    succeeded += 1
                    idle.append(actor)
                    continue
                ray.kill(actor)
                if failure is NODE_DIED and node_deaths < NODE_DEATHS:
                    node_deaths += 1
                    waiting.append(row)
                    continue
                image_id = row.column("image_id")[0].as_py()
                failed[image_id] += 1
                if failed[image_id] < ATTEMPTS:
                    waiting.append(row)
                    continue
                if not succeeded and 1 < min(HOPELESS, todo.num_rows) <= len(failed):
                    raise StageError(f"step {step.name}: every image fails, the last one with: {': '.join(failure)}")
                log.warning("%s: %s failed alone twice: %s: %s", step.name, image_id, *failure)
                tables.write_part(step.folder, schemas.to_table([failed_row(image_id, *failure)], spec.schema))
                telemetry.set_tags(step=step.name, stage=step.stage.name)
                telemetry.count("weaksam_images_failed")
    finally:  # a traceback may refer to the actors: they would keep their CPUs and GPUs for as long as it lives
        for actor in [*idle, *(image.actor for image in running.values())]:
            ray.kill(actor)


def _ended(running: dict[Any, _Running], timeout_s: float) -> list[tuple[Any, Failure | None]]:
    """Returns the images that ended within a second and those over their time limit, each with its failure or None."""
    done = ray.wait(list(running), num_returns=1, timeout=1.0)[0]
    ended: list[tuple[Any, Failure | None]] = [(ref, _failure(ref, running[ref].ready)) for ref in done]
    now = time.monotonic()
    for ref, image in running.items():
        if image.started is None and ray.wait([image.ready], timeout=0)[0]:
            image.started = now
        if ref not in done and image.started is not None and now - image.started > timeout_s:
            ended.append((ref, ("timeout", f"longer than {timeout_s:g} s")))
    return ended


def _failure(ref: Any, ready: Any) -> Failure | None:
    """Returns why a lone image failed, or None. Raises a fault that is not the image's."""
    try:
        ray.get(ready)
    except RayError as error:
        if _node_died(error):
            return NODE_DIED
        raise StageError(f"no worker can be started: {_why_dead(error)}") from error
    try:
        ray.get(ref)
    except RayTaskError as error:
        if user_error := find_user_error(error):
            raise user_error from error
        return "crash", f"{type(error.cause).__name__}: {error.cause}"
    except OutOfMemoryError:
        return "oom", "its worker was ended because the node ran out of memory"
    except RayError as error:
        return NODE_DIED if _node_died(error) else ("crash", "the worker process died while working on this image")
    return None


def _why_dead(error: RayError) -> str:
    """Returns one sentence on why a worker ended before it had work; Ray writes several, about its own settings."""
    text = " ".join(str(error).split())
    if isinstance(error, OutOfMemoryError) or "OOM" in text or "low on memory" in text or "out of memory" in text:
        return (
            "the memory of its node is full: give the machine (or container) more, end other programs, or lower "
            "resources.max_actors"
        )
    return text[:500]


def _node_died(error: RayError) -> bool:
    """Returns whether an actor ended with its node; only the text of Ray's error says so."""
    return isinstance(error, RayActorError) and "node has died" in str(error)
