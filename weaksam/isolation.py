"""Images whose block was lost are run one by one, so that the one at fault is known and gets its row."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayActorError, RayTaskError

from weaksam import schemas, tables
from weaksam.errors import StageError, WeakSamError
from weaksam.pools import Pool
from weaksam.rows import Fetch, PartSink, Worker, failed_row
from weaksam.stage import Step

log = logging.getLogger(__name__)

ATTEMPTS = 2  # a worker can also die for a reason of its node; twice alone is the image
HOPELESS = 5  # images that fail in a row before the first success: then it is not the images

Failure = tuple[str, str]  # status, message


def find_user_error(error: BaseException) -> WeakSamError | None:
    """The error for the user inside what Ray raises, or None."""
    seen: list[BaseException | None] = [error]
    while seen:
        found = seen.pop()
        if isinstance(found, WeakSamError):
            return found
        if found is not None:
            seen += [found.__cause__, getattr(found, "cause", None)]
    return None


class _Alone:
    """Does one image at a time."""

    def __init__(self, folder: str, callable_class: type, kwargs: dict, schema: pa.Schema) -> None:
        self.fetch = Fetch(strict=True)
        self.worker = Worker(callable_class, kwargs)
        self.sink = PartSink(folder, schema)

    def run(self, row: pa.Table) -> None:
        self.sink.write([self.worker(self.fetch(row))], None)


def run_alone(step: Step, todo: pa.Table, callable_class: type, kwargs: dict, schema: pa.Schema, pool: Pool) -> None:
    """Runs each image of `todo` by itself; one that fails twice becomes a row with status `crash` or `timeout`.

    Raises:
        WeakSamError: a fault that is not an image's, such as storage or weights.
        StageError: image after image fails and none succeeds.
    """
    start: Any = ray.remote(_Alone).options(max_restarts=0, num_cpus=pool.actor_cpus, num_gpus=pool.actor_gpus)
    waiting = deque(todo.slice(index, 1) for index in range(todo.num_rows))
    failed: Counter[str] = Counter()
    succeeded = 0
    idle: list[Any] = []
    running: dict[Any, tuple[Any, pa.Table, float]] = {}
    while waiting or running:
        while waiting and len(running) < pool.max_actors:
            actor: Any = idle.pop() if idle else start.remote(step.folder, callable_class, kwargs, schema)
            row = waiting.popleft()
            running[actor.run.remote(row)] = (actor, row, time.monotonic())
        for ref, failure in _ended(running, pool.image_timeout_s):
            actor, row, _ = running.pop(ref)
            if failure is None:
                succeeded += 1
                idle.append(actor)
                continue
            ray.kill(actor)
            image_id = row.column("image_id")[0].as_py()
            failed[image_id] += 1
            if failed[image_id] < ATTEMPTS:
                waiting.append(row)
                continue
            if not succeeded and len(failed) >= HOPELESS:
                raise StageError(f"step {step.name}: every image fails, the last one with: {': '.join(failure)}")
            log.warning("%s: %s failed alone twice: %s: %s", step.name, image_id, *failure)
            tables.write_part(step.folder, schemas.to_table([failed_row(image_id, *failure)], schema))


def _ended(running: dict[Any, tuple[Any, pa.Table, float]], timeout_s: float) -> list[tuple[Any, Failure | None]]:
    """What ended within a second, and what runs for too long, each with its failure or None."""
    done = ray.wait(list(running), num_returns=1, timeout=1.0)[0]
    ended: list[tuple[Any, Failure | None]] = [(ref, _failure(ref)) for ref in done]
    for ref, (_, _, started) in running.items():
        if ref not in done and time.monotonic() - started > timeout_s:
            ended.append((ref, ("timeout", f"longer than {timeout_s:g} s")))
    return ended


def _failure(ref: Any) -> Failure | None:
    """Why a lone image failed, or None. What is not the image's fault is raised."""
    try:
        ray.get(ref)
    except RayActorError:
        return "crash", "the worker process died while working on this image"
    except RayTaskError as error:
        if found := find_user_error(error):
            raise found from error
        return "crash", f"{type(error.cause).__name__}: {error.cause}"
    return None
