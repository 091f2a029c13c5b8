"""Detects a training that is no longer finite, before its weights are written. Does not depend on Ray.

A NaN loss raises no error by itself: the optimiser makes every weight NaN, and the result is an "ok" table without
boxes. So each step records its loss and gradient norm on the device, and everything is checked before it is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weaksam.errors import DivergedError
from weaksam.training.settings import TrainSettings


class Watch:
    """Records the first step whose loss or gradient was not finite.

    It does not wait for the device: the record is copied asynchronously and read after it has arrived. A step or two
    later is early enough, since `look(wait=True)` runs before anything is written. On a CPU it is read at once.
    """

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        self._settings, self._on_gpu = settings, device.type == "cuda"
        self._first = torch.tensor([-1.0, 0.0, 0.0], device=device)  # step, loss, norm of the gradient
        self._copy = torch.empty(3, pin_memory=True) if self._on_gpu else self._first
        self._copied: torch.cuda.Event | None = None

    def note(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Records a step, from 0: its loss and the norm of its gradient, () each.

        Raises:
            DivergedError: this step, or an earlier step whose record has arrived, was not finite.
        """
        loss, norm = loss.detach().float(), norm.detach().float()
        is_first = ~(loss.isfinite() & norm.isfinite()) & (self._first[0] < 0)
        self._first = torch.where(is_first, torch.stack([loss.new_full((), float(step)), loss, norm]), self._first)
        if not self._on_gpu:
            self.look(wait=True)
        elif self._copied is None or self._copied.query():
            self.look(wait=False)
            self._copy.copy_(self._first, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def look(self, *, wait: bool) -> None:
        """Raises DivergedError when a step was not finite; `wait` checks all steps so far, not only copied records."""
        if not wait and self._copied is None:
            return
        step, loss, norm = (self._first if wait else self._copy).tolist()
        if step >= 0:
            has_loss = math.isfinite(loss)
            what = (
                f"the gradient has the norm {norm:g} at a loss of {loss:.4g}" if has_loss else f"the loss is {loss:g}"
            )
            raise diverged(self._settings, f"step {int(step) + 1} of {self._settings.steps}: {what}")


def diverged(settings: TrainSettings, what: str) -> DivergedError:
    """Returns the error of a training that is no longer finite, with the settings to change."""
    clip = "set clip, e.g. 1.0" if settings.clip is None else f"lower clip (now {settings.clip:g})"
    precision = "" if settings.precision == "fp32" else f", or precision=fp32 (now {settings.precision})"
    return DivergedError(
        f"{what}: the training is no longer finite, stops and hands nothing on: lower lr (now {settings.lr:g}), or "
        f"{clip}{precision}"
    )


def check_finite(settings: TrainSettings, step: int, state: Mapping[str, Any]) -> None:
    """Raises DivergedError when any tensor of the state to be written after `step` steps is not finite."""
    named = [(name, value) for name, value in _tensors(state, "") if value.is_floating_point() and value.numel()]
    flags = [value.isfinite().all() for _, value in named]  # all are computed before the first is read
    wrong = [name for (name, _), flag in zip(named, flags, strict=True) if not flag]
    if wrong:
        raise diverged(settings, f"step {step} of {settings.steps}: {wrong[0]}, one of {len(wrong)} tensors of weights")


def _tensors(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of nested dicts and lists, with a name."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(state, Sequence) and not isinstance(state, str):
        for index, value in enumerate(state):
            yield from _tensors(value, f"{name}.{index}")
