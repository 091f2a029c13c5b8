"""The training loop on Ray Train: the same result for any number of workers, and resume after SIGKILL.

In: a `TrainTask` (model, data and loss, independent of the cluster) and `TrainSettings`. Out, below the folder:
`checkpoint/` (Ray Train's checkpoints while it runs), `checkpoint/model.safetensors` (written once, at the end),
`training_log.jsonl` (one row every `log_every` steps) and, if there are any, `warnings.jsonl` (the first
warnings of one worker) and `left_out.jsonl` (samples that could not be read).

The batch of a step is a pure function of (seed, step): it is split over the workers and the gradient is the mean over
the global batch. All random numbers are per sample, from generators of (seed, step, sample): augmentation (`load_batch`
of the task) and noise inside the network (`models.noise`). So neither the number of workers, nor micro-batches, nor an
interruption changes the result, except for the order of floating-point sums. Only RT-DETRv2 depends on the
micro-batch, see `RtDetrV2`.

A loss, gradient or weight that is not finite ends the training before it is written (`training.watch`).
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray import cloudpickle
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from safetensors.torch import save
from torch import Tensor

from weaksam.core import step_files, storage
from weaksam.errors import ConfigError, StageError
from weaksam.execution.nodes import alive_nodes
from weaksam.execution.turns import turn
from weaksam.training.checkpoints import BrokenCheckpointError, check_same_step, drop_broken_list, list_checkpoints
from weaksam.training.failures import TrainingPolicy, explain
from weaksam.training.log import TrainingLog, WarningsToFile, follow
from weaksam.training.reading import LeftOut
from weaksam.training.settings import TrainResources, TrainSettings, count_fitting, cpus_of_worker
from weaksam.training.state import TrainState, TrainTask, draw_batch, task_code
from weaksam.training.watch import diverged

__all__ = ["TrainResources", "TrainSettings", "TrainTask", "train"]

log = logging.getLogger(__name__)

_PREFETCH = 2  # micro-batches prepared ahead of the one in use
# Minimum number of threads that read and decode: a read from an object store takes tens of milliseconds without
# computing.
_LEAST_LOADING = 4


class _Trainer(TorchTrainer):
    """Retries only temporary failures (`TrainingPolicy`), without two of Ray Train's callbacks.

    The placement group cleaner may end a healthy run: it queries the state API of the cluster started last on the
    machine (or of none, without a dashboard) for this run's controller, and removes the run's workers if that cluster
    does not know it. A killed driver's workers end with its job anyway. The callback for Ray Data starts a process that
    hands out datasets, and trainings here have none: tasks read and decode for themselves.
    """

    def _create_default_callbacks(self) -> list:
        unwanted = ("PlacementGroupCleanerCallback", "DatasetsCallback")
        return [item for item in super()._create_default_callbacks() if type(item).__name__ not in unwanted]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        options["failure_policy"] = TrainingPolicy(self.run_config.failure_config or FailureConfig())
        return super()._initialize_and_run_controller(**options)


def train(task: TrainTask[Any], settings: TrainSettings, folder: str) -> str:
    """Trains to the end, resuming an earlier call on `folder`. Ray must be initialised.

    Returns:
        URI of `<folder>/checkpoint/model.safetensors`.

    Raises:
        DivergedError: loss, gradient or weights are not finite.
        StageError: workers failed more often than `max_failures`, or the dataset can no longer be read.
        FailedRowsError: more samples are unreadable than allowed.
        TrainingFailedError: the code of the task raised, a bug.
    """
    folder = storage.absolute(folder)
    final = step_files.weights_uri(folder)
    if storage.exists(final):
        return final
    nodes = alive_nodes()
    check_workers(settings.resources, nodes)
    drop_broken_list(folder, version=ray.__version__)
    trainer = _make_trainer(task, settings, folder, cpus=cpus_of_worker(settings.resources, nodes))
    try:
        with turn(folder.rsplit("/", 1)[-1]), follow(folder, settings):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        if (cause := explain(folder, error)) is error:
            raise
        raise cause from error
    if not storage.exists(final):
        raise StageError(f"{folder}: training ended without {final}: run the same command again")
    return final


def check_workers(resources: TrainResources, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raises ConfigError when the workers do not fit a cluster of `nodes`: Ray Train would wait for ever."""
    if resources.grow:
        return
    cpus, fits = cpus_of_worker(resources, nodes), count_fitting(resources, nodes)
    if fits < resources.workers:
        raise ConfigError(
            f"resources: {resources.workers} worker(s) of {cpus:g} CPU and {resources.gpus_per_worker:g} GPU do not "
            f"fit, the cluster has room for {fits}: lower workers, cpus_per_worker or gpus_per_worker, or set grow"
        )


