"""Settings of the training loop; imports no torch, so that run files can be checked without it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from weaksam.core.config import NotInFingerprint, Settings, StageConfig, changed

Precision = Literal["fp32", "bf16", "fp16"]


class TrainResources(Settings):
    """Where the loop runs. Does not change the result."""

    workers: int = Field(default=1, ge=1)
    """Processes that share each batch."""
    cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPUs reserved per worker, and its number of threads. Left out: the node's CPUs divided by the workers on it, or,
    with GPUs, by the workers that the node's GPUs hold; 1 on a cluster that grows and has no such node yet."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs reserved per worker; 0 trains on CPUs."""
    grow: bool = False
    """Whether the cluster starts nodes by itself: workers are requested even if they do not fit its present nodes."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples of a worker's forward pass; gradients accumulate over its share of the batch. Unset = the whole share."""
    max_failures: int = Field(default=3, ge=-1)
    """How often lost workers are replaced before the step fails; -1 = always."""


def cpus_of_worker(resources: TrainResources, nodes: Sequence[Mapping[str, float]]) -> float:
    """Returns the CPUs of each worker on a cluster of `nodes`, by their CPU and GPU counts; the same for all workers.

    Without `cpus_per_worker` it is the largest share of a node's CPUs with which all workers fit, a whole number from 1
    on. Future nodes are unknown: on an autoscaling cluster a worker without a GPU has at least 1. If the workers do not
    fit at all, it is 1.
    """
    if resources.cpus_per_worker is not None:
        return resources.cpus_per_worker
    if resources.gpus_per_worker:
        places = ((node.get("CPU", 0.0), _times(node.get("GPU", 0.0), resources.gpus_per_worker)) for node in nodes)
        shares = [cpus / count for cpus, count in places if cpus and count]
        return _reservable(min(shares, default=1.0))  # the smallest, so that a node's CPUs suffice for all its GPUs
    counts = [node.get("CPU", 0.0) for node in nodes]
    shares = {cpus / count for cpus in set(counts) for count in range(1, resources.workers + 1) if cpus}
    fitting = (
        candidate for candidate in shares if sum(_times(cpus, candidate) for cpus in counts) >= resources.workers
    )
    share = _reservable(max(fitting, default=1.0))
    return max(share, 1.0) if resources.grow else share


def _times(whole: float, part: float) -> int:
    """Returns how often `part` fits into `whole`; tolerates inexact sums of fractions."""
    return math.floor(whole / part + 1e-6)


def _reservable(cpus: float) -> float:
    """Rounds down to a value that Ray can reserve: whole numbers, or ten-thousandths of one CPU."""
    return float(math.floor(cpus)) if cpus >= 1 else max(math.floor(cpus * 1e4), 1) / 1e4


def count_fitting(resources: TrainResources, nodes: Sequence[Mapping[str, float]]) -> int:
    """Returns the number of workers that fit a cluster of `nodes`."""
    needed = {"CPU": cpus_of_worker(resources, nodes), "GPU": resources.gpus_per_worker}
    return sum(min(_times(node.get(kind, 0.0), part) for kind, part in needed.items() if part) for node in nodes)


@dataclass(frozen=True)
class Course:
    """The parameters of a training that determine its duration.

    Attributes:
        images: number of training images.
        steps, batch_size, seed: settings of the loop.
        workers: workers that share each batch.
        phases: steps at which the training of another part of the network starts, the first is 0.
        views: number of different views of an image, if a frozen network's outputs are cached; else None.
        held_out: images that are scored at each validation.
        validate_every, checkpoint_every: intervals in steps.
    """

    images: int
    steps: int
    batch_size: int
    seed: int = 0
    workers: int = 1
    phases: tuple[int, ...] = (0,)
    views: int | None = None
    held_out: int = 0
    validate_every: int | None = None
    checkpoint_every: int = 500


PILOT_ROUNDS = 3  # rounds of a pilot over its images: the cache is first used in the second round
PILOT_STEPS = 16  # minimum steps of a phase, for a rate
_PILOT_ROWS = 48  # rows of metrics, each of them one measurement


