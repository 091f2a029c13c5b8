"""Uncertainty by hand: ranks by class, the worst label decides, labels that nobody knows, nothing found at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weaksam.ops.uncertainty import best_scores, image_uncertainty, most_uncertain, rank_confidence


def test_the_best_score_of_each_class_that_is_looked_at() -> None:
    classes, scores = np.array([2, 0, 2, 1]), np.array([0.25, 0.5, 0.75, 1.0])
    assert best_scores(classes, scores) == {0: 0.5, 1: 1.0, 2: 0.75}
    assert best_scores(classes, scores, labels=[2, 3]) == {2: 0.75}
    assert best_scores(np.zeros(0, np.int64), np.zeros(0)) == {}


def test_ranks_are_shared_by_equal_scores_and_none_found_has_none() -> None:
    assert rank_confidence(np.array([0.1, 0.9, 0.0, 0.1])).tolist() == [0.75, 1.0, 0.0, 0.75]
    assert rank_confidence(np.array([0.3])).tolist() == [1.0]
    assert rank_confidence(np.zeros(0)).tolist() == []


def test_the_label_that_is_told_worst_decides() -> None:
    best = [{0: 0.9, 1: 0.002}, {0: 0.8}, {0: 0.7, 1: 0.001}, {1: 0.003}, {}, {}]
    labels = [[0, 1], [0], [0, 1], [1], [0], []]
    # class 0, four images: ranks 1, 3/4, 2/4 and none; class 1, three images: 2/3, 1/3, 1
    found = image_uncertainty(best, labels)
    assert np.allclose(found, [1 / 3, 1 / 4, 2 / 3, 0, 1, 0])


def test_a_found_label_is_surer_than_one_that_is_not() -> None:
    assert image_uncertainty([{0: 0.01}, {}, {}], [[0], [0], [0]]).tolist() == [0, 1, 1]


def test_without_labels_the_score_nearest_to_a_half_decides() -> None:
    best = [{0: 0.9, 4: 0.4}, {0: 0.5}, {1: 1.0}, {1: 3.0}, {}]
    assert np.allclose(image_uncertainty(best, [None] * 5), [0.8, 1, 0, 0, 0])


def test_no_images() -> None:
    assert image_uncertainty([], []).tolist() == []
    assert most_uncertain([], np.zeros(0), 3) == []


def test_equal_images_are_in_the_order_of_their_ids() -> None:
    unsure = np.array([0.5, 1, 0.5, 1])
    assert most_uncertain(["d", "c", "b", "a"], unsure, 3) == [3, 1, 2]
    assert most_uncertain(["d", "c", "b", "a"], unsure, 9) == [3, 1, 2, 0]


images = st.lists(
    st.tuples(
        st.dictionaries(st.integers(0, 2), st.integers(0, 20).map(lambda s: s / 20)),
        st.one_of(st.none(), st.sets(st.integers(0, 2)).map(sorted)),
    ),
    max_size=12,
)


@given(images, st.sampled_from([0.001, 0.5]))
def test_the_scale_of_a_class_does_not_count_where_labels_are_known(found: list, scale: float) -> None:
    best, labels = [one for one, _ in found], [present for _, present in found]
    unsure = image_uncertainty(best, labels)
    assert ((unsure >= 0) & (unsure <= 1)).all()
    scaled = [{label: score * scale if label == 1 else score for label, score in one.items()} for one in best]
    known = [index for index, present in enumerate(labels) if present is not None]
    assert image_uncertainty(scaled, labels)[known].tolist() == pytest.approx(unsure[known].tolist())
