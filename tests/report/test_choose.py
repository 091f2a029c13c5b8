"""Which images are shown: worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from weaksam.report import choose


def images(**splits: int) -> pa.Table:
    rows = [{"image_id": f"{split}{i}", "split": split} for split, count in splits.items() for i in range(count)]
    return pa.Table.from_pylist(rows)


def pair(objects: list, found: list[tuple]) -> tuple[dict, dict]:
    """Objects are boxes of class 0; found are (box, score)."""
    none = [False] * len(objects)
    truth = {"boxes": objects, "classes": [0] * len(objects), "difficult": none, "crowd": none}
    boxes, scores = [box for box, _ in found], [score for _, score in found]
    return truth, {"status": "ok", "boxes": boxes, "classes": [0] * len(found), "scores": scores}


HERE, THERE = [0, 0, 10, 10], [50, 50, 60, 60]


def test_examples_are_taken_in_turn_from_each_split_and_are_the_same_each_time() -> None:
    table = images(train=50, test=4)
    chosen = choose.examples(table, 6, [])
    assert [one[:2] for one in chosen].count("te") == 3
    assert chosen == choose.examples(table, 6, [])
    assert len(choose.examples(table, 100, [])) == 54


def test_examples_that_most_tables_hold_come_first() -> None:
    held = {"train7", "train9"}
    assert set(choose.examples(images(train=50), 2, [held, held])) == held
    assert choose.examples(images(test=5, train=5), 1, [{"train3"}, {f"train{i}" for i in range(5)}]) == ["train3"]


def test_f1_counts_detections_from_the_score_where_it_is_best_over_all_images() -> None:
    pairs = {
        "right": pair([HERE], [(HERE, 0.9), (THERE, 0.1)]),
        "half": pair([HERE, THERE], [(HERE, 0.8)]),
        "wrong": pair([HERE], [(THERE, 0.3)]),
        "empty": pair([], [(HERE, 0.2)]),
    }
    rated, threshold = choose.rate_images(pairs, 1)
    assert threshold == pytest.approx(0.8)
    assert rated == pytest.approx({"right": 1.0, "half": 2 / 3, "wrong": 0.0})


def test_an_image_that_cannot_be_compared_is_not_rated(caplog: pytest.LogCaptureFixture) -> None:
    good, wrong = pair([HERE], [(HERE, 0.9)]), pair([HERE], [(HERE, math.nan)])
    assert choose.rate_images({"a": good, "b": wrong}, 1) == ({"a": 1.0}, pytest.approx(0.9))
    assert caplog.messages == [
        "warning: 1 of 2 images cannot be rated, e.g. b: detections: scores[0] is not finite: nan"
    ]


def test_without_any_hit_every_detection_counts() -> None:
    rated, threshold = choose.rate_images({"a": pair([HERE], [(THERE, 0.7)])}, 1)
    assert (rated, threshold) == ({"a": 0.0}, 0.0)
    assert choose.rate_images({}, 1) == ({}, 0.0)


def test_without_ground_truth_about_three_detections_an_image_are_shown() -> None:
    scores = np.array([0.1, 0.9, 0.8, 0.2, 0.7, 0.6, 0.5, 0.05])
    assert choose.usual_threshold(scores, 2) == 0.2
    assert choose.usual_threshold(scores, 3) == 0.0
    assert choose.usual_threshold(np.zeros(0), 0) == 0.0


def test_no_image_is_among_the_best_and_the_worst() -> None:
    assert choose.best_and_worst({"a": 0.1, "b": 0.9, "c": 0.5}, 3) == (["b"], ["a"])
    assert choose.best_and_worst({"a": 0.1, "b": 0.9, "c": 0.5, "d": 0.5}, 1) == (["b"], ["a"])
    assert choose.best_and_worst({}, 3) == ([], [])
