"""Made-up trainings whose costs are known: what is projected from a short one is what a long one takes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from weaksam.plan.training_projection import fit_costs, parts_of_steps, project_training
from weaksam.training.settings import Course

START = 11.0  # seconds before the loop and after it


def trained(
    course: Course, costs: list[float], *, noise: float = 0.0, every: int = 1, first: float = 0.0, seed: int = 0
):
    """Rows of metrics of a training with these costs of parts, and the seconds it took in all."""
    parts = parts_of_steps(course)
    step = parts[:, :-1] @ np.array(costs[:-1])
    step[1:] += parts[:-1, -1] * costs[-1]  # a checkpoint is written after the row of its step
    step *= 1 + noise * np.random.default_rng(seed).standard_normal(len(step))
    step[0] += first
    ends = [*range(every, course.steps, every), course.steps]
    sums = [float(piece.sum()) for piece in np.split(step, ends[:-1])]
    rows = [{"step": e, "seconds": s, "at": at} for e, s, at in zip(ends, sums, np.cumsum(sums), strict=True)]
    return rows, rows[-1]["at"] + START


def test_of_a_view_only_the_first_sight_counts_each_image_before_any_comes_again() -> None:
    parts = parts_of_steps(Course(images=10, steps=6, batch_size=5, views=1))
    assert parts[:, 0].tolist() == [5] * 6
    assert parts[:, 1].tolist() == parts[:, 2].tolist() == [5, 5, 0, 0, 0, 0]


def test_half_of_the_mirrored_views_are_new_in_the_second_round_and_a_quarter_in_the_third() -> None:
    parts = parts_of_steps(Course(images=4000, steps=30, batch_size=400, views=2))
    rounds = parts.reshape(3, 10, -1).sum(1)
    assert rounds[:, 1].tolist() == [4000, 0, 0]
    assert rounds[:, 2] == pytest.approx([4000, 2000, 1000], rel=0.06)


def test_where_nothing_is_remembered_nothing_is_new() -> None:
    assert parts_of_steps(Course(images=10, steps=4, batch_size=5))[:, 1:].sum() == 0


def test_each_worker_remembers_for_itself() -> None:
    alone, shared = (
        parts_of_steps(Course(images=50, steps=200, batch_size=10, workers=workers, views=1)).sum(0)[1]
        for workers in (1, 2)
    )
    assert (alone, shared) == (50, 100)


def test_a_phase_has_costs_and_first_sights_of_its_own() -> None:
    parts = parts_of_steps(Course(images=6, steps=8, batch_size=3, views=1, phases=(0, 4)))
    assert parts[:, 0].tolist() == [3, 3, 3, 3, 0, 0, 0, 0]
    assert parts[:, 3].tolist() == [0, 0, 0, 0, 3, 3, 3, 3]
    assert parts[:, 1].tolist() == [3, 3, 0, 0, 0, 0, 0, 0]
    assert parts[:, 4].tolist() == [0, 0, 0, 0, 3, 3, 0, 0]


def test_validations_and_checkpoints_are_counted_and_the_last_step_writes_no_checkpoint() -> None:
    course = Course(images=6, steps=7, batch_size=3, held_out=5, validate_every=3, checkpoint_every=7)
    assert parts_of_steps(course)[:, -2].tolist() == [0, 0, 5, 0, 0, 5, 5]
    assert parts_of_steps(course)[:, -1].sum() == 0
    assert parts_of_steps(dataclasses.replace(course, checkpoint_every=2))[:, -1].tolist() == [0, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("pilot", "whole", "costs"),
    [
        (Course(60, 40, 8), Course(5000, 9000, 8), [0.02, 0, 0, 0, 0]),
        (Course(60, 40, 8, views=2), Course(440, 600, 8, views=2), [0.008, 0, 0.054, 0, 0]),
        (
            Course(60, 60, 8, views=2, phases=(0, 24), checkpoint_every=30),
            Course(440, 700, 8, views=2, phases=(0, 280), checkpoint_every=100),
            [0.0227, 0, 0.0193, 0.0091, 0.0171, 0.1021, 0, 1.5],
        ),
        (
            Course(60, 24, 30, workers=2, held_out=3, validate_every=8),
            Course(400, 150, 32, workers=2, held_out=22, validate_every=65),
            [0.0112, 0, 0, 0.0122, 0],
        ),
    ],
    ids=["nothing remembered", "views remembered", "two phases", "validation"],
)
def test_what_a_short_training_shows_is_what_a_long_one_takes(pilot: Course, whole: Course, costs: list[float]) -> None:
    rows, seconds = trained(pilot, costs, first=2.5)
    wanted, _ = trained(whole, costs)
    found = project_training(pilot, rows, seconds, whole)
    assert found.value == pytest.approx(START + 2.5 + wanted[-1]["at"], rel=1e-3)
    assert found.low <= found.value <= found.high


def test_the_first_sight_is_not_taken_for_the_cost_of_every_step() -> None:
    pilot, whole, costs = Course(64, 16, 16, views=2), Course(440, 600, 16, views=2), [0.008, 0, 0.054, 0, 0]
    rows, seconds = trained(pilot, costs)
    by_mean = whole.steps * float(np.mean([row["seconds"] for row in rows]))
    wanted = trained(whole, costs)[1]
    assert by_mean > 1.5 * wanted
    assert project_training(pilot, rows, seconds, whole).value == pytest.approx(wanted, rel=1e-3)


def test_rows_of_several_steps_and_over_the_border_of_phases_are_told_apart() -> None:
    costs = [0.02, 0, 0.02, 0.01, 0, 0.1, 0, 0]
    pilot, whole = Course(60, 60, 8, views=2, phases=(0, 25)), Course(440, 700, 8, views=2, phases=(0, 280))
    rows, seconds = trained(pilot, costs, every=3)
    assert project_training(pilot, rows, seconds, whole).value == pytest.approx(trained(whole, costs)[1], rel=1e-3)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    pilot, whole, costs = Course(64, 48, 16, views=2), Course(440, 600, 16, views=2), [0.008, 0, 0.054, 0, 0]
    wanted = trained(whole, costs)[1]
    held = widths = 0.0
    for seed in range(60):
        rows, seconds = trained(pilot, costs, noise=0.15, seed=seed)
        found = project_training(pilot, rows, seconds, whole)
        held += found.low <= wanted <= found.high
        widths += (found.high - found.low) / wanted
    assert held >= 0.75 * 60
    assert widths / 60 < 0.4


def test_a_training_of_one_row_is_projected_too() -> None:
    rows, seconds = trained(Course(4, 2, 2), [0.5, 0, 0, 0, 0], every=2)
    assert project_training(Course(4, 2, 2), rows, seconds, Course(4, 20, 2)).value == pytest.approx(START + 20)


def test_costs_are_never_negative_and_none_of_what_did_not_occur() -> None:
    costs = fit_costs(np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([-1.0, -2.0]))
    assert costs.tolist() == [0.0, 0.0]
