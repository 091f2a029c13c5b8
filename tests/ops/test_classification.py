"""Average precision of labels against a plain twin."""

from __future__ import annotations

import numpy as np
import pytest

from weaksam.ops.classification import average_precisions, mean_average_precision


def twin(scores: np.ndarray, labels: np.ndarray) -> float:
    """For every positive image: the precision among all images that score at least as high."""
    found = [(labels & (scores >= s)).sum() / (scores >= s).sum() for s in scores[labels]]
    return float(np.mean(found)) if found else float("nan")


def test_no_images_and_no_positives_are_nan() -> None:
    assert np.isnan(mean_average_precision(np.zeros((0, 2)), np.zeros((0, 2), bool)))
    assert np.isnan(average_precisions(np.ones((3, 1)), np.zeros((3, 1), bool))).all()


def test_hand_computed() -> None:
    scores = np.array([[0.9], [0.8], [0.7], [0.6]])
    labels = np.array([[True], [False], [True], [False]])
    assert average_precisions(scores, labels)[0] == pytest.approx((1 + 2 / 3) / 2)


def test_a_constant_score_earns_the_share_of_positives() -> None:
    labels = np.array([[True], [False], [False], [True]])
    assert average_precisions(np.zeros((4, 1)), labels)[0] == 0.5


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_twin_also_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 6, (30, 4)) / 5, rng.random((30, 4)) < 0.2
    found = average_precisions(scores, labels)
    wanted = [twin(scores[:, c], labels[:, c]) for c in range(4)]
    np.testing.assert_allclose(found, wanted)
    assert mean_average_precision(scores, labels) == pytest.approx(np.nanmean(wanted))
