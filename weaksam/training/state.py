"""The state of the training loop: model, optimiser and running mean.

Does not depend on Ray, unlike the loop around it in `loop.py`.
"""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from weaksam.errors import TaskError, WeakSamError
from weaksam.ops.precision import computes_bf16
from weaksam.training.checkpoints import STATE, load_state
from weaksam.training.settings import Precision, TrainSettings
from weaksam.training.watch import Watch, check_finite, diverged

Model = TypeVar("Model", bound=nn.Module)

_OF_DEVICES = (torch.OutOfMemoryError, torch.AcceleratorError, torch.distributed.DistError)
_LARGEST = 1e6  # maximum weight of a network with usable outputs
_CAUSE = 160  # characters of an error's text in a message
_LEAST_SCALE = 1.0  # of the fp16 loss: below it, the scale does not explain a gradient that is not finite


class TrainTask(Protocol[Model]):
    """A model, its data and its loss. Picklable; every method is called on the workers.

    Every trainable parameter must take part in every loss: freeze the others.
    """

    @property
    def num_samples(self) -> int:
        """Number of training samples."""
        ...

    def build_model(self) -> Model:
        """Returns the model on the CPU, in train mode; equal on all workers up to random values (rank 0's are used)."""
        ...

    def build_optimizer(self, model: Model, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Returns the optimiser; the schedule multiplies each group's initial `lr`.

        A group with a `window` (first, last) is trained only in these steps, with its own schedule over them; last
        None = to the end.
        """
        ...

    def load_batch(self, indices: np.ndarray, seeds: np.ndarray, pool: Executor) -> dict[str, Tensor]:
        """Returns CPU tensors of the samples `indices` (B,); `seeds` (B, 3) int64 seed each sample's augmentation.

        A task whose network draws random numbers adds `seed` (B,), see `models.noise.noise_seeds`.

        Samples are read and decoded by the threads of `pool`. Where some may be unreadable, `left_out` (B,) uint8 holds
        the reasons (`data.images.left_out_codes`); unreadable samples have weight 0 in the loss.
        """
        ...

    def loss(self, model: Model, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss *summed* over the samples of `batch`, and metrics summed likewise (no gradient).

        It must not use torch's default generators, whose numbers would depend on the workers.

        `batch` is the result of `load_batch` with `step` () int64, the step of the training, from 0.
        """
        ...

    def name_of(self, index: int) -> str:
        """Returns the name of a sample for messages: its URI."""
        ...

    def validate(self, model: Model, pool: Executor) -> dict[str, float]:
        """Returns scores on held-out data, on one worker, in eval mode without gradients; empty without such data.

        Samples are read and decoded by the threads of `pool`.
        """
        ...


def draw_batch(seed: int, step: int, *, batch_size: int, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the global batch of a step: rounds over all samples, each in a new order.

    Returns:
        indices: (batch_size,) int64, samples.
        seeds: (batch_size, 3) int64, (seed, round, index), the seeds of a sample's random numbers.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    rounds, offsets = np.divmod(positions, num_samples)
    indices = np.empty(batch_size, np.int64)
    for number in np.unique(rounds):
        in_round = rounds == number
        indices[in_round] = np.random.default_rng([seed, int(number)]).permutation(num_samples)[offsets[in_round]]
    return indices, np.stack([np.full_like(indices, seed), rounds, indices], 1)


def lr_factor(settings: TrainSettings, step: int, window: tuple[int, int | None] = (0, None)) -> float:
    """Returns the factor of a step's learning rate: linear warm-up, then half a cosine or divisions by 10.

    The schedule covers the `window` (first, last) of steps and is 0 outside; last None = to the end.
    """
    first, last = window
    if step < first or (last is not None and step >= last):
        return 0.0
    last = settings.steps if last is None else last
    step -= first
    if step < settings.warmup:
        return settings.warmup_from + (1 - settings.warmup_from) * (step + 1) / settings.warmup
    if settings.milestones is not None:
        return 0.1 ** sum(step >= milestone for milestone in settings.milestones)
    done = (step - settings.warmup) / max(last - first - settings.warmup, 1)
    return settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def usable_precision(precision: Precision, device: torch.device) -> Precision:
    """Returns `precision`, or fp32 where the device would emulate bf16."""
    return "fp32" if precision == "bf16" and not computes_bf16(device) else precision


@contextmanager
def task_code(doing: str) -> Iterator[None]:
    """Converts exceptions of a task's own code to TaskError, which is not retried.

    Except WeakSamErrors, which name the fix, and errors of memory, storage and devices, which may be temporary.
    """
    try:
        yield
    except (WeakSamError, OSError, MemoryError, *_OF_DEVICES):
        raise
    except Exception as error:
        raise TaskError(f"{doing}: {type(error).__name__}: {error}") from error


class _Loss(nn.Module):
    """A task's loss as `forward`, so that DDP prepares its reducer for any parts of the model that the task calls."""

    def __init__(self, task: TrainTask[Any], model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with task_code("loss"):
            return self.task.loss(self.model, batch)


class TrainState:
    """The contents of a checkpoint, which are model, optimiser, scaler, running mean and step, and their update."""

    def __init__(self, task: TrainTask[Any], settings: TrainSettings, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.device, self.step = settings, device, 0
        with task_code("build"):
            self.model = task.build_model().to(device)
            self.optimizer = task.build_optimizer(self.model, lr=settings.lr, weight_decay=settings.weight_decay)
        self.watch, self.skipped, self._has_stepped = Watch(settings, device), 0, False
        self.optimizer.register_step_post_hook(self._note_step)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.loss: nn.Module = _Loss(task, self.model)
        if settings.resources.workers > 1:
            self.loss = DistributedDataParallel(self.loss, device_ids=[device] if device.type == "cuda" else None)
        self.mean = {k: v.detach().clone() for k, v in self.model.state_dict().items()} if settings.ema else None
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        self._changing = [key for key in self.mean or {} if key not in frozen]

    def take_step(self, batches: Iterator[dict[str, Tensor]], count: int) -> dict[str, Tensor]:
        """Takes one optimiser step over this worker's `count` micro-batches; returns sums of metrics over its samples.

        Raises:
            DivergedError: the loss or the gradient of this step or one before it is not finite.
        """
        settings, sums = self.settings, {}
        # DDP averages over workers; the gradient must be one mean over the global batch
        scale = settings.resources.workers / settings.batch_size
        for i in range(count):
            batch = {key: value.to(self.device, non_blocking=True) for key, value in next(batches).items()}
            batch["step"] = torch.tensor(self.step)
            waiting = i + 1 < count and settings.resources.workers > 1
            with cast(DistributedDataParallel, self.loss).no_sync() if waiting else nullcontext(), self._autocast():
                loss, metrics = self._take_loss(batch)
                self.scaler.scale(loss * scale).backward()
            for key, value in {"loss": loss, **metrics}.items():
                sums[key] = sums.get(key, 0) + value.detach().float()
        norm = self._update()
        self.watch.note(self.step - 1, sums["loss"], norm)
        return sums

    def _take_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss; raises DivergedError if it cannot be computed because the weights have diverged."""
        try:
            return self.loss(batch)
        except TaskError as error:
            self.watch.look(wait=True)
            weights = [p.detach().abs().max().float() for p in self.model.parameters() if p.numel()]
            largest = torch.stack(weights).max().item()
            if largest <= _LARGEST:  # NaN is not
                raise
            cause = textwrap.shorten(str(error), _CAUSE, placeholder=" ...")  # torchvision's holds whole tensors
            what = f"there is no loss ({cause}) with weights of {largest:g}"
            raise diverged(self.settings, f"step {self.step + 1} of {self.settings.steps}: {what}") from error

    def _autocast(self) -> torch.autocast:
        precision = usable_precision(self.settings.precision, self.device)
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=precision != "fp32")

    def _note_step(self, *_: Any) -> None:
        self._has_stepped = True

    def _update(self) -> Tensor:
        """Updates the weights; returns the norm of the gradient, 0 with fp16, whose scaler checks the gradient."""
        settings, norm = self.settings, torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(settings, self.step, group.get("window", (0, None)))
        if settings.clip:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        elif not self.scaler.is_enabled():
            norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if self.scaler.is_enabled():  # the scaler skips steps whose scaled gradient overflows, to find its scale
            norm = torch.zeros((), device=self.device)
        self._has_stepped = False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and not self._has_stepped:
            self._note_skipped()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.mean is not None:
            keep = min(settings.ema, (1 + self.step) / (10 + self.step))  # a young mean forgets its random start
            now = self.model.state_dict()
            for key in self._changing:
                target, value = self.mean[key], now[key]
                target.lerp_(value, 1 - keep) if target.is_floating_point() else target.copy_(value)
        return norm

    def _note_skipped(self) -> None:
        """Counts a step that fp16 skipped; raises DivergedError when the loss scale cannot be the reason."""
        self.skipped += 1
        if self.scaler.get_scale() < _LEAST_SCALE:
            what = f"step {self.step + 1} of {self.settings.steps}: the gradient, whatever the loss is scaled by"
            raise diverged(self.settings, what)

    def check(self) -> None:
        """Raises DivergedError unless all contents of a checkpoint, and every step so far, are finite."""
        self.watch.look(wait=True)
        check_finite(self.settings, self.step, self._state())

    def weights(self) -> dict[str, Tensor]:
        """Returns the resulting weights: the running mean if there is one."""
        return {key: value.contiguous() for key, value in (self.mean or self.model.state_dict()).items()}

    def validate(self, task: TrainTask[Any], pool: Executor) -> dict[str, float]:
        """Returns the task's scores of the present `weights`."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.weights())
        with torch.no_grad(), task_code("validate"):
            return task.validate(model.eval(), pool)

    def _state(self) -> dict[str, Any]:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        return state | {"scaler": self.scaler.state_dict(), "mean": self.mean, "skipped": self.skipped}

    def save(self, folder: str) -> None:
        """Writes the checkpoint file.

        Raises:
            DivergedError: it would hold values that are not finite.
        """
        self.check()
        torch.save(self._state(), Path(folder) / STATE)

    def restore(self, folder: str) -> None:
        """Restores a checkpoint file.

        Raises:
            BrokenCheckpointError: the file is missing, cut or altered.
        """
        state = load_state(Path(folder) / STATE, self.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.mean, self.skipped = state["step"], state["mean"], state.get("skipped", 0)
