"""How well image-level labels are predicted.

Axis legend: N images, C classes.
"""

from __future__ import annotations

import numpy as np


def average_precisions(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Average precision of each class: the mean, over its positive images, of the precision at their rank.

    Images of equal score share a rank, the last of them, so that a constant score earns the share of positives.

    Args:
        scores: (N, C) float, the higher the likelier.
        labels: (N, C) bool.

    Returns:
        (C,) float64 in [0, 1]; NaN for a class without a positive image, or with a score that is NaN: it has no rank.
    """
    result = np.full(scores.shape[1], np.nan)
    for c in np.flatnonzero(labels.any(0)):
        values, positive = scores[:, c], labels[:, c]
        if np.isnan(values).any():
            continue
        order = np.argsort(-values, kind="stable")
        last = np.searchsorted(-values[order], -values[positive], side="right")  # images ranked this high or equal
        result[c] = np.mean(np.cumsum(positive[order])[last - 1] / last)
    return result


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean of `average_precisions` over the classes that have a positive image; NaN when none has, or a score is NaN.

    Args:
        scores: (N, C) float.
        labels: (N, C) bool.
    """
    precisions = average_precisions(scores, labels)[labels.any(0)]
    return float(precisions.mean()) if len(precisions) else float("nan")