def pilot_steps(steps: int, images: int, batch_size: int, shortest_phase: float = 1.0) -> int:
    """Returns the steps of a pilot; `shortest_phase` is the shortest phase's share of the steps."""
    required = max(PILOT_STEPS, math.ceil(PILOT_ROUNDS * images / batch_size))
    return min(steps, math.ceil(required / shortest_phase))


class LoopSettings(StageConfig):
    """Settings of every training: training stages inherit these fields and set their own defaults."""

    batch_size: int = Field(ge=1)
    """Images of a step, over all workers together."""
    lr: float = Field(gt=0)
    """Learning rate after the warm-up, for this batch size."""
    final_lr: float = Field(default=0.0, ge=0, le=1)
    """Share of `lr` that the cosine ends with; 1 = no decay."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay; excluded weights are as published for the model."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the running mean of the weights that is saved instead of the last ones; 0 = off."""
    precision: Precision = "fp32"
    """Precision of autocast; fp16 needs a GPU and scales the loss; bf16 falls back to fp32 on CPUs that lack it. Losses
    and mining are always fp32."""
    seed: int = Field(default=0, ge=0)
    """Seed of initial weights, the order of images and their augmentation."""
    checkpoint_every: Annotated[int, NotInFingerprint()] = Field(default=500, ge=1)
    """Steps between checkpoints, the most that an interruption can cost."""
    resources: TrainResources = TrainResources()
    """Where it runs."""

    def course(self, images: int) -> Course:
        """Returns the course of a training with `images` images."""
        raise NotImplementedError

    def shortened(self, images: int) -> Self:
        """Returns these settings for a pilot with `images` images and a few rounds over them in each phase."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _fits_its_workers(self) -> Self:
        if self.batch_size < self.resources.workers:
            raise ValueError(
                f"batch_size {self.batch_size} leaves some of {self.resources.workers} workers without work"
            )
        if self.precision == "fp16" and not self.resources.gpus_per_worker:
            raise ValueError("precision fp16 needs gpus_per_worker > 0: use bf16 on processors")
        return self


class StepSettings(LoopSettings):
    """Settings of a training whose length is in steps."""

    steps: int = Field(ge=1)
    """Steps of the optimiser."""
    warmup: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises."""
    warmup_from: float = Field(default=0.0, ge=0, le=1)
    """Share of `lr` that the warm-up starts from."""
    milestones: list[int] | None = None
    """Steps after which the learning rate is divided by 10, instead of a cosine to `final_lr`."""
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient; unset = not clipped."""
    log_every: Annotated[int, NotInFingerprint()] = Field(default=50, ge=1)
    """Steps between rows of metrics."""

    def shortened(self, images: int) -> Self:
        return self.scaled_to(pilot_steps(self.steps, images, self.batch_size))

    def scaled_to(self, steps: int) -> Self:
        """Returns these settings for a training of `steps` steps, with scaled warm-up and milestones."""
        share = steps / self.steps
        return changed(
            self,
            steps=steps,
            warmup=round(share * self.warmup),
            milestones=self.milestones and [round(share * milestone) for milestone in self.milestones],
            checkpoint_every=max(1, steps - 1),  # a single late checkpoint: writing it slows down the next steps
            log_every=max(1, steps // _PILOT_ROWS),
        )


class TrainSettings(StepSettings):
    """Settings of the training loop."""

    validate_every: Annotated[int | None, NotInFingerprint()] = Field(default=None, ge=1)
    """Steps between validations, a multiple of `log_every`; also validates at the end. Unset = never."""

    @model_validator(mode="after")
    def _validates_where_it_logs(self) -> TrainSettings:
        if self.validate_every and self.validate_every % self.log_every:
            raise ValueError(f"validate_every {self.validate_every} is no multiple of log_every {self.log_every}")
        return self

    def validates_at(self, step: int) -> bool:
        """Returns whether held-out data is scored after `step`: every `validate_every` steps and at the end."""
        return self.validate_every is not None and (step % self.validate_every == 0 or step == self.steps)
