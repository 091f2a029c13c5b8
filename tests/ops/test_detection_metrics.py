"""AP and CorLoc: cases worked out by hand, and the devkit's procedure written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from weaksam.ops.coco_metrics import coco_metrics
from weaksam.ops.detection_metrics import (
    HIT,
    IGNORED,
    MISS,
    DetectionRules,
    average_precision,
    concat_records,
    detection_metrics,
    detection_table,
    match_image,
    precision_recall,
    sample_curve,
)

RULES = DetectionRules()


def truth(*objects: tuple) -> dict:
    """Objects are (box, class) or (box, class, flag), flag being `difficult` or `crowd`."""
    flags = [thing[2] if len(thing) > 2 else "" for thing in objects]
    return {
        "boxes": [thing[0] for thing in objects],
        "classes": [thing[1] for thing in objects],
        "difficult": [flag == "difficult" for flag in flags],
        "crowd": [flag == "crowd" for flag in flags],
    }


def found(*detections: tuple, status: str = "ok") -> dict:
    boxes, classes, scores = ([d[i] for d in detections] for i in range(3))
    return {"status": status, "boxes": boxes, "classes": classes, "scores": scores}


A, B, FAR = [0, 0, 10, 10], [20, 20, 40, 40], [60, 60, 70, 70]


def test_a_second_detection_of_an_object_is_a_miss() -> None:
    record = match_image(truth((A, 0), (B, 0)), found((A, 0, 0.5), (A, 0, 0.9), (B, 0, 0.1), (FAR, 0, 0.2)), 1, RULES)
    assert record.scores.tolist() == [0.9, 0.5, 0.2, 0.1]
    assert record.outcomes[:, 0].tolist() == [HIT, MISS, MISS, HIT]
    (row,) = detection_table(record, ["a"], RULES)
    # recall 0.5 at precision 1, recall 1 at precision 2 / 4
    assert row["AP50"] == pytest.approx(0.5 * 1 + 0.5 * 0.5)
    eleven = detection_table(record, ["a"], DetectionRules(eleven_point=True))[0]
    assert eleven["AP50"] == pytest.approx((6 * 1 + 5 * 0.5) / 11)


def test_difficult_objects_and_crowds_count_neither_way() -> None:
    record = match_image(
        truth((A, 0, "difficult"), (B, 0, "crowd"), (FAR, 0)),
        found((A, 0, 0.9), (A, 0, 0.8), (B, 0, 0.7), (FAR, 0, 0.6)),
        1,
        RULES,
    )
    assert record.outcomes[:, 0].tolist() == [IGNORED, IGNORED, IGNORED, HIT]
    assert record.num_objects.tolist() == [1]
    assert detection_metrics(detection_table(record, ["a"], RULES), RULES)["AP50"] == 1.0


def test_classes_do_not_mix_and_one_without_objects_has_no_ap() -> None:
    record = match_image(truth((A, 0)), found((A, 1, 0.9), (A, 0, 0.1)), 3, RULES)
    rows = detection_table(record, ["a", "b", "c"], RULES)
    assert [row["AP50"] for row in rows] == [1.0, None, None]
    assert [row["num_detections"] for row in rows] == [1, 1, 0]
    assert detection_metrics(rows, RULES) == {"AP50": 1.0, "AP75": 1.0, "CorLoc": 1.0}


def test_corloc_looks_at_the_best_detection_of_each_class_that_is_there() -> None:
    records = concat_records(
        [
            match_image(truth((A, 0), (B, 1)), found((A, 0, 0.2), (FAR, 0, 0.1), (FAR, 1, 0.9), (B, 1, 0.8)), 2, RULES),
            match_image(truth((A, 0, "difficult")), found((A, 0, 0.2)), 2, RULES),
            match_image(truth((A, 0)), found(), 2, RULES),
            match_image(truth((A, 0)), found((A, 0, 1.0), status="crash"), 2, RULES),
            match_image(truth((A, 0, "crowd")), found((FAR, 1, 0.2)), 2, RULES),
        ]
    )
    rows = detection_table(records, ["a", "b"], RULES)
    assert [row["CorLoc"] for row in rows] == [2 / 4, 0.0]
    assert detection_metrics(rows, RULES)["CorLoc"] == 0.25
    assert records.num_images == 5


def test_the_reference_evaluator_is_a_pixel_more_generous() -> None:
    shifted = [0, 0, 10, 6.5]
    assert match_image(truth(([0, 3.3, 10, 10], 0)), found((shifted, 0, 1.0)), 1, RULES).outcomes[0, 0] == MISS
    lenient = DetectionRules(thresholds=(0.36,), plus_one=True)
    assert match_image(truth(([0, 3.3, 10, 10], 0)), found((shifted, 0, 1.0)), 1, lenient).outcomes[0, 0] == HIT


def devkit_ap(precision: list[float], recall: list[float], eleven_point: bool) -> float:
    """VOCevaldet.m and VOCap.m, written out."""
    if eleven_point:  # the levels of its versions in Python
        return sum(
            max((p for p, r in zip(precision, recall, strict=True) if r >= t), default=0) / 11
            for t in np.arange(0, 1.1, 0.1)
        )
    mrec, mpre = [0.0, *recall, 1.0], [0.0, *precision, 0.0]
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    return sum((mrec[i] - mrec[i - 1]) * mpre[i] for i in range(1, len(mrec)) if mrec[i] != mrec[i - 1])


@pytest.mark.parametrize("eleven_point", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_average_precision_equals_the_devkits(seed: int, eleven_point: bool) -> None:
    rng = np.random.default_rng(seed)
    outcomes = rng.choice([HIT, MISS, IGNORED], 30, p=[0.4, 0.4, 0.2]).astype(np.int8)
    scores = rng.random(30)
    total = int((outcomes == HIT).sum()) + 3
    hits, misses, precision, recall = 0, 0, [], []
    for i in sorted(range(30), key=lambda i: -scores[i]):
        hits, misses = hits + (outcomes[i] == HIT), misses + (outcomes[i] == MISS)
        if outcomes[i] != IGNORED:
            precision.append(hits / (hits + misses))
            recall.append(hits / total)
    ours = precision_recall(outcomes, scores, total)
    assert average_precision(*ours, eleven_point=eleven_point) == pytest.approx(
        devkit_ap(precision, recall, eleven_point)
    )


@pytest.mark.parametrize(("hits", "levels"), [(1, 2), (3, 3), (4, 5), (6, 6), (7, 7), (10, 11)])
def test_eleven_levels_are_those_of_the_published_evaluators(hits: int, levels: int) -> None:
    """Three of ten do not reach the level of 0.3, which is 0.30000000000000004 there: 3 / 11 and not 4 / 11."""
    curve = precision_recall(np.ones(hits, np.int8), np.arange(hits)[::-1] / 10, 10)
    assert average_precision(*curve, eleven_point=True) == pytest.approx(levels / 11)


def test_detectron2s_corloc_leaves_out_images_whose_objects_are_all_difficult() -> None:
    images = [
        (truth((A, 0, "difficult")), found((A, 0, 0.9))),
        (truth((A, 0, "difficult"), (FAR, 0)), found((A, 0, 0.9))),  # a difficult object is localised like any
        (truth((A, 0)), found((FAR, 0, 0.9))),
        (truth((A, 0, "crowd"), (FAR, 0, "difficult")), found((FAR, 0, 0.9))),
    ]
    figures = {}
    for counts in (True, False):
        rules = DetectionRules(corloc_difficult=counts)
        rows = detection_table(concat_records(match_image(*one, 1, rules) for one in images), ["a"], rules)
        figures[counts] = rows[0]["CorLoc"]
    assert figures == {True: 3 / 4, False: 1 / 2}


@pytest.mark.parametrize("eleven_point", [False, True])
def test_nothing_detected_is_an_ap_of_zero(eleven_point: bool) -> None:
    none = np.zeros(0)
    assert average_precision(none, none, eleven_point=eleven_point) == 0.0


def test_a_curve_is_the_best_precision_at_each_recall_and_its_mean_is_nearly_ap() -> None:
    precision, recall = np.array([1.0, 0.5, 2 / 3, 0.5]), np.array([0.25, 0.25, 0.5, 0.5])
    curve = sample_curve(precision, recall)
    assert curve.shape == (101,)
    assert curve[[0, 25, 26, 50, 51, 100]].tolist() == pytest.approx([1, 1, 2 / 3, 2 / 3, 0, 0])
    assert curve.mean() == pytest.approx(average_precision(precision, recall, eleven_point=False), abs=0.01)
    assert sample_curve(np.zeros(0), np.zeros(0)).tolist() == [0.0] * 101


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"boxes": [[math.nan, 0, 10, 10]]}, r"detections: boxes\[0\] is not finite: \[nan, 0.0, 10.0, 10.0\]"),
        ({"scores": [math.nan]}, r"detections: scores\[0\] is not finite: nan"),
        ({"scores": [math.inf]}, "is not finite: inf"),
        ({"classes": [1]}, "detections: class 1 is none of 0 to 0"),
        ({"classes": [-1]}, "detections: class -1 is none of 0 to 0"),
        ({"scores": [0.9, 0.8]}, r"one of `scores` for each of its 1 boxes, got \(2,\)"),
        ({"classes": []}, r"one of `classes` for each of its 1 boxes, got \(0,\)"),
        ({"boxes": [[0, 0, 10]]}, r"boxes must be \(objects, 4\), got \(1, 3\)"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_is_no_hit(change: dict, fault: str) -> None:
    detections = found((A, 0, 0.9)) | change
    with pytest.raises(ValueError, match=fault):
        match_image(truth((A, 0)), detections, 1, RULES)
    with pytest.raises(ValueError, match=fault.replace("detections:", "detections of image 1:")):
        coco_metrics([(truth((A, 0)), detections)], ["a"])


def test_objects_of_unknown_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="objects: class 2 is none of 0 to 1"):
        match_image(truth((A, 2)), found(), 2, RULES)
