"""Ray Data plumbing of every stage that maps images to rows: resume, pools, capacity, exactly-once.

todo = images - ids already in parts
  > fetch (tasks): URIs become bytes, the only form in which images travel
  > callable (actor pool): bytes become rows
  > PartSink: one part a block, one atomic write a part
left-over images run again, then each alone; then every id is counted once.
"""

from __future__ import annotations

import gc
import logging
import math
import warnings
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.util.annotations
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from weaksam.core import schemas, tables
from weaksam.core.step import Outcome, Step
from weaksam.core.step_folders import are_there
from weaksam.data.stated_sizes import warn_of_sizes
from weaksam.errors import StageError, StorageError
from weaksam.execution import nodes

# first: it sets what Ray reads when it is imported
from weaksam.execution.connection import check_cluster, connect, disconnect
from weaksam.execution.isolation import find_user_error, run_alone
from weaksam.execution.pools import TASK_CPUS, Pool, PoolResources, fit_pool
from weaksam.execution.progress import part_counter, tell_progress
from weaksam.execution.rows import Fetch, PartSink, Worker, common_folder
from weaksam.execution.turns import turn

__all__ = ["connect", "disconnect", "map_images"]

log = logging.getLogger(__name__)

ROWS_PER_BLOCK = 64  # Ray Data costs about 15 ms a block; a block is also what a crash loses
_MOST_ALONE = 8 * ROWS_PER_BLOCK


def map_images(
    step: Step,
    source: pa.Table,
    callable_class: type,
    kwargs: dict[str, Any],
    *,
    schema: pa.Schema,
    resources: PoolResources,
) -> Outcome:
    """Runs `callable_class` over every image of `source` and accounts for each id exactly once.

    Args:
        step: whose folder receives the parts; parts that are there already are kept and not computed again.
        source: (image_id, uri, ...), each id once.
        callable_class: what `rows` says a callable is.
        kwargs: its constructor arguments.
        schema: of the rows, with metadata.
        resources: of the actor pool.

    Raises:
        StageError: images remain that are neither done nor at fault; the same command goes on from here.
        StorageError: it is not single images that are gone; their rows are left for the same command.
    """
    _forget_missing(step, source)
    todo = _todo(step.folder, source)
    computed = todo.num_rows
    if not computed:
        return _account(step, source, computed=0)
    if source.num_rows > computed:
        log.info("%s: %d of %d images are done, going on", step.name, source.num_rows - computed, source.num_rows)
    worker = {"callable_class": callable_class, "kwargs": kwargs, "step": step.name, "stage": step.stage.name}
    worker["times"] = step.folder if resources.record_times else None
    check_cluster()  # before anything says that the step runs
    with tell_progress(step, total=source.num_rows, unit="images", look=part_counter(step.folder)):
        connect()  # takes a while, and so do weights: the step is told to run from here on
        with turn(step.name):
            pool = fit_pool(resources, nodes.alive_nodes())
            _run_passes(step, source, todo, worker, schema, pool)
    _check_missing(step, source, todo)
    return _account(step, source, computed=computed)


