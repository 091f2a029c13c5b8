"""How long a training takes, from the rows of metrics of a short one: `Course` and rows in, seconds out.

The time of a step is a sum of parts, each a number that the settings decide times a cost that the pilot tells:
images of the step (in each phase a cost of its own); images, and views of images, that a frozen network sees for the
first time, where it remembers what it saw; held-out images that are scored; checkpoints that are written. The costs
are the non-negative ones that explain the pilot's rows best (least squares).
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
    """An estimate and the ends of its interval."""

    value: float
    low: float
    high: float


def parts_of_steps(course: Course) -> np.ndarray:
    """What each step consists of, as numbers that are multiplied by costs.

    Returns:
        (steps, K) float64: for each phase images, images not seen before and views not seen before in it; then
        held-out images scored after the step, and checkpoints written after it.
    """
    steps = np.arange(course.steps)
    phase = np.searchsorted(course.phases, steps, side="right") - 1
    columns = []
    for number, first in enumerate(course.phases):
        here = phase == number
        last = int(here.nonzero()[0][-1]) + 1 if here.any() else first
        images, views = np.zeros((2, course.steps))
        if course.views is not None:
            images[first:last], views[first:last] = _first_sights(course, first, last)
        columns += [here * course.batch_size, images, views]
    every, ends = course.validate_every, steps + 1
    validated = np.zeros(course.steps) if every is None else (ends % every == 0) | (ends == course.steps)
    checkpoints = (ends % course.checkpoint_every == 0) & (ends < course.steps)
    return np.stack([*columns, validated * course.held_out, checkpoints], 1).astype(float)


def _first_sights(course: Course, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of images and of views in the steps from `first` to `last` that none of these showed before.

    Every image comes once before any comes again; how it is shown is drawn. Each worker remembers for itself.
    """
    rng = np.random.default_rng(course.seed)
    positions = np.arange(first * course.batch_size, last * course.batch_size)
    rounds, offsets = np.divmod(positions, course.images)
    orders = {number: rng.permutation(course.images) for number in np.unique(rounds)}
    images = np.array([orders[number][offset] for number, offset in zip(rounds, offsets, strict=True)], np.int64)
    images += course.images * ((positions % course.batch_size) * course.workers // course.batch_size)
    views = images * (course.views or 1) + rng.integers(course.views or 1, size=len(images))
    return tuple(_firsts(seen).reshape(-1, course.batch_size).sum(1) for seen in (images, views))  # type: ignore[return-value]


def _firsts(values: np.ndarray) -> np.ndarray:
    """1 where a value occurs for the first time, else 0."""
    found = np.zeros(len(values))
    found[np.unique(values, return_index=True)[1]] = 1
    return found


def project_training(
    pilot: Course, rows: Sequence[Mapping[str, float]], seconds: float, whole: Course, *, seed: int = 0
) -> Seconds:
    """How long `whole` takes.

    The interval is that of a bootstrap over how far the rows are from what explains them.

    Args:
        pilot: what was done.
        rows: its metrics: `step`, `seconds` since the row before, `at` seconds since the loop began.
        seconds: that all of it took, with its start and its end.
        whole: what is to be done.
        seed: of the bootstrap.
    """
    ends = np.array([int(row["step"]) for row in rows])
    took = np.array([row["seconds"] for row in rows])
    parts = parts_of_steps(pilot)
    # scored before the row is written, but a checkpoint is written after it
    parts[:, -1] = np.concatenate([[0.0], parts[:-1, -1]])
    sums = np.stack([piece.sum(0) for piece in np.split(parts, ends[:-1])])
    used = slice(1, None) if len(rows) > 1 else slice(None)  # the first holds what happens once
    wanted = parts_of_steps(whole).sum(0)
    costs = fit_costs(sums[used], took[used])
    start = seconds - rows[-1]["at"] + max(took[0] - float(sums[0] @ costs), 0.0)
    explained = sums[used] @ costs
    left = took[used] - explained
    freedom = max(len(left) - int((costs > 0).sum()), 1)
    left = left * np.sqrt(len(left) / freedom)  # what was fitted lies closer than what was not
    rng = np.random.default_rng(seed)
    drawn = [wanted @ fit_costs(sums[used], explained + rng.choice(left, len(left))) for _ in range(_DRAWS)]
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    value = float(wanted @ costs)
    return Seconds(start + value, start + min(float(low), value), start + max(float(high), value))


def fit_costs(sums: np.ndarray, took: np.ndarray) -> np.ndarray:
    """(K,) costs of at least 0 that explain `took` (N,) best; 0 of what never occurs in `sums` (N, K)."""
    scale = np.maximum(sums.max(0), 1e-9)
    costs, _ = nnls(sums / scale, took)
    return costs / scale
