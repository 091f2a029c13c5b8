"""Projects the time of a step that maps images from a pilot's times, and finds its bottleneck and a better pool.

All actors of a pool do the same work. So the time of a step is its start and end, which the pilot has too, plus its
rows divided by the rate of the pilot's actors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from weaksam.execution.pools import PoolResources, fit_pool
from weaksam.execution.times import ActorTimes, Batch
from weaksam.plan.training_projection import CONFIDENCE, Seconds

FLOOR = 0.5  # fixed overhead, in seconds, of a step without a pool: imports, files that are always written
_NORMAL = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)  # half-width, in standard errors, of an interval of CONFIDENCE
_ENOUGH = 4  # batches needed to measure a rate
_MOSTLY = 0.8  # busy share from which on actors count as the bottleneck
_PLENTY = 10**9  # number of fetch tasks that never limits a pool
_AS_GOOD = 0.97  # share of the best rate at which a smaller pool counts as equally fast


@dataclass(frozen=True)
class Pace:
    """Speed of a pilot's pool, for each actor and image.

    Attributes:
        busy, waited: seconds for which an actor works on an image and waits for it.
        error: standard error of their sum.
        fetch: seconds that a fetch task takes for an image.
        actors: number of actors that processed images.
    """

    busy: float
    waited: float
    error: float
    fetch: float
    actors: int

    @property
    def busy_share(self) -> float:
        """Share of the time in which actors are busy."""
        return self.busy / max(self.busy + self.waited, 1e-9)


def measure_pace(actors: Sequence[ActorTimes]) -> Pace:
    """Returns the means over images of the times that a pilot's actors recorded.

    Leaves out the first batch of each actor, which waits for no other batch and may compile. Also leaves out batches
    that began before all actors were ready: until then some actors load, so the load of the machine differs. If too
    few batches remain, uses the excluded batches too.

    Raises:
        ValueError: the actors recorded no batch.
    """
    working = [actor for actor in actors if actor.batches]
    if not working:
        raise ValueError("no actor wrote down a batch")
    all_ready = max(actor.ready for actor in working)
    later = [batch for actor in working for batch in actor.batches[1:]]
    steady = [batch for batch in later if batch.began >= all_ready]
    used = next(
        (batches for batches in (steady, later) if len(batches) >= _ENOUGH),
        [batch for actor in working for batch in actor.batches],
    )
    rows = np.array([batch.rows for batch in used], float)
    spent = np.array([batch.busy + (batch.waited or 0.0) for batch in used])
    total = rows.sum()
    return Pace(
        busy=sum(batch.busy for batch in used) / total,
        waited=sum(batch.waited or 0.0 for batch in used) / total,
        error=_error_of_ratio(spent, rows),
        fetch=_fetch_seconds([batch for actor in working for batch in actor.batches]),
        actors=len(working),
    )


def _error_of_ratio(spent: np.ndarray, rows: np.ndarray) -> float:
    """Returns the standard error of `spent.sum() / rows.sum()` over batches."""
    count = len(rows)
    if count < 2:
        return float(spent.sum() / rows.sum())
    left = spent - rows * spent.sum() / rows.sum()
    return float(np.sqrt(count / (count - 1) * (left**2).sum()) / rows.sum())


def _fetch_seconds(batches: Sequence[Batch]) -> float:
    """Returns the seconds to fetch an image: a median, as the first tasks also load code and are slow."""
    return float(np.median([batch.fetch_seconds / batch.rows for batch in batches]))


def mapping_start(pace: Pace, rows: int, seconds: float) -> float:
    """Returns the part of a pilot's `seconds` not spent on its `rows`: actors start, and the last one ends alone."""
    return max(seconds - rows * (pace.busy + pace.waited) / pace.actors, 0.0)


def project_mapping(pace: Pace, start: float, run_rows: int, actors: int) -> Seconds:
    """Returns the time of a step: `start` seconds, then `run_rows` rows on a pool of `actors` actors."""
    value = start + run_rows * (pace.busy + pace.waited) / actors
    spread = _NORMAL * run_rows * pace.error / actors
    return Seconds(value, max(value - spread, start), value + spread)


def project_small(rows: int, seconds: float, run_rows: int) -> Seconds:
    """Returns the time of `run_rows` rows in a step without a pool: proportional to the rows, above a floor."""
    floor = min(seconds, FLOOR)
    value = floor + (seconds - floor) * run_rows / max(rows, 1)
    return Seconds(value, min(floor, value), value + (value - floor) / 2)


@dataclass(frozen=True)
class Advice:
    """The bottleneck of a step, and the pool that would remove it.

    Attributes:
        bottleneck: `actors` if these are busy most of the time; else `fetching`, or `passing on` if the fetch tasks
            could feed more actors: each block has a fixed cost, which many rows share in a large run.
        actors: number of actors of the configured pool.
        best_actors: the smallest number of actors on this cluster that is about as fast as any other number.
        best_speedup: speed-up by that pool, 1 = none.
        fetching_from: number of actors from which on fetching would be the bottleneck on this cluster; None = never.
        doubled_actors, doubled_speedup: the pool on two such clusters, and its speed-up.
    """

    bottleneck: str
    actors: int
    best_actors: int
    best_speedup: float
    fetching_from: int | None
    doubled_actors: int
    doubled_speedup: float


def advise(pace: Pace, resources: PoolResources, nodes: Sequence[Mapping[str, float]]) -> Advice:
    """Returns the bottleneck and a better pool, from the seconds that actors and fetch tasks take for an image.

    The number of fetch tasks is the one that `fit_pool` places beside the actors.
    """
    most = _fitted(resources, nodes, None)[0]
    rates = {actors: _rate(pace, *_fitted(resources, nodes, actors)) for actors in range(1, most + 1)}
    now = min(_fitted(resources, nodes, resources.max_actors)[0], most)
    best = min(actors for actors, rate in rates.items() if rate >= _AS_GOOD * max(rates.values()))
    doubled, alone = _fitted(resources, [*nodes, *nodes], None), _rate(pace, now, _PLENTY)
    limits = (actors for actors, rate in rates.items() if rate < _AS_GOOD * actors / max(pace.busy, 1e-9))
    return Advice(
        bottleneck="actors" if pace.busy_share >= _MOSTLY else "passing on" if rates[now] == alone else "fetching",
        actors=now,
        best_actors=best,
        best_speedup=rates[best] / rates[now],
        fetching_from=next(limits, None),
        doubled_actors=doubled[0],
        doubled_speedup=_rate(pace, *doubled) / rates[now],
    )


def _fitted(resources: PoolResources, nodes: Sequence[Mapping[str, float]], most: int | None) -> tuple[int, int]:
    """Returns the numbers of actors and fetch tasks of the configured pool, limited to `most` actors."""
    pool = fit_pool(resources.model_copy(update={"max_actors": most, "grow": False}), nodes)
    return pool.actors, pool.fetches


def _rate(pace: Pace, actors: int, fetches: int) -> float:
    """Returns images per second."""
    return min(actors / max(pace.busy, 1e-9), fetches / max(pace.fetch, 1e-9))