def _run_passes(
    step: Step, source: pa.Table, todo: pa.Table, worker: dict[str, Any], schema: pa.Schema, pool: Pool
) -> None:
    """Runs pass after pass until no image of `todo` is left; where one does not get far, some images alone."""
    images = common_folder(source.column("uri").to_pylist())
    while todo.num_rows:
        went_through = _run_pass(step, todo, worker, schema, pool, images=images)
        # Ray ends an actor once nothing refers to it, and what a pass leaves refers to itself: until it is collected
        # its actors keep their CPUs and GPUs from the next pass.
        gc.collect()
        left = _todo(step.folder, source)
        if left.num_rows:
            pool = nodes.fit_again(pool)
        if went_through and (left.num_rows > todo.num_rows // 2 or 0 < left.num_rows <= ROWS_PER_BLOCK):
            some = left.slice(0, _MOST_ALONE)  # enough to find a culprit; the next pass streams the rest
            log.warning("%s: %d images left, running %d of them alone", step.name, left.num_rows, some.num_rows)
            run_alone(step, some, worker, schema, pool, images=images)
            alone, left = left, _todo(step.folder, source)
            if left.num_rows == alone.num_rows:
                raise StageError(
                    f"step {step.name}: rows were written but none arrived in {step.folder}: a run needs a place "
                    "that every node of the cluster sees, such as s3:// or a shared folder"
                )
        todo = left


def _forget_missing(step: Step, source: pa.Table) -> None:
    """Removes the rows that say `not_found` of images that are there now, so that they are worked on."""
    missing = tables.missing_ids(step.folder, tables.list_parts(step.folder))
    if not missing:
        return
    rows = source.select(["image_id", "uri"]).to_pylist()
    if back := are_there({row["image_id"]: row["uri"] for row in rows if row["image_id"] in missing}):
        log.info("%s: %d images that were missing are there now: working on them", step.name, len(back))
        tables.drop_rows(step.folder, back)


def _check_missing(step: Step, source: pa.Table, todo: pa.Table) -> None:
    """Takes the rows back where not one image was found and most should have been: then it is not the images."""
    missing = tables.missing_ids(step.folder, tables.list_parts(step.folder))
    if todo.num_rows > max(1, source.num_rows // 2) and missing.issuperset(todo.column("image_id").to_pylist()):
        tables.drop_rows(step.folder, missing)
        folder = common_folder(source.column("uri").to_pylist())
        raise StorageError(
            f"step {step.name}: not one of {todo.num_rows} images is in {folder or 'its place'}: it was moved, or its "
            "file system is not mounted: the same command goes on once they are there"
        )


def _todo(folder: str, source: pa.Table) -> pa.Table:
    return tables.without_ids(source, (image_id for ids in tables.done_ids(folder).values() for image_id in ids))


def _run_pass(
    step: Step, todo: pa.Table, worker: dict[str, Any], schema: pa.Schema, pool: Pool, *, images: str | None
) -> bool:
    """One streaming pass over `todo`. What a crash or an unexpected error loses is left for the caller.

    `worker` has the arguments of a `Worker`; `images` is the folder of all images of the step.

    Returns:
        False when it was ended because nodes came or went.

    Raises:
        WeakSamError: a fault that is not an image's, such as storage or weights.
    """
    rows_per_block = max(1, min(ROWS_PER_BLOCK, math.ceil(todo.num_rows / (4 * pool.actors))))
    starts = range(0, todo.num_rows, rows_per_block)
    context = _context(todo.num_rows, rows_per_block, pool)

    def parts() -> int:
        return len(tables.list_parts(step.folder))

    watcher = nodes.watcher(pool, len(starts), parts=parts, restarts=nodes.count_restarts)
    context.custom_execution_callback_classes = [watcher]
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        # The restart options have no named replacement yet; pyproject.toml keeps Ray below the release without them.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        batch_size = min(pool.batch_size, rows_per_block)  # a larger batch would join blocks again
        # Cut here: Ray Data's `repartition` waits for a whole CPU, and beside a full pool there may be none for ever.
        dataset = (
            ray.data.from_arrow([todo.slice(start, rows_per_block) for start in starts])
            .map_batches(
                Fetch(timed=worker["times"] is not None, folder=images),
                batch_format="pyarrow",
                batch_size=batch_size,
                num_cpus=TASK_CPUS,
                compute=TaskPoolStrategy(size=min(pool.fetches, len(starts))),
            )
            .map_batches(
                Worker,
                fn_constructor_kwargs=worker,
                batch_format="pyarrow",
                batch_size=batch_size,
                num_cpus=pool.actor_cpus,
                num_gpus=pool.actor_gpus,
                # One block more waits at each actor while it works, so that it never idles. A pool that grows by
                # need would not grow: Ray Data keeps half of the CPUs for writing.
                compute=ActorPoolStrategy(size=min(pool.actors, len(starts)), max_tasks_in_flight_per_actor=2),
                max_restarts=-1,
                # Twice a block, then it is given up for this pass (the default retries a crash for ever).
                max_task_retries=1,
            )
        )
        _quieten()
        try:
            dataset.write_datasink(PartSink(step.folder, schema), ray_remote_args={"num_cpus": TASK_CPUS})
        except nodes.PoolChangedError as change:
            log.info("%s: %s, going on with those", step.name, change)
            return False
        except nodes.WorkersDieError as error:
            log.warning("%s: %s", step.name, error)
        except Exception as error:
            if found := find_user_error(error):
                raise found from error
            log.warning("%s: a pass ended early: %s", step.name, (str(error).strip().splitlines() or ["?"])[-1])
    return True


def _context(rows: int, rows_per_block: int, pool: Pool) -> ray.data.DataContext:
    context = ray.data.DataContext.get_current().copy()
    context.max_errored_blocks = max(8, rows // rows_per_block // 20)
    context.max_consecutive_actor_init_deaths = 3
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = max(3600, int(rows_per_block * pool.image_timeout_s))
    context.target_max_block_size = 64 * 1024**2
    return context


def _quieten() -> None:
    """Leaves Ray Data's own console lines out, also of lost blocks, which are handled; its log file keeps them."""
    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)


def _account(step: Step, source: pa.Table, *, computed: int) -> Outcome:
    """Checks that the ids of all parts are the ids of `source`, each once, and counts the failed rows."""
    ids = tables.done_ids(step.folder)
    excluded = tables.first_wins(ids)
    found = {image_id for part in ids.values() for image_id in part}
    wanted = set(source.column("image_id").to_pylist())
    if found != wanted:
        raise StageError(
            f"step {step.name}: {len(wanted - found)} images have no row, {len(found - wanted)} rows have no image "
            f"in {step.folder}: run the same command again; if this stays, another run writes to this folder"
        )
    if excluded:
        log.warning("%s: %d rows were written twice, the first is kept", step.name, sum(map(len, excluded.values())))
    manifest = {"parts": list(ids), "excluded": excluded}
    rows = tables.read_table(step.folder, manifest, columns=["status", "message", "height", "width"]).to_pylist()
    _compare_sizes(step, rows)
    failed = [row for row in rows if row["status"] != schemas.OK]
    return Outcome(
        rows=len(wanted),
        failed=len(failed),
        computed=computed,
        failures=[f"{row['image_id']}: {row['status']}: {row['message']}" for row in failed[:10]],
        parts=list(ids),
        excluded=excluded,
    )


def _compare_sizes(step: Step, rows: list[dict[str, Any]]) -> None:
    """Warns when images, as they were decoded, have other sizes than the dataset states."""
    if "images" in step.inputs and rows and rows[0].keys() >= {"height", "width"}:
        images = tables.read_step(step.inputs["images"], columns=["height", "width"]).to_pylist()
        stated = {row["image_id"]: (row["height"], row["width"]) for row in images}
        sizes = [
            (r["image_id"], stated[r["image_id"]], (r["height"], r["width"])) for r in rows if r["image_id"] in stated
        ]
        warn_of_sizes(step.name, sizes)
