"""Made-up pools: pace, time, bottleneck and a better pool are what they must be."""

from __future__ import annotations

import numpy as np
import pytest

from weaksam.execution.pools import PoolResources
from weaksam.execution.times import ActorTimes, Batch
from weaksam.plan.projection import Pace, advise, mapping_start, measure_pace, project_mapping, project_small


def actor(
    batches: int,
    *,
    busy: float,
    waited: float,
    fetch: float = 0.1,
    ready: float = 0.0,
    rows: int = 8,
    noise: float = 0.0,
    seed: int = 0,
) -> ActorTimes:
    """One that works `busy` and waits `waited` seconds an image, and needs ten seconds more for the first batch."""
    rng, told, now = np.random.default_rng(seed), [], ready + waited
    for number in range(batches):
        took = rows * busy * max(1 + noise * rng.standard_normal(), 0.1) + (10.0 if number == 0 else 0.0)
        told.append(Batch(now, now + took, rows, rows * waited if number else None, rows * fetch))
        now += took + rows * waited
    return ActorTimes(ready, told)


def test_pace_is_a_mean_over_images_without_the_first_batch() -> None:
    pace = measure_pace([actor(6, busy=0.2, waited=0.05), actor(6, busy=0.2, waited=0.05)])
    assert (pace.busy, pace.waited, pace.fetch) == pytest.approx((0.2, 0.05, 0.1))
    assert pace.error == pytest.approx(0, abs=1e-9)
    assert (pace.actors, pace.busy_share) == (2, pytest.approx(0.8))


def test_what_is_done_before_all_actors_stand_does_not_count() -> None:
    early, late = actor(8, busy=0.1, waited=0.0), actor(8, busy=0.4, waited=0.0, ready=1000.0)
    assert measure_pace([early, late]).busy == pytest.approx(0.4)
    assert measure_pace([early, actor(1, busy=0.4, waited=0.0, ready=1000.0)]).busy == pytest.approx(0.1)


def test_an_actor_that_got_no_batch_did_not_work() -> None:
    assert measure_pace([actor(5, busy=0.1, waited=0.0), ActorTimes(0.0, [])]).actors == 1
    with pytest.raises(ValueError, match="no actor"):
        measure_pace([ActorTimes(0.0, [])])


def test_a_large_run_has_the_start_of_the_pilot_and_its_rate() -> None:
    pace = Pace(busy=0.2, waited=0.05, error=0.0, fetch=0.1, actors=2)
    start = mapping_start(pace, 64, 8 + 7.0)
    assert start == pytest.approx(7.0)
    assert project_mapping(pace, start, 6400, 2).value == pytest.approx(7.0 + 800)
    assert project_mapping(pace, start, 6400, 4).value == pytest.approx(7.0 + 400)


def test_the_interval_of_a_pool_holds_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(100):
        pace = measure_pace([actor(12, busy=0.2, waited=0.0, noise=0.3, seed=2 * seed + i) for i in (0, 1)])
        found = project_mapping(pace, 5.0, 10_000, 2)
        held += found.low <= 5 + 1000 <= found.high
    assert 80 <= held <= 98


def test_a_small_step_grows_with_its_rows_above_a_floor() -> None:
    assert project_small(64, 0.2, 6400).value == pytest.approx(0.2)
    assert project_small(64, 1.5, 640).value == pytest.approx(0.5 + 10)


NODE = {"CPU": 8.0, "GPU": 0.0}


def test_actors_at_work_are_the_bottleneck_and_more_of_them_are_faster() -> None:
    pace = Pace(busy=0.5, waited=0.01, error=0.0, fetch=0.05, actors=2)
    advice = advise(pace, PoolResources(max_actors=2), [NODE])
    assert (advice.bottleneck, advice.actors, advice.best_actors) == ("actors", 2, 7)
    assert advice.best_speedup == pytest.approx(3.5)
    assert advice.fetching_from is None
    assert advise(pace, PoolResources(), [NODE]).best_speedup == 1


def test_where_fetching_is_slow_fewer_actors_are_as_fast() -> None:
    pace = Pace(busy=0.1, waited=0.9, error=0.0, fetch=1.0, actors=7)
    advice = advise(pace, PoolResources(actor_cpus=1.0), [NODE])
    assert (advice.bottleneck, advice.actors) == ("fetching", 7)
    assert advice.best_actors < 7
    assert advice.best_speedup > 1  # what they leave free fetches


def test_actors_that_wait_although_fetching_is_fast_wait_for_blocks() -> None:
    pace = Pace(busy=0.1, waited=0.2, error=0.0, fetch=0.01, actors=2)
    assert advise(pace, PoolResources(max_actors=2), [NODE]).bottleneck == "passing on"


def test_it_is_told_from_where_on_fetching_would_hold_up() -> None:
    pace = Pace(busy=1.0, waited=0.0, error=0.0, fetch=1.0, actors=2)
    advice = advise(pace, PoolResources(max_actors=2), [NODE])
    assert (advice.bottleneck, advice.fetching_from) == (
        "actors",
        7,
    )  # one processor left: three tasks fetch, one writes
    assert advice.best_actors == 6


def test_a_second_cluster_like_this_doubles_what_gpus_do() -> None:
    pace = Pace(busy=0.5, waited=0.0, error=0.0, fetch=0.05, actors=2)
    advice = advise(pace, PoolResources(), [{"CPU": 16.0, "GPU": 2.0}])
    assert (advice.actors, advice.doubled_actors) == (2, 4)
    assert advice.doubled_speedup == pytest.approx(2.0)
