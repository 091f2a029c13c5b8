"""Runs every stage that maps images to rows on Ray Data: resume, pools, capacity, exactly-once.

todo = images - ids already in parts
  > fetch (tasks): URIs become bytes, the only form in which images travel
  > Worker (actor pool): bytes become rows, by the mapper of the stage
  > PartSink: one part per block, one atomic write per part
remaining images run again, then each alone; then every id is counted once.
"""

from __future__ import annotations

import gc
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.util.annotations
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from weaksam.core import schemas, tables
from weaksam.core.step import Outcome, Step
from weaksam.core.step_folders import existing_ids
from weaksam.data.stated_sizes import warn_of_sizes
from weaksam.errors import StageError, StorageError
from weaksam.execution import nodes
from weaksam.execution.connection import check_cluster, connect
from weaksam.execution.isolation import find_user_error, run_alone
from weaksam.execution.mapping import ImageMapper
from weaksam.execution.pools import TASK_CPUS, Pool, PoolResources, fit_pool
from weaksam.execution.progress import part_counter, report_progress
from weaksam.execution.rows import Fetch, PartSink, Worker, WorkerSpec, common_folder
from weaksam.execution.turns import turn

log = logging.getLogger(__name__)

ROWS_PER_BLOCK = 64  # Ray Data costs about 15 ms per block; a crash loses a block
_MOST_ALONE = 8 * ROWS_PER_BLOCK


def map_images(
    step: Step,
    source: pa.Table,
    factory: Callable[[], ImageMapper],
    *,
    schema: pa.Schema,
    max_pixels: int,
    resources: PoolResources,
) -> Outcome:
    """Maps every image of `source` to a row and accounts for each id exactly once.

    Args:
        step: the step; its folder receives the parts. Existing parts are kept and not computed again.
        source: (image_id, uri, ...), each id once; its metadata has the class names that the rows carry.
        factory: makes the mapper in each actor of the pool; picklable, e.g. a `partial` of a class and its settings.
        schema: schema of the rows, without metadata.
        max_pixels: images of more pixels are refused with status `too_large`.
        resources: the resources of the actor pool.

    Raises:
        StageError: images remain that are neither done nor at fault; the same command continues from that state.
        StorageError: the folder of the images is gone, not single images; their rows are left for the same command.
    """
    _forget_missing(step, source)
    todo = _todo(step.folder, source)
    computed = todo.num_rows
    if not computed:
        return _account(step, source, computed=0)
    if source.num_rows > computed:
        log.info("%s: %d of %d images are done, going on", step.name, source.num_rows - computed, source.num_rows)
    names = schemas.class_names_of(source.schema)
    schema = schemas.with_metadata(schema, fingerprint=step.fingerprint, class_names=names)
    times = step.folder if resources.record_times else None
    spec = WorkerSpec(factory, schema, max_pixels, step=step.name, stage=step.stage.name, times=times)
    check_cluster()  # before progress reports that the step runs
    with report_progress(step, total=source.num_rows, unit="images", look=part_counter(step.folder)):
        connect()  # takes a while, as loading weights does: progress reports from now on that the step runs
        with turn(step.name):
            _run_passes(step, source, todo, spec, fit_pool(resources, nodes.alive_nodes()))
    _check_missing(step, source, todo)
    return _account(step, source, computed=computed)


