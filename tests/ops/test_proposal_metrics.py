"""Recall of proposals: by hand, against a slow twin, and by what must hold for any boxes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from weaksam.ops.box_areas import pairwise_iou
from weaksam.ops.proposal_metrics import (
    AR_THRESHOLDS,
    REFERENCE_RULES,
    RecallRecords,
    RecallRules,
    concat_records,
    match_proposals,
    match_row,
    proposal_metrics,
    recall_by_class,
    recall_of,
    subset_names,
)

RULES = RecallRules(top_k=(1, 2))


def truth(*boxes: tuple[float, ...], **columns: Any) -> dict[str, Any]:
    n = len(boxes)
    row = {"boxes": list(boxes), "classes": [0] * n, "difficult": [False] * n, "crowd": [False] * n}
    return row | columns


def found(
    *boxes: tuple[float, ...], scores: list[float] | None = None, source: list[int] | None = None
) -> dict[str, Any]:
    n = len(boxes)
    return {
        "status": "ok",
        "boxes": list(boxes),
        "predicted_iou": scores or [1.0] * n,
        "source": source or [0] * n,
    }


def measure(*rows: tuple[dict, dict | None], rules: RecallRules = RULES) -> dict[str, float]:
    return proposal_metrics(concat_records(match_row(t, p, rules) for t, p in rows), rules)


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corner = rng.integers(0, 60, (count, 2))
    return np.concatenate([corner, corner + rng.integers(1, 40, (count, 2))], axis=1).astype(float)


# --- nothing to match


def test_no_images_is_refused() -> None:
    with pytest.raises(ValueError, match="records must hold one record at least"):
        concat_records([])


def test_an_image_without_objects_only_counts_boxes() -> None:
    assert measure((truth(), found((0, 0, 5, 5), (0, 0, 6, 6)))) == {
        "boxes_per_image": 2,
        "boxes_per_image_median": 2,
        "boxes_per_image_grid": 2,
    }
    record = match_row(truth(), found(), RULES)
    assert record.iou.shape == (0, len(subset_names(RULES)))
    assert (record.num_images, record.num_objects) == (1, 0)


@pytest.mark.parametrize("nothing", [None, found(), {"status": "unreadable", "boxes": None, "source": None}])
def test_objects_of_an_image_without_proposals_count_as_missed(nothing: dict | None) -> None:
    got = measure((truth((0, 0, 9, 9)), nothing), (truth((0, 0, 9, 9)), found((0, 0, 9, 9))))
    assert got["recall@0.5"] == got["AR"] == 0.5
    assert got["boxes_per_image"] == 0.5
    alone = measure((truth((0, 0, 9, 9)), nothing))
    assert alone["recall@0.5"] == 0
    assert "recall@0.5_grid" not in alone


# --- by hand


def test_pairwise_iou_by_hand() -> None:
    boxes = np.array([[0, 0, 10, 10], [5, 5, 5, 5]])
    others = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [20, 20, 30, 30], [5, 5, 5, 5]])
    assert pairwise_iou(boxes, others).tolist() == [[1, 0.5, 0, 0], [0, 0, 0, 0]]
    # With inclusive corners these are 11 x 11, 11 x 6 and 11 x 11 pixels, and 1 x 1.
    np.testing.assert_allclose(pairwise_iou(boxes, others, plus_one=True)[0], [1, 66 / 121, 0, 1 / 121])
    assert pairwise_iou(boxes, others, plus_one=True)[1, 3] == 1
    assert pairwise_iou(np.zeros((0, 4)), others).shape == (0, 4)
    assert pairwise_iou(boxes, np.zeros((0, 4))).shape == (2, 0)


def test_recall_and_average_recall_by_hand() -> None:
    objects = truth((0, 0, 10, 10), (100, 100, 110, 110), (200, 200, 210, 210), (300, 300, 310, 310))
    boxes = found((0, 0, 10, 10), (100, 100, 110, 108), (200, 200, 210, 205), (300, 300, 310, 304))  # 1, .8, .5, .4
    got = measure((objects, boxes))
    assert (got["recall@0.5"], got["recall@0.75"], got["recall@0.9"]) == (0.75, 0.5, 0.25)
    # 0.5: three; 0.55 to 0.8: two; 0.85 to 0.95: one.
    assert got["AR"] == pytest.approx((3 + 6 * 2 + 3 * 1) / 4 / 10)
    assert got["recall@0.5_small"] == 0.75
    assert "recall@0.5_medium" not in got


def test_thresholds_are_reached_by_equality() -> None:
    assert AR_THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    assert recall_of(np.array([0.5, 0.4999]), [0.5]) == [0.5]


def test_difficult_objects_and_crowds_count_only_if_asked_for() -> None:
    objects = truth(
        (0, 0, 9, 9), (20, 0, 29, 9), (40, 0, 49, 9), difficult=[0, 1, 0], crowd=[0, 0, 1], classes=[4, 5, 6]
    )
    boxes = found((0, 0, 9, 9))
    assert match_row(objects, boxes, RULES).classes.tolist() == [4]
    assert measure((objects, boxes))["recall@0.5"] == 1
    assert measure((objects, boxes), rules=replace(RULES, include_difficult=True))["recall@0.5"] == 1 / 2
    assert measure((objects, boxes), rules=replace(RULES, include_crowd=True))["recall@0.5"] == 1 / 2
    both = replace(RULES, include_crowd=True, include_difficult=True)
    assert measure((objects, boxes), rules=both)["recall@0.5"] == 1 / 3


def test_sizes_go_by_box_area_or_by_given_areas() -> None:
    sides = (31.9, 32, 95.9, 96)
    objects = truth(*[(0, 0, side, side) for side in sides])
    boxes = found((0, 0, 31.9, 31.9), (0, 0, 96, 96))
    record = match_row(objects, boxes, RULES)
    got = proposal_metrics(record, RULES, thresholds=(0.9,))
    assert [got[f"recall@0.9_{size}"] for size in ("small", "medium", "large")] == [1, 1, 1]
    assert [got[f"AR_{size}"] for size in ("small", "medium", "large")] == [1, 1, 1]
    tiny = truth(*objects["boxes"], areas=[1, 1, 1, 1])
    assert "AR_large" not in proposal_metrics(match_row(tiny, boxes, RULES), RULES)
    assert match_row(tiny, boxes, RULES).areas.tolist() == [1, 1, 1, 1]


def test_top_k_goes_by_score_and_ties_keep_their_order() -> None:
    objects = truth((0, 0, 10, 10))
    boxes = found((50, 50, 60, 60), (0, 0, 10, 6), (0, 0, 10, 10), scores=[0.9, 0.9, 0.1])
    got = measure((objects, boxes))
    assert (got["recall@0.5_top1"], got["recall@0.5_top2"], got["recall@0.75_top2"], got["recall@0.75"]) == (0, 1, 0, 1)
    assert (got["AR@1"], got["AR@2"], got["AR"]) == (0, pytest.approx(0.3), 1)


def test_sources_alone_and_added_up() -> None:
    objects = truth((0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10))
    boxes = found((0, 0, 10, 10), (0, 0, 10, 9), (20, 0, 30, 10), (40, 0, 50, 10), source=[0, 1, 1, 3])
    got = measure((objects, boxes))
    assert got["recall@0.5_grid"] == 1 / 3
    assert got["recall@0.5_coarse"] == 2 / 3
    assert got["recall@0.9_grid+coarse"] == 2 / 3
    assert got["recall@0.5_cross"] == 1 / 3
    assert got["recall@0.5"] == 1
    assert [name for name in got if "fine" in name] == []  # it gave no box
    assert (got["boxes_per_image_grid"], got["boxes_per_image_coarse"], got["boxes_per_image"]) == (1, 2, 4)


def test_one_to_one_gives_a_proposal_to_one_object_only() -> None:
    objects = truth((0, 0, 10, 10), (0, 0, 10, 9))
    boxes = found((0, 0, 10, 10))
    assert measure((objects, boxes))["recall@0.9"] == 1
    assert measure((objects, boxes), rules=replace(RULES, one_to_one=True))["recall@0.9"] == 0.5
    two = found((0, 0, 10, 10), (0, 0, 10, 6))  # the second object gets what is left, 6 / 9
    got = measure((objects, two), rules=replace(RULES, one_to_one=True))
    assert (got["recall@0.5"], got["recall@0.75"]) == (1, 0.5)


def test_the_reference_rules() -> None:
    objects = truth((10, 10, 20, 20), difficult=[True])
    rows = [(objects, found((11, 11, 21, 21))), (objects, None), (objects, found((90, 90, 99, 99)))]
    got = measure(*rows, rules=REFERENCE_RULES)
    assert got["recall@0.9"] == 0.5  # one pixel off is exact; the image without proposals is not looked at
    assert got["boxes_per_image"] == pytest.approx(2 / 3)


def test_recall_by_class() -> None:
    objects = truth((0, 0, 10, 10), (0, 0, 10, 10), (50, 50, 60, 60), classes=[2, 0, 2])
    rows = recall_by_class(match_row(objects, found((0, 0, 10, 10)), RULES), ["a", "b", "c"], thresholds=(0.5,))
    assert rows == [
        {"class": "a", "num_objects": 1, "recall@0.5": 1, "AR": 1},
        {"class": "c", "num_objects": 2, "recall@0.5": 0.5, "AR": 0.5},
    ]


@pytest.mark.parametrize(
    "change", [{"source": [4, 0]}, {"source": [0]}, {"predicted_iou": [0.5]}, {"boxes": [(0, 0, 1, 1)]}]
)
def test_rows_that_do_not_fit_together_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="one score and one source below 4 each, got"):
        match_row(truth((0, 0, 1, 1)), found((0, 0, 1, 1), (0, 0, 2, 2)) | change, RULES)


@pytest.mark.parametrize("change", [{"boxes": [(math.nan, 0, 1, 1)]}, {"predicted_iou": [math.nan]}])
def test_proposals_that_are_not_finite_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=r"proposals: (boxes|scores)\[0\] is not finite"):
        match_row(truth((0, 0, 1, 1)), found((0, 0, 1, 1)) | change, RULES)


def test_recall_names_no_class_that_there_is_not() -> None:
    records = match_row(truth((0, 0, 1, 1), classes=[-1]), found((0, 0, 1, 1)), RULES)
    with pytest.raises(ValueError, match="classes -1 to -1 are not all of 0 to 1"):
        recall_by_class(records, ["a", "b"])


# --- slow twins


def slow_iou(a: np.ndarray, b: np.ndarray, extra: float) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + extra
    height = min(a[3], b[3]) - max(a[1], b[1]) + extra
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0] + extra) * (box[3] - box[1] + extra) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def slow_match(objects: np.ndarray, boxes: np.ndarray, one_to_one: bool, extra: float) -> list[float]:
    table = {(g, n): slow_iou(a, b, extra) for g, a in enumerate(objects) for n, b in enumerate(boxes)}
    best = [0.0] * len(objects)
    while table:
        (g, n), value = max(table.items(), key=lambda item: item[1])
        best[g] = max(best[g], value)
        if one_to_one:
            table = {pair: v for pair, v in table.items() if pair[0] != g and pair[1] != n}
        else:
            del table[g, n]
    return best


@pytest.mark.parametrize("one_to_one", [False, True])
@pytest.mark.parametrize("plus_one", [False, True])
def test_matching_equals_its_slow_twin(one_to_one: bool, plus_one: bool) -> None:
    rng = np.random.default_rng(3)
    rules = RecallRules(one_to_one=one_to_one, plus_one=plus_one, top_k=(1, 3, 50))
    for _ in range(25):
        objects, boxes = random_boxes(rng, rng.integers(0, 6)), random_boxes(rng, rng.integers(0, 14))
        scores, sources = rng.random(len(boxes)), rng.integers(0, 4, len(boxes))
        got = match_proposals(objects, boxes, scores, sources, rules=rules)
        ranked = sorted(range(len(boxes)), key=lambda n: -scores[n])
        subsets = [ranked, ranked[:1], ranked[:3], ranked[:50]]
        subsets += [[n for n in ranked if sources[n] == s] for s in range(4)]
        subsets += [[n for n in ranked if sources[n] < k] for k in (2, 3)]
        assert got.shape == (len(objects), len(subsets)) == (len(objects), len(subset_names(rules)))
        for column, subset in enumerate(subsets):
            expected = slow_match(objects, boxes[subset], one_to_one, float(plus_one))
            np.testing.assert_allclose(got[:, column], expected, atol=1e-12)


# --- what must hold for any boxes


def random_rows(seed: int, images: int = 12) -> list[tuple[dict, dict]]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(images):
        boxes = random_boxes(rng, rng.integers(0, 40))
        row = found(
            *map(tuple, boxes), scores=list(rng.random(len(boxes))), source=list(rng.integers(0, 4, len(boxes)))
        )
        rows.append((truth(*map(tuple, random_boxes(rng, rng.integers(1, 6)))), row))
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_recall_falls_with_the_threshold_and_rises_with_more_proposals(seed: int) -> None:
    rows = random_rows(seed)
    rules = RecallRules()
    got = measure(*rows, rules=rules)
    assert got["recall@0.5"] >= got["recall@0.75"] >= got["recall@0.9"]
    by_k = [got[f"recall@0.5_top{k}"] for k in rules.top_k]
    assert by_k == sorted(by_k)
    assert by_k[-1] == got["recall@0.5"]  # never more than 40 boxes
    assert got["recall@0.5_grid"] <= got["recall@0.5_grid+coarse"] <= got["recall@0.5_grid+coarse+fine"]
    more = [
        (t, {k: v if k == "status" else v + w for (k, v), w in zip(p.items(), q.values(), strict=True)})
        for (t, p), (_, q) in zip(rows, random_rows(seed + 100), strict=True)
    ]
    bigger = measure(*more, rules=rules)
    assert all(bigger[name] >= got[name] for name in ("recall@0.5", "recall@0.75", "recall@0.9", "AR"))
    assert measure(*rows, rules=replace(rules, one_to_one=True))["AR"] <= got["AR"]


def test_the_objects_themselves_as_proposals_are_perfect_and_order_plays_no_part() -> None:
    rows = random_rows(9)
    perfect = [(t, found(*t["boxes"])) for t, _ in rows]
    got = measure(*perfect, rules=RecallRules())
    assert got["AR"] == got["recall@0.9"] == 1
    assert measure(*rows) == pytest.approx(measure(*reversed(rows)))
    parts = [concat_records(match_row(t, p, RULES) for t, p in half) for half in (rows[:5], rows[5:])]
    assert proposal_metrics(concat_records(parts), RULES) == measure(*rows)


def test_a_record_is_a_few_numbers_per_object() -> None:
    record = match_row(*random_rows(1, images=1)[0], RecallRules())
    assert isinstance(record, RecallRecords)
    assert record.iou.shape[1] == len(subset_names(RecallRules())) == 13
