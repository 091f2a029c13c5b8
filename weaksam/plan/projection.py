"""How long a step that maps images takes, what holds it up and which pool would do better, from a pilot's times.

Its actors all work alike, so a step's time is that of its start and its end, which the pilot has too, and its rows by
the rate at which actors got through theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from weaksam.execution.pools import PoolResources, fit_pool
from weaksam.execution.times import ActorTimes, Batch
from weaksam.plan.training_projection import CONFIDENCE, Seconds

FLOOR = 0.5  # seconds of a small step that its rows have no part in: imports, files that are always written
_NORMAL = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)  # so many standard errors to either side hold CONFIDENCE
_ENOUGH = 4  # batches, for a rate
_MOSTLY = 0.8  # busy share from which on actors count as the bottleneck
_PLENTY = 10**9  # fetch tasks that are never too few
_AS_GOOD = 0.97  # of the best rate; more actors for the rest are not worth it


@dataclass(frozen=True)
class Pace:
    """How fast a pool went through a pilot's images, an actor and an image each.

    Attributes:
        busy, waited: seconds an actor works on an image and waits for it.
        error: standard error of their sum.
        fetch: seconds a fetch task takes for an image.
        actors: that worked.
    """

    busy: float
    waited: float
    error: float
    fetch: float
    actors: int

    @property
    def busy_share(self) -> float:
        """Share of the time in which actors work."""
        return self.busy / max(self.busy + self.waited, 1e-9)


def measure_pace(actors: Sequence[ActorTimes]) -> Pace:
    """What the actors of a pilot wrote down, as means over images.

    Left out are the first batch of each, which waits for no other and may compile, and what began before all actors
    stood: until then they have the machine to themselves or share it with those that load. Where little is left, all
    is taken.

    Raises:
        ValueError: there is no batch.
    """
    working = [one for one in actors if one.batches]
    if not working:
        raise ValueError("no actor wrote down a batch")
    all_ready = max(one.ready for one in working)
    later = [batch for one in working for batch in one.batches[1:]]
    steady = [batch for batch in later if batch.began >= all_ready]
    used = next(
        (some for some in (steady, later) if len(some) >= _ENOUGH), [batch for one in working for batch in one.batches]
    )
    rows = np.array([batch.rows for batch in used], float)
    spent = np.array([batch.busy + (batch.waited or 0.0) for batch in used])
    total = rows.sum()
    return Pace(
        busy=sum(batch.busy for batch in used) / total,
        waited=sum(batch.waited or 0.0 for batch in used) / total,
        error=_error_of_ratio(spent, rows),
        fetch=_fetch_seconds([batch for one in working for batch in one.batches]),
        actors=len(working),
    )


def _error_of_ratio(spent: np.ndarray, rows: np.ndarray) -> float:
    """Standard error of `spent.sum() / rows.sum()` over batches."""
    count = len(rows)
    if count < 2:
        return float(spent.sum() / rows.sum())
    left = spent - rows * spent.sum() / rows.sum()
    return float(np.sqrt(count / (count - 1) * (left**2).sum()) / rows.sum())


def _fetch_seconds(batches: Sequence[Batch]) -> float:
    """Of an image; the slowest of the first few tasks load what they need, so a median."""
    return float(np.median([batch.fetch_seconds / batch.rows for batch in batches]))


def mapping_start(pace: Pace, rows: int, seconds: float) -> float:
    """Seconds of a pilot's `seconds` that its `rows` have no part in: actors start, the last of them ends alone."""
    return max(seconds - rows * (pace.busy + pace.waited) / pace.actors, 0.0)


def project_mapping(pace: Pace, start: float, wanted: int, actors: int) -> Seconds:
    """How long `wanted` rows take after `start` seconds, with so many actors."""
    value = start + wanted * (pace.busy + pace.waited) / actors
    spread = _NORMAL * wanted * pace.error / actors
    return Seconds(value, max(value - spread, start), value + spread)


def project_small(rows: int, seconds: float, wanted: int) -> Seconds:
    """How long `wanted` rows take in a step without a pool: in proportion, above a floor."""
    floor = min(seconds, FLOOR)
    value = floor + (seconds - floor) * wanted / max(rows, 1)
    return Seconds(value, min(floor, value), value + (value - floor) / 2)


@dataclass(frozen=True)
class Advice:
    """What holds a step up, and what would help.

    Attributes:
        bottleneck: `actors` where these are at work most of the time; else `fetching`, or, where the fetch tasks could
            feed more actors, `passing on`: each block has its cost, which many rows share in a large run.
        actors: of the pool as it is asked for.
        best_actors: the fewest of this cluster that are about as fast as any number of them.
        best_speedup: by that pool, 1 = none.
        fetching_from: the number of actors from which on fetching would hold this cluster up; None = never.
        doubled_actors, doubled_speedup: of the pool on two such clusters.
    """

    bottleneck: str
    actors: int
    best_actors: int
    best_speedup: float
    fetching_from: int | None
    doubled_actors: int
    doubled_speedup: float


def advise(pace: Pace, asked: PoolResources, nodes: Sequence[Mapping[str, float]]) -> Advice:
    """The pool that would be better, by how long an actor works on an image and a fetch task takes to fetch it.

    Fetch tasks are those that `fit_pool` has place for beside the actors.
    """
    most = _fitted(asked, nodes, None)[0]
    rates = {actors: _rate(pace, *_fitted(asked, nodes, actors)) for actors in range(1, most + 1)}
    now = min(_fitted(asked, nodes, asked.max_actors)[0], most)
    best = min(actors for actors, rate in rates.items() if rate >= _AS_GOOD * max(rates.values()))
    doubled, alone = _fitted(asked, [*nodes, *nodes], None), _rate(pace, now, _PLENTY)
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


def _fitted(asked: PoolResources, nodes: Sequence[Mapping[str, float]], most: int | None) -> tuple[int, int]:
    """Actors and fetch tasks of the pool that is asked for, but with `most` actors at most."""
    pool = fit_pool(asked.model_copy(update={"max_actors": most, "grow": False}), nodes)
    return pool.actors, pool.fetches


def _rate(pace: Pace, actors: int, fetches: int) -> float:
    """Images a second."""
    return min(actors / max(pace.busy, 1e-9), fetches / max(pace.fetch, 1e-9))
