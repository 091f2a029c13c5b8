"""Projects the time of a training from the log of a short training: `Course` and rows in, seconds out.

The time of a step is a sum of parts. Each part is a number, known from the settings, times a cost, fitted to the
pilot: images of the step (with a separate cost in each phase); images, and views of images, that a frozen network
with a cache sees for the first time; held-out images that are scored; checkpoints that are written. The costs are a
non-negative least-squares fit to the pilot's rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from weaksam.training.settings import Course

CONFIDENCE = 0.9
_DRAWS = 200


@dataclass(frozen=True)
class Seconds:
    """An estimate in seconds and the ends of its interval."""

    value: float
    low: float
    high: float


def parts_of_steps(course: Course) -> np.ndarray:
    """Returns the numbers of each step that are multiplied by costs.

    Returns:
        (steps, K) float64: for each phase images, images new in that phase and views new in that phase; then
        held-out images scored after the step, and checkpoints written after it.
    """
    steps = np.arange(course.steps)
    phase = np.searchsorted(course.phases, steps, side="right") - 1
    columns = []
    for number, first in enumerate(course.phases):
        in_phase = phase == number
        last = int(in_phase.nonzero()[0][-1]) + 1 if in_phase.any() else first
        images, views = np.zeros((2, course.steps))
        if course.views is not None:
            images[first:last], views[first:last] = _first_sights(course, first, last)
        columns += [in_phase * course.batch_size, images, views]
    every, ends = course.validate_every, steps + 1
    validated = np.zeros(course.steps) if every is None else (ends % every == 0) | (ends == course.steps)
    checkpoints = (ends % course.checkpoint_every == 0) & (ends < course.steps)
    return np.stack([*columns, validated * course.held_out, checkpoints], 1).astype(float)


def _first_sights(course: Course, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of images and of views that occur for the first time, for each step from `first` to `last`.

    Every image comes once before any image repeats; its view is drawn at random. Each worker has its own cache.
    """
    rng = np.random.default_rng(course.seed)
    positions = np.arange(first * course.batch_size, last * course.batch_size)
    rounds, offsets = np.divmod(positions, course.images)
    orders = {number: rng.permutation(course.images) for number in np.unique(rounds)}
    images = np.array([orders[number][offset] for number, offset in zip(rounds, offsets, strict=True)], np.int64)
    images += course.images * ((positions % course.batch_size) * course.workers // course.batch_size)
    views = images * (course.views or 1) + rng.integers(course.views or 1, size=len(images))
    return tuple(_firsts(ids).reshape(-1, course.batch_size).sum(1) for ids in (images, views))  # type: ignore[return-value]


def _firsts(values: np.ndarray) -> np.ndarray:
    """Returns 1 where a value occurs for the first time, else 0."""
    is_first = np.zeros(len(values))
    is_first[np.unique(values, return_index=True)[1]] = 1
    return is_first


def project_training(
    pilot: Course, rows: Sequence[Mapping[str, float]], seconds: float, whole: Course, *, seed: int = 0
) -> Seconds:
    """Returns the time that `whole` takes.

    The interval comes from a bootstrap over the residuals of the fit.

    Args:
        pilot: the course of the short training.
        rows: rows of its log: `step`, `seconds` since the row before, `at` seconds since the loop began.
        seconds: time of the whole pilot step, with its start and its end.
        whole: the course of the training to project.
        seed: seed of the bootstrap.
    """
    ends = np.array([int(row["step"]) for row in rows])
    took = np.array([row["seconds"] for row in rows])
    parts = parts_of_steps(pilot)
    # images are scored before the row is written, but a checkpoint is written after it
    parts[:, -1] = np.concatenate([[0.0], parts[:-1, -1]])
    sums = np.stack([piece.sum(0) for piece in np.split(parts, ends[:-1])])
    used = slice(1, None) if len(rows) > 1 else slice(None)  # the first row includes one-time work
    total_parts = parts_of_steps(whole).sum(0)
    costs = fit_costs(sums[used], took[used])
    start = seconds - rows[-1]["at"] + max(took[0] - float(sums[0] @ costs), 0.0)
    explained = sums[used] @ costs
    left = took[used] - explained
    freedom = max(len(left) - int((costs > 0).sum()), 1)
    left = left * np.sqrt(len(left) / freedom)  # residuals of fitted rows are too small
    rng = np.random.default_rng(seed)
    drawn = [total_parts @ fit_costs(sums[used], explained + rng.choice(left, len(left))) for _ in range(_DRAWS)]
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    value = float(total_parts @ costs)
    return Seconds(start + value, start + min(float(low), value), start + max(float(high), value))


def fit_costs(sums: np.ndarray, took: np.ndarray) -> np.ndarray:
    """Returns (K,) non-negative least-squares costs of `took` (N,); 0 for parts that never occur in `sums` (N, K)."""
    scale = np.maximum(sums.max(0), 1e-9)
    costs, _ = nnls(sums / scale, took)
    return costs / scale
