"""Images whose block was lost are run one by one, so that the one at fault is known and gets its row."""

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
from weaksam.execution import metrics
from weaksam.execution.pools import Pool
from weaksam.execution.rows import Fetch, PartSink, Worker, failed_row

log = logging.getLogger(__name__)

ATTEMPTS = 2  # a worker can also die for a reason of its node; twice alone is the image
HOPELESS = 5  # images that fail in a row before the first success: then it is not the images
NODE_DEATHS = 20  # that a run of lone images survives

Failure = tuple[str, str]  # status, message
NODE_DIED: Failure = ("crash", "the node of its worker died")


def find_user_error(error: BaseException) -> WeakSamError | None:
    """The error for the user inside what Ray raises, or None."""
    seen: list[BaseException | None] = [error]
    while seen:
        found = seen.pop()
        if isinstance(found, WeakSamError) and not isinstance(
            found, RayTaskError
        ):  # that one is both, with a traceback
            return found
        if found is not None:
            seen += [found.__cause__, getattr(found, "cause", None)]
    return None


@dataclass
class _Running:
    """An image at work. `started` is None while its worker waits for a node or loads weights: not the image's time."""

    actor: Any
    row: pa.Table
    ready: Any
    started: float | None = None


class _Alone:
    """Does one image at a time."""

    def __init__(self, folder: str, worker: dict[str, Any], schema: pa.Schema, images: str | None) -> None:
        self.fetch = Fetch(strict=True, folder=images)
        self.worker = Worker(**worker)
        self.sink = PartSink(folder, schema)

    def ready(self) -> None:
        """Returns once the callable stands."""

    def run(self, row: pa.Table) -> None:
        found = self.worker(self.fetch(row))
        if found.column("image_id").to_pylist() != row.column("image_id").to_pylist():
            raise ValueError("the callable must give one row, with the image's own id")
        self.sink.write([found], None)


def run_alone(
    step: Step, todo: pa.Table, worker: dict[str, Any], schema: pa.Schema, pool: Pool, *, images: str | None
) -> None:
    """Runs each image of `todo` by itself; one that fails twice becomes a row with status `crash` or `timeout`.

    `worker` has the arguments of a `Worker`; `images` is the folder of all images of the step.

    Raises:
        WeakSamError: a fault that is not an image's, such as storage or weights.
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
                actor: Any = idle.pop() if idle else start.remote(step.folder, worker, schema, images)
                row = waiting.popleft()
                ready = actor.ready.remote()
                running[actor.run.remote(row)] = _Running(actor, row, ready)
            while idle:  # nothing waits for them, but an actor that could not start yet may wait for their place
                ray.kill(idle.pop())
            for ref, failure in _ended(running, pool.image_timeout_s):
                one = running.pop(ref)
                actor, row = one.actor, one.row
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
                tables.write_part(step.folder, schemas.to_table([failed_row(image_id, *failure)], schema))
                metrics.set_tags(step=step.name, stage=step.stage.name)
                metrics.count("weaksam_images_failed")
    finally:  # a traceback may refer to them: they would keep their CPUs and GPUs for as long as it lives
        for actor in [*idle, *(one.actor for one in running.values())]:
            ray.kill(actor)


def _ended(running: dict[Any, _Running], timeout_s: float) -> list[tuple[Any, Failure | None]]:
    """What ended within a second, and what runs for too long, each with its failure or None."""
    done = ray.wait(list(running), num_returns=1, timeout=1.0)[0]
    ended: list[tuple[Any, Failure | None]] = [(ref, _failure(ref, running[ref].ready)) for ref in done]
    now = time.monotonic()
    for ref, one in running.items():
        if one.started is None and ray.wait([one.ready], timeout=0)[0]:
            one.started = now
        if ref not in done and one.started is not None and now - one.started > timeout_s:
            ended.append((ref, ("timeout", f"longer than {timeout_s:g} s")))
    return ended


def _failure(ref: Any, ready: Any) -> Failure | None:
    """Why a lone image failed, or None. What is not the image's fault is raised."""
    try:
        ray.get(ready)
    except RayError as error:
        if _node_died(error):
            return NODE_DIED
        raise StageError(f"no worker can be started: {_why_dead(error)}") from error
    try:
        ray.get(ref)
    except RayTaskError as error:
        if found := find_user_error(error):
            raise found from error
        return "crash", f"{type(error.cause).__name__}: {error.cause}"
    except OutOfMemoryError:
        return "oom", "its worker was ended because the node ran out of memory"
    except RayError as error:
        return NODE_DIED if _node_died(error) else ("crash", "the worker process died while working on this image")
    return None


def _why_dead(error: RayError) -> str:
    """Why a worker ended before it had work, in a sentence; Ray has several, with advice for its own settings."""
    text = " ".join(str(error).split())
    if isinstance(error, OutOfMemoryError) or "OOM" in text or "low on memory" in text or "out of memory" in text:
        return (
            "the memory of its node is full: give the machine (or container) more, end other programs, or lower "
            "resources.max_actors"
        )
    return text[:500]


def _node_died(error: RayError) -> bool:
    """Whether an actor ended with its node; Ray says so in words alone."""
    return isinstance(error, RayActorError) and "node has died" in str(error)
