"""Ray Data plumbing of every stage that maps images to rows: resume, pools, capacity, exactly-once.

todo = images - ids already in parts
  > fetch (tasks): URIs become bytes, the only form in which images travel
  > callable (actor pool): bytes become rows
  > PartSink: one part a block, one atomic write a part
left-over images run again, then each alone; then every id is counted once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from weaksam import schemas, tables
from weaksam.data.stated_sizes import warn_of_sizes
from weaksam.errors import ClusterError, StageError
from weaksam.object_stores import ENDPOINT_VARIABLE
from weaksam.pools import TASK_CPUS, Pool, PoolResources, fit_pool
from weaksam.progress import part_counter, tell_progress
from weaksam.stage import Outcome, Step

# A killed driver's reservation in Ray Data's coordinator starves the next one until it expires (default 180 s).
os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "30")
if "RAY_ADDRESS" not in os.environ and "ray" not in sys.modules:  # Ray reads them when it is imported
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # what a local cluster has anyway, without the notice
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its complaint about every actor pool is no error

import ray
import ray.data
import ray.exceptions
import ray.util.annotations
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from weaksam import nodes
from weaksam.isolation import find_user_error, run_alone
from weaksam.rows import Fetch, PartSink, Worker
from weaksam.turns import turn

log = logging.getLogger(__name__)

# glibc gives large buffers back to the system at once, and getting them again can cost more than the work on them:
# elementwise operations of torch on a virtual machine were three times slower without these.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
# Where there are more workers than cores, Ray ends one that had no task for a second, and the next block of images
# pays for another: some two seconds of a core. Small images on two cores took a fifth longer.
_KEEP_WORKERS = {"RAY_idle_worker_killing_time_threshold_ms": "60000"}

ROWS_PER_BLOCK = 64  # Ray Data costs about 15 ms a block; a block is also what a crash loses
_MOST_ALONE = 8 * ROWS_PER_BLOCK


def connect() -> None:
    """Joins the cluster of `RAY_ADDRESS` (a submitted job has it set) or starts one on this machine."""
    if not ray.is_initialized():
        for variable, value in (_KEEP_MEMORY | _KEEP_WORKERS).items():
            os.environ.setdefault(variable, value)  # a local cluster inherits it
        address = os.environ.get("RAY_ADDRESS", "local")
        options = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
        if address != "local":
            options["runtime_env"] = {"env_vars": _told_to_workers(os.environ)}
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            told = str(error).strip().splitlines() or ["?"]
            raise ClusterError(
                f"the cluster at {address} cannot be joined ({told[0]}): check RAY_ADDRESS and RAY_AUTH_TOKEN"
            ) from error
        except Exception as error:  # Ray has no class for it
            if "timed out during startup" not in str(error):
                raise
            raise ClusterError(
                "Ray did not start in time on this machine: it is busy, or its disk is full (/tmp/ray, or RAY_TMPDIR): "
                "the same command goes on"
            ) from error

    # Ray's own handler ends the process with a dump; this way the reservation is given back and the user is told.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _told_to_workers(environment: Mapping[str, str]) -> dict[str, str]:
    """What processes of a running cluster must know of this one's environment, unless their job was told already."""
    job = json.loads(environment.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    told = (job.get("runtime_env") or {}).get("env_vars") or {}
    wanted = (ENDPOINT_VARIABLE,)
    return {name: environment[name] for name in wanted if name in environment and name not in told}


def disconnect() -> None:
    """Leaves the cluster; ends it when `connect` started it."""
    ray.shutdown()


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
    """
    todo = _todo(step.folder, source)
    computed = todo.num_rows
    if not computed:
        return _account(step, source, computed=0)
    if source.num_rows > computed:
        log.info("%s: %d of %d images are done, going on", step.name, source.num_rows - computed, source.num_rows)
    worker = {"callable_class": callable_class, "kwargs": kwargs, "step": step.name, "stage": step.stage.name}
    worker["times"] = step.folder if resources.record_times else None
    with tell_progress(step, total=source.num_rows, unit="images", look=part_counter(step.folder)):
        connect()  # takes a while, and so do weights: the step is told to run from here on
        with turn(step.name):
            pool = fit_pool(resources, nodes.alive_nodes())
            _run_passes(step, source, todo, worker, schema, pool)
    return _account(step, source, computed=computed)


def _run_passes(
    step: Step, source: pa.Table, todo: pa.Table, worker: dict[str, Any], schema: pa.Schema, pool: Pool
) -> None:
    """Runs pass after pass until no image of `todo` is left; where one does not get far, some images alone."""
    while todo.num_rows:
        went_through = _run_pass(step, todo, worker, schema, pool)
        left = _todo(step.folder, source)
        if left.num_rows:
            pool = nodes.fit_again(pool)
        if went_through and (left.num_rows > todo.num_rows // 2 or 0 < left.num_rows <= ROWS_PER_BLOCK):
            some = left.slice(0, _MOST_ALONE)  # enough to find a culprit; the next pass streams the rest
            log.warning("%s: %d images left, running %d of them alone", step.name, left.num_rows, some.num_rows)
            run_alone(step, some, worker, schema, pool)
            alone, left = left, _todo(step.folder, source)
            if left.num_rows == alone.num_rows:
                raise StageError(
                    f"step {step.name}: rows were written but none arrived in {step.folder}: a run needs a place "
                    "that every node of the cluster sees, such as s3:// or a shared folder"
                )
        todo = left


def _todo(folder: str, source: pa.Table) -> pa.Table:
    return tables.without_ids(source, (image_id for ids in tables.done_ids(folder).values() for image_id in ids))


def _run_pass(step: Step, todo: pa.Table, worker: dict[str, Any], schema: pa.Schema, pool: Pool) -> bool:
    """One streaming pass over `todo`. What a crash or an unexpected error loses is left for the caller.

    `worker` has the arguments of a `Worker`.

    Returns:
        False when it was ended because nodes came or went.

    Raises:
        WeakSamError: a fault that is not an image's, such as storage or weights.
    """
    rows_per_block = max(1, min(ROWS_PER_BLOCK, math.ceil(todo.num_rows / (4 * pool.actors))))
    starts = range(0, todo.num_rows, rows_per_block)
    context = _context(todo.num_rows, rows_per_block, pool)
    context.custom_execution_callback_classes = [nodes.watcher(pool, len(starts))]
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        # The restart options have no named replacement yet; pyproject.toml keeps Ray below the release without them.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        batch_size = min(pool.batch_size, rows_per_block)  # a larger batch would join blocks again
        # Cut here: Ray Data's `repartition` waits for a whole CPU, and beside a full pool there may be none for ever.
        dataset = (
            ray.data.from_arrow([todo.slice(start, rows_per_block) for start in starts])
            .map_batches(
                Fetch(timed=worker["times"] is not None),
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