def _make_trainer(task: TrainTask[Any], settings: TrainSettings, folder: str, *, cpus: float) -> _Trainer:
    files, path = storage.filesystem(folder)
    files.create_dir(path, recursive=True)
    resources = settings.resources
    per_worker = {"CPU": cpus}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    # as bytes: the controller unpickles everything else, and need not import the packages of networks
    packed = cloudpickle.dumps(task)  # pyright: ignore[reportPrivateImportUsage]
    config = {"task": packed, "settings": settings, "folder": folder, "cpus": cpus}
    return _Trainer(
        _train_worker,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.workers, use_gpu=resources.gpus_per_worker > 0, resources_per_worker=per_worker
        ),
        run_config=RunConfig(
            name="checkpoint",  # a fixed name and place: the same call finds its own checkpoints again
            storage_path=path,
            storage_filesystem=files,
            failure_config=FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )


def _mean(sums: dict[str, Tensor], *, count: int) -> dict[str, float]:
    """Converts sums of this worker's samples to means over all workers' `count` samples."""
    values = torch.stack([torch.as_tensor(value, dtype=torch.float32) for value in sums.values()])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return {key: round(value, 6) for key, value in zip(sums, (values / count).tolist(), strict=True)}


def _report(train_state: TrainState, *, is_writer: bool) -> None:
    """Reports a checkpoint to Ray Train; every worker calls it, only the writer passes the file."""
    if not is_writer:
        ray.train.report({"step": train_state.step})
        return
    with tempfile.TemporaryDirectory() as folder:
        train_state.save(folder)
        ray.train.report({"step": train_state.step}, checkpoint=Checkpoint.from_directory(folder))


def _restore(train_state: TrainState, folder: str, latest: Checkpoint | None) -> None:
    """Restores the `latest` checkpoint, else the newest intact checkpoint; without any, training starts from step 0."""
    checkpoints = [Checkpoint(path, files) for files, path in map(storage.filesystem, list_checkpoints(folder))]
    others = [item for item in checkpoints if latest is None or item.path != latest.path]
    for checkpoint in [latest, *others] if latest else others:
        try:
            with checkpoint.as_directory() as local:
                train_state.restore(local)
        except (BrokenCheckpointError, FileNotFoundError) as error:
            log.warning("warning: %s: not whole (%s): an older checkpoint is taken, or none", checkpoint.path, error)
            continue
        log.info("goes on from step %d (%s)", train_state.step, checkpoint.path)
        return


def _check_means(train_state: TrainState, means: Mapping[str, float]) -> None:
    """Raises DivergedError on all workers when a step of any worker since the last row was not finite."""
    train_state.watch.look(wait=True)
    if not math.isfinite(means["loss"]):
        settings = train_state.settings
        raise diverged(settings, f"step {train_state.step} of {settings.steps}: the loss of another worker")


