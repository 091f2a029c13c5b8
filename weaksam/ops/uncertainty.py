"""How unsure detections leave an image: which images a person should look at first.

Images whose labels are known are sampled by least confidence (Lewis and Gale 1994), the label that is told worst
deciding for the image (the maximum over classes of Brust et al. 2018, arXiv 1809.09875). Scores of weakly supervised
detectors are not on one scale for all classes, so the confidence in a label is not a score but its rank among the
images that have the label. Where no labels are known there is nothing to rank among: the score nearest to 0.5 decides.
Axis legend: N detections of an image, M images.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np


def best_scores(classes: np.ndarray, scores: np.ndarray, labels: Collection[int] | None = None) -> dict[int, float]:
    """The best score of each class in an image.

    Args:
        classes: (N,) int.
        scores: (N,) float.
        labels: the only classes that are looked at; None = all.
    """
    best = {}
    for label in np.unique(classes).tolist():
        if labels is None or label in labels:
            best[label] = float(scores[classes == label].max())
    return best


def image_uncertainty(best: Sequence[Mapping[int, float]], labels: Sequence[Collection[int] | None]) -> np.ndarray:
    """How unsure each image is, (M,) float64 in [0, 1].

    Args:
        best: M times the best score by class, of the classes that were found.
        labels: M times the image-level labels, each once; None: not known. No label at all: nothing to be unsure of.
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
    """(M,) float64: the share of scores that are not above each, in (0, 1]; 0 for a score of 0, which is no detection.

    Equal scores have equal ranks, the best has 1.

    Args:
        scores: (M,) float of one class, an image each.
    """
    ranks = np.searchsorted(np.sort(scores), scores, side="right") / max(len(scores), 1)
    return np.where(scores > 0, ranks, 0.0)


def most_uncertain(image_ids: Sequence[str], uncertainty: np.ndarray, limit: int) -> list[int]:
    """Indices of the `limit` most uncertain images, the most uncertain first; equal ones by their ids."""
    return sorted(range(len(image_ids)), key=lambda index: (-uncertainty[index], image_ids[index]))[:limit]
