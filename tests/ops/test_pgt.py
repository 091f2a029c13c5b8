"""Pseudo ground truth against plain twins on random cases, and the edges: one detection, identical boxes, none."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weaksam.ops.box_areas import containment
from weaksam.ops.pgt import PgtRules, normalise_scores, select_pgt

Detection = tuple[list[float], int, float]


def covers(inner: list[float], outer: list[float]) -> float:
    width = max(0.0, min(inner[2], outer[2]) - max(inner[0], outer[0]))
    height = max(0.0, min(inner[3], outer[3]) - max(inner[1], outer[1]))
    area = max(0.0, inner[2] - inner[0]) * max(0.0, inner[3] - inner[1])
    return width * height / area if area else 0.0


def plain(found: list[Detection], labels: set[int], rules: PgtRules) -> list[int]:
    """The rules one detection at a time, as the paper tells them."""
    result = []
    for label in sorted(labels):
        mine = sorted((i for i, (_, c, s) in enumerate(found) if c == label and s > 0), key=lambda i: (-found[i][2], i))
        if not mine:
            continue
        if rules.top_k is not None:
            kept = mine[: rules.top_k]
        else:
            values = [found[i][2] for i in mine]
            high, low = max(values), min(values)
            kept = []
            for i in mine:
                s = found[i][2]
                if rules.norm == "raw":
                    value = s
                elif rules.norm == "max":
                    value = s / high
                elif rules.norm == "range":
                    value = s / (high - low) if high > low else math.inf
                else:
                    value = (s - low) / (high - low) if high > low else 1.0
                if i == mine[0] or value >= rules.threshold:
                    kept.append(i)
            if label in rules.containment_except:
                pass
            elif rules.containment_rule == "all_pairs":
                kept = [
                    i
                    for i in kept
                    if not any(j != i and covers(found[i][0], found[j][0]) >= rules.containment for j in kept)
                ]
            elif rules.containment_rule == "greedy":
                better: list[int] = []
                for i in kept:
                    if all(covers(found[i][0], found[j][0]) < rules.containment for j in better):
                        better.append(i)
                kept = better
        result.append(kept if rules.max_per_class is None else kept[: rules.max_per_class])
    if rules.max_per_image is not None:
        firsts = sorted((one[0] for one in result if one), key=lambda i: (-found[i][2], i))
        others = sorted((i for one in result for i in one[1:]), key=lambda i: (-found[i][2], i))
        result = [(firsts + others)[: rules.max_per_image]]
    return sorted((i for one in result for i in one), key=lambda i: (-found[i][2], i))


def select(found: list[Detection], labels: set[int], rules: PgtRules) -> list[int]:
    boxes = np.array([box for box, _, _ in found], np.float32).reshape(-1, 4)
    classes = np.array([label for _, label, _ in found], np.int32)
    scores = np.array([score for _, _, score in found], np.float64)
    return select_pgt(boxes, classes, scores, labels, rules).tolist()


# On a coarse raster equal boxes, boxes inside boxes and equal scores are common.
sides = st.tuples(*[st.integers(0, 4)] * 4).map(
    lambda s: [8.0 * min(s[0], s[2]), 8.0 * min(s[1], s[3]), 8.0 * max(s[0], s[2]) + 8, 8.0 * max(s[1], s[3]) + 8]
)
detections = st.lists(st.tuples(sides, st.integers(0, 3), st.integers(0, 10).map(lambda s: s / 10)), max_size=14)
rule_sets = st.builds(
    PgtRules,
    norm=st.sampled_from(["range", "minmax", "max", "raw"]),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 0.75, 1.0]),
    containment=st.sampled_from([0.5, 0.85, 1.0]),
    containment_rule=st.sampled_from(["greedy", "all_pairs", "off"]),
    containment_except=st.sampled_from([(), (0, 2)]),
    top_k=st.sampled_from([None, None, 1, 2]),
    max_per_class=st.sampled_from([None, 1, 3]),
    max_per_image=st.sampled_from([None, 2, 4]),
)


@given(detections, st.sets(st.integers(0, 3)), rule_sets)
@settings(max_examples=400)
def test_equals_its_plain_twin(found: list[Detection], labels: set[int], rules: PgtRules) -> None:
    assert select(found, labels, rules) == plain(found, labels, rules)


BOX, INSIDE, APART = [0.0, 0.0, 40.0, 40.0], [2.0, 2.0, 30.0, 30.0], [50.0, 50.0, 90.0, 90.0]


@pytest.mark.parametrize("norm", ["range", "minmax", "max"])
@pytest.mark.parametrize("rule", ["greedy", "all_pairs", "off"])
def test_a_lone_detection_stays_and_none_gives_none(norm: str, rule: str) -> None:
    rules = PgtRules(norm=norm, containment_rule=rule)  # type: ignore[arg-type]
    assert select([(BOX, 1, 0.01)], {1}, rules) == [0]
    assert select([(BOX, 1, 0.9)], {0}, rules) == []  # its class is not there
    assert select([(BOX, 1, 0.0)], {1}, rules) == []  # scores nothing
    assert select([], {0, 1}, rules) == []
    assert select([(BOX, 1, 0.9)], set(), rules) == []


def test_of_identical_boxes_the_greedy_rule_keeps_one_and_the_published_rule_none() -> None:
    found = [(BOX, 0, 0.9), (BOX, 0, 0.9), (APART, 0, 0.8)]
    rules = PgtRules(norm="max")
    assert select(found, {0}, rules) == [0, 2]
    assert select(found, {0}, replace(rules, containment_rule="all_pairs")) == [2]


def test_a_best_box_in_a_weaker_larger_one_stays_with_the_greedy_rule_alone() -> None:
    found = [(INSIDE, 0, 0.9), (BOX, 0, 0.8)]
    rules = PgtRules(norm="max")
    assert select(found, {0}, rules) == [0, 1]
    assert select(found, {0}, replace(rules, containment_rule="all_pairs")) == [1]


def test_order_of_detections_does_not_decide() -> None:
    found = [(APART, 0, 0.1), (BOX, 0, 0.9), (INSIDE, 1, 0.5)]
    assert select(found, {0, 1}, PgtRules(norm="max")) == [1, 2]  # the published code keeps the first of each class


def test_every_image_level_label_that_was_detected_has_a_box_under_any_cap() -> None:
    found = [(BOX, 0, 0.9), (APART, 0, 0.8), (BOX, 1, 0.1)]
    assert select(found, {0, 1}, PgtRules(norm="max", max_per_image=2)) == [0, 2]


def test_the_rule_of_sos_wsod() -> None:
    """The best of each class and raw scores from 0.2 on, less parts of any box of the class, but of some classes."""
    rules = PgtRules("raw", threshold=0.2, containment_rule="all_pairs", containment_except=(1,))
    found = [
        *[(INSIDE, 0, 0.9), (BOX, 0, 0.3), (APART, 0, 0.19)],
        *[(INSIDE, 1, 0.9), (BOX, 1, 0.3), (APART, 1, 0.1)],
        *[(APART, 2, 0.05), (BOX, 2, 0.04)],
    ]
    assert sorted(select(found, {0, 1, 2}, rules)) == [1, 3, 4, 6]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"norm": "min_max"}, "norm must be one of 'range', 'minmax', 'max', 'raw', got 'min_max'"),
        ({"containment_rule": "none"}, "containment_rule must be one of 'greedy', .* got 'none'"),
        ({"top_k": -1}, "top_k must be .* got -1"),
        ({"max_per_class": 0}, "max_per_class must be .* got 0"),
        ({"max_per_image": 2.0}, "max_per_image must be .* got 2.0"),
        ({"threshold": math.nan}, "threshold must be a finite number from 0 on, got nan"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PgtRules(**wrong)


def test_normalised_scores() -> None:
    scores = np.array([0.9, 0.5, 0.1])
    assert np.allclose(normalise_scores(scores, "minmax"), [1, 0.5, 0])
    assert np.allclose(normalise_scores(scores, "range"), [1.125, 0.625, 0.125])
    assert np.allclose(normalise_scores(scores, "max"), [1, 5 / 9, 1 / 9])
    assert np.allclose(normalise_scores(scores, "raw"), scores)


def test_containment_is_of_the_row_in_the_column() -> None:
    shares = containment(np.array([BOX, INSIDE, [5.0, 5.0, 5.0, 9.0]]))
    assert np.allclose(shares, [[1, 0.49, 0], [1, 1, 0], [0, 0, 0]])