def share_of(settings: TrainSettings, rank: int) -> list[slice]:
    """Returns the slices of a global batch that are this worker's micro-batches."""
    ranks = settings.resources.workers
    first, last = (settings.batch_size * r // ranks for r in (rank, rank + 1))
    size = settings.resources.micro_batch_size or last - first
    return [slice(i, min(i + size, last)) for i in range(first, last, size)]


def _load_ahead(
    task: TrainTask[Any],
    settings: TrainSettings,
    first: int,
    share: list[slice],
    threads: Executor,
    left_out: LeftOut,
) -> Iterator[dict[str, Tensor]]:
    """Yields this worker's micro-batches from step `first` on, prepared by a thread in the background.

    Raises:
        StageError, FailedRowsError: too many samples of those up to this micro-batch cannot be read.
    """

    def load(step: int, part: slice) -> tuple[dict[str, Tensor], tuple[int, np.ndarray, np.ndarray]]:
        indices, seeds = draw_batch(settings.seed, step, batch_size=settings.batch_size, num_samples=task.num_samples)
        with task_code("load_batch"):
            batch = task.load_batch(indices[part], seeds[part], threads)
        codes = batch.pop("left_out", torch.zeros(len(indices[part]))).numpy()
        if settings.resources.gpus_per_worker:
            batch = {key: value.pin_memory() for key, value in batch.items()}
        return batch, (step, indices[part], codes)

    parts = ((step, part) for step in range(first, settings.steps) for part in share)
    with ThreadPoolExecutor(1) as pool:
        queue = [pool.submit(load, *item) for item in islice(parts, _PREFETCH)]
        while queue:
            ready, read = queue.pop(0).result()
            queue += [pool.submit(load, *item) for item in islice(parts, 1)]
            left_out.add(*read)
            yield ready


def _make_threads(cpus: float) -> ThreadPoolExecutor:
    """Creates the reading and decoding threads and sets torch's number of threads, both to the worker's CPUs.

    A cluster may count more CPUs than its machine has: more compute threads would only wait for each other.
    """
    processors = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, min(int(cpus), processors)))
    return ThreadPoolExecutor(max(_LEAST_LOADING, int(cpus)), thread_name_prefix="samples")


def _train_worker(config: dict) -> None:
    """Runs the loop of one worker."""
    task, settings, folder = cloudpickle.loads(config["task"]), config["settings"], config["folder"]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    threads = _make_threads(config["cpus"])
    context = ray.train.get_context()
    if context.get_world_rank() == 0:  # one is enough: all workers do the same
        logging.getLogger("weaksam").addHandler(WarningsToFile(folder))
    train_state = TrainState(task, settings, get_device())
    _restore(train_state, folder, ray.train.get_checkpoint())
    check_same_step(train_state.step)
    share = share_of(settings, context.get_world_rank())
    left_out = LeftOut(
        folder,
        num_samples=task.num_samples,
        max_failed=settings.max_failed,
        in_batch=sum(part.stop - part.start for part in share),
        name_of=task.name_of,
        step=train_state.step,
    )
    batches = _load_ahead(task, settings, train_state.step, share, threads, left_out)
    training_log = TrainingLog(folder, settings, train_state.step) if context.get_world_rank() == 0 else None
    sums, since = {}, train_state.step
    while train_state.step < settings.steps:
        for key, value in train_state.take_step(batches, len(share)).items():
            sums[key] = sums.get(key, 0) + value
        if train_state.step % settings.log_every == 0 or train_state.step == settings.steps:
            means = _mean(sums, count=(train_state.step - since) * settings.batch_size)
            _check_means(train_state, means)
            left_out.share(is_writer=training_log is not None)
            means |= {"left_out": len(left_out)} if len(left_out) else {}
            means |= {"skipped": train_state.skipped} if train_state.skipped else {}
            if training_log:
                if settings.validates_at(train_state.step):
                    means |= train_state.validate(task, threads)
                training_log.write(
                    train_state.step, means, lr=max(group["lr"] for group in train_state.optimizer.param_groups)
                )
            sums, since = {}, train_state.step
        if train_state.step % settings.checkpoint_every == 0 and train_state.step < settings.steps:
            left_out.share(is_writer=training_log is not None)
            _report(train_state, is_writer=training_log is not None)
    train_state.check()
    if training_log:
        storage.write_bytes(step_files.weights_uri(folder), save(train_state.weights()))
    ray.train.report({"step": train_state.step})