def _run_passes(step: Step, source: pa.Table, todo: pa.Table, spec: WorkerSpec, pool: Pool) -> None:
    """Runs passes until no image of `todo` is left; after a pass that does little, runs images alone."""
    images = common_folder(source.column("uri").to_pylist())
    while todo.num_rows:
        went_through = _run_pass(step, todo, spec, pool, images=images)
        # Ray ends an actor once nothing refers to it, and the objects of a pass refer to each other: until they are
        # collected, its actors keep their CPUs and GPUs from the next pass.
        gc.collect()
        left = _todo(step.folder, source)
        if left.num_rows:
            pool = nodes.fit_again(pool)
        if went_through and (left.num_rows > todo.num_rows // 2 or 0 < left.num_rows <= ROWS_PER_BLOCK):
            suspects = left.slice(0, _MOST_ALONE)  # enough to find an image at fault; the next pass streams the rest
            log.warning("%s: %d images left, running %d of them alone", step.name, left.num_rows, suspects.num_rows)
            run_alone(step, suspects, spec, pool, images=images)
            alone, left = left, _todo(step.folder, source)
            if left.num_rows == alone.num_rows:
                raise StageError(
                    f"step {step.name}: rows were written but none arrived in {step.folder}: a run needs a place "
                    "that every node of the cluster sees, such as s3:// or a shared folder"
                )
        todo = left


def _forget_missing(step: Step, source: pa.Table) -> None:
    """Removes the rows with status `not_found` of images that exist now, so that these are processed."""
    missing = tables.missing_ids(step.folder, tables.list_parts(step.folder))
    if not missing:
        return
    rows = source.select(["image_id", "uri"]).to_pylist()
    if back := existing_ids({row["image_id"]: row["uri"] for row in rows if row["image_id"] in missing}):
        log.info("%s: %d images that were missing are there now: working on them", step.name, len(back))
        tables.drop_rows(step.folder, back)


def _check_missing(step: Step, source: pa.Table, todo: pa.Table) -> None:
    """Removes the rows and raises StorageError if no image of `todo` exists and `todo` is most of `source`.

    Then the storage is at fault, not the images.
    """
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


def _run_pass(step: Step, todo: pa.Table, spec: WorkerSpec, pool: Pool, *, images: str | None) -> bool:
    """Runs one streaming pass over `todo`; leaves images lost to a crash or an unexpected error to the caller.

    Args:
        step: the step; its folder receives the parts.
        todo: (image_id, uri, ...).
        spec: specification of the workers.
        pool: the actors and tasks.
        images: folder of all images of the step, if they share one.

    Returns:
        False if the pass was ended because nodes came or went.

    Raises:
        WeakSamError: a fault of something other than an image, such as storage or weights.
    """
    rows_per_block = max(1, min(ROWS_PER_BLOCK, math.ceil(todo.num_rows / (4 * pool.actors))))
    # Cut in this process: Ray Data's `repartition` waits for a whole CPU, which a full pool may never leave.
    blocks = [todo.slice(start, rows_per_block) for start in range(0, todo.num_rows, rows_per_block)]
    context = _context(step, len(blocks), rows_per_block, pool)
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        # The restart options have no named replacement yet; pyproject.toml keeps Ray below the release without them.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        dataset = _dataset(blocks, spec, pool, batch_size=min(pool.batch_size, rows_per_block), images=images)
        _quieten()
        try:
            dataset.write_datasink(PartSink(step.folder, spec.schema), ray_remote_args={"num_cpus": TASK_CPUS})
        except nodes.PoolChangedError as change:
            log.info("%s: %s, going on with those", step.name, change)
            return False
        except nodes.WorkersDieError as error:
            log.warning("%s: %s", step.name, error)
        except Exception as error:
            if user_error := find_user_error(error):
                raise user_error from error
            log.warning("%s: a pass ended early: %s", step.name, (str(error).strip().splitlines() or ["?"])[-1])
    return True


def _dataset(
    blocks: Sequence[pa.Table], spec: WorkerSpec, pool: Pool, *, batch_size: int, images: str | None
) -> ray.data.Dataset:
    """Returns the lazy dataset of the rows of `blocks`. A batch larger than a block would join blocks again."""
    fetched = ray.data.from_arrow(list(blocks)).map_batches(
        Fetch(timed=spec.times is not None, folder=images),
        batch_format="pyarrow",
        batch_size=batch_size,
        num_cpus=TASK_CPUS,
        compute=TaskPoolStrategy(size=min(pool.fetches, len(blocks))),
    )
    return fetched.map_batches(
        Worker,
        fn_constructor_args=[spec],
        batch_format="pyarrow",
        batch_size=batch_size,
        num_cpus=pool.actor_cpus,
        num_gpus=pool.actor_gpus,
        # One more block waits at each actor while it works, so that it never idles. A pool that grows on demand would
        # not grow: Ray Data keeps half of the CPUs for writing.
        compute=ActorPoolStrategy(size=min(pool.actors, len(blocks)), max_tasks_in_flight_per_actor=2),
        max_restarts=-1,
        # Retry a block once; a second failure leaves it for a later pass (the default retries a crash for ever).
        max_task_retries=1,
    )


def _context(step: Step, blocks: int, rows_per_block: int, pool: Pool) -> ray.data.DataContext:
    watcher: Any = partial(  # Ray Data calls it like a class
        nodes.Watcher,
        pool,
        blocks,
        parts=lambda: len(tables.list_parts(step.folder)),
        restarts=nodes.count_restarts,
        started=nodes.has_pool_started,
    )
    context = ray.data.DataContext.get_current().copy()
    context.custom_execution_callback_classes = [watcher]
    context.max_errored_blocks = max(8, blocks // 20)
    context.max_consecutive_actor_init_deaths = 3
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = max(3600, int(rows_per_block * pool.image_timeout_s))
    context.target_max_block_size = 64 * 1024**2
    return context


def _quieten() -> None:
    """Hides Ray Data's console lines, also those about lost blocks, which are handled; its log file keeps them."""
    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)


def _account(step: Step, source: pa.Table, *, computed: int) -> Outcome:
    """Checks that the parts have each id of `source` exactly once, and counts the failed rows."""
    ids = tables.done_ids(step.folder)
    excluded = tables.first_wins(ids)
    written = {image_id for part in ids.values() for image_id in part}
    expected = set(source.column("image_id").to_pylist())
    if written != expected:
        raise StageError(
            f"step {step.name}: {len(expected - written)} images have no row, {len(written - expected)} rows have no "
            f"image in {step.folder}: run the same command again; if this stays, another run writes to this folder"
        )
    if excluded:
        log.warning("%s: %d rows were written twice, the first is kept", step.name, sum(map(len, excluded.values())))
    manifest = {"parts": list(ids), "excluded": excluded}
    rows = tables.read_table(step.folder, manifest, columns=["status", "message", "height", "width"]).to_pylist()
    _compare_sizes(step, rows)
    failed = [row for row in rows if row["status"] != schemas.OK]
    return Outcome(
        rows=len(expected),
        failed=len(failed),
        computed=computed,
        failures=[f"{row['image_id']}: {row['status']}: {row['message']}" for row in failed[:10]],
        parts=list(ids),
        excluded=excluded,
    )


def _compare_sizes(step: Step, rows: list[dict[str, Any]]) -> None:
    """Warns when decoded images have other sizes than the dataset states."""
    if "images" in step.inputs and rows and rows[0].keys() >= {"height", "width"}:
        images = step.inputs["images"].read(["height", "width"]).to_pylist()
        stated = {row["image_id"]: (row["height"], row["width"]) for row in images}
        sizes = [
            (r["image_id"], stated[r["image_id"]], (r["height"], r["width"])) for r in rows if r["image_id"] in stated
        ]
        warn_of_sizes(step.name, sizes)
