"""Uncertainty of the detections of an image, to select images for review.

Images with known labels are ranked by least confidence (Lewis and Gale 1994); the least confident label determines the
uncertainty of the image (the maximum over classes of Brust et al. 2018, arXiv 1809.09875). Scores of weakly supervised
detectors have a different scale for each class, so the confidence in a label is the rank of its score among the images
with that label. Without known labels there are no ranks: the score nearest to 0.5 determines the uncertainty.
Axis legend: N detections of an image, M images.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np


def best_scores(classes: np.ndarray, scores: np.ndarray, labels: Collection[int] | None = None) -> dict[int, float]:
    """Returns the best score of each class in an image.

    Args:
        classes: (N,) int.
        scores: (N,) float.
        labels: the classes to return; None = all.
    """
    best = {}
    for label in np.unique(classes).tolist():
        if labels is None or label in labels:
            best[label] = float(scores[classes == label].max())
    return best


def image_uncertainty(best: Sequence[Mapping[int, float]], labels: Sequence[Collection[int] | None]) -> np.ndarray:
    """Returns the uncertainty of each image, (M,) float64 in [0, 1].

    Args:
        best: the best scores by detected class, for each of M images.
        labels: the image-level labels without duplicates, for each image; None: unknown. Without labels it is 0.
    """
    unsure = np.zeros(len(best))
    of_label: dict[int, list[tuple[int, float]]] = {}
    for image, (scores, present) in enumerate(zip(best, labels, strict=True)):
        if present is None:
            unsure[image] = max((1 - abs(2 * min(max(score, 0), 1) - 1) for score in scores.values()), default=0.0)
        for label in present or ():
            of_label.setdefault(label, []).append((image, scores.get(label, 0.0)))
    for pairs in of_label.values():
        images = [image for image, _ in pairs]
        confidence = rank_confidence(np.array([score for _, score in pairs]))
        unsure[images] = np.maximum(unsure[images], 1 - confidence)
    return unsure


def rank_confidence(scores: np.ndarray) -> np.ndarray:
    """Returns (M,) float64 in (0, 1]: the share of scores that are at most each score; 0 for a score of 0.

    Equal scores have equal ranks, the best has rank 1.

    Args:
        scores: (M,) float of one class, one per image.
    """
    ranks = np.searchsorted(np.sort(scores), scores, side="right") / max(len(scores), 1)
    return np.where(scores > 0, ranks, 0.0)


def most_uncertain(image_ids: Sequence[str], uncertainty: np.ndarray, limit: int) -> list[int]:
    """Returns the indices of the `limit` most uncertain images, most uncertain first; ties by image id."""
    return sorted(range(len(image_ids)), key=lambda index: (-uncertainty[index], image_ids[index]))[:limit]
