"""Metrics of predicted image-level labels.

Axis legend: N images, C classes.
"""

from __future__ import annotations

import numpy as np


def average_precisions(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the average precision of each class: the mean precision at the ranks of its positive images.

    Images with equal scores share the last of their ranks, so a constant score gives the share of positives.

    Args:
        scores: (N, C) float, the higher the likelier.
        labels: (N, C) bool.

    Returns:
        (C,) float64 in [0, 1]; NaN for a class without a positive image, or with a NaN score, which has no rank.
    """
    result = np.full(scores.shape[1], np.nan)
    for c in np.flatnonzero(labels.any(0)):
        values, positive = scores[:, c], labels[:, c]
        if np.isnan(values).any():
            continue
        order = np.argsort(-values, kind="stable")
        last = np.searchsorted(-values[order], -values[positive], side="right")  # images with at least this score
        result[c] = np.mean(np.cumsum(positive[order])[last - 1] / last)
    return result


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean of `average_precisions` over classes with a positive image; NaN without any, or for a NaN score.

    Args:
        scores: (N, C) float.
        labels: (N, C) bool.
    """
    precisions = average_precisions(scores, labels)[labels.any(0)]
    return float(precisions.mean()) if len(precisions) else float("nan")
