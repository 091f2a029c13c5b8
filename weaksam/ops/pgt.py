"""Adaptive pseudo ground truth: selects the detections of an image for retraining a detector.

Scores of a weakly supervised detector differ between classes and images, so a single threshold loses whole objects in
some images and keeps parts of objects in others. Scores are therefore normalised for each class of each image, and the
best detection of each class is always kept. Source: WeakSAM, arXiv 2402.14812, after SoS-WSOD, arXiv 2206.10080. The
rule of SoS-WSOD (PGF) is `norm: raw` with a threshold of 0.2, `all_pairs`, and no filter of parts for some classes.
Departures from the published code, which uses the order of proposals: detections are sorted by score here; no image
loses its top detection; `containment_rule: all_pairs` is the published filter, which removes both of two equal boxes,
`greedy` keeps the better one.
Axis legend: N detections of an image, K kept detections, C classes.
Boxes are xyxy, absolute pixels, float32, right and bottom exclusive.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import numpy as np
from annotated_types import Ge, Gt, Le

from weaksam.ops.box_areas import containment
from weaksam.ops.choices import check_rules

Norm = Literal["range", "minmax", "max", "raw"]
ContainmentRule = Literal["greedy", "all_pairs", "off"]


@dataclass(frozen=True)
class PgtRules:
    """Rules of selecting detections. The defaults are the paper's except `norm`.

    Attributes:
        norm: normalisation of the scores s of a class in an image, which range from m to M: `range` is s / (M - m), as
            in the published code, `minmax` is (s - m) / (M - m), as in the paper's figure, `max` is s / M, and `raw`
            leaves them as they are, as SoS-WSOD does. With a hundred detections and scores down to 0 the first three
            are almost equal; with few, `minmax` removes the lowest-scored, e.g. the second of two, however good it is.
        threshold: lowest normalised score of the detections that are kept; the best of each class is always kept.
        containment: a box with at least this share of its area inside another box of its class is a part of it, and is
            dropped.
        containment_rule: `greedy`: parts of kept boxes with a higher score are dropped. `all_pairs`, as published:
            parts of any box above the threshold are dropped, both of two equal boxes, even the best of a class.
            `off`: no part is dropped.
        containment_except: indices of the classes whose parts are kept; in SoS-WSOD those that occur in groups.
        top_k: number of best detections of each class to keep instead of all these rules, for comparison.
        max_per_class: most boxes of a class in an image; None = no limit.
        max_per_image: most boxes of an image, the best of each class first; None = no limit.
    """

    norm: Norm = "max"
    threshold: Annotated[float, Ge(0)] = 0.3
    containment: Annotated[float, Gt(0), Le(1)] = 0.85
    containment_rule: ContainmentRule = "greedy"
    containment_except: tuple[int, ...] = ()
    top_k: Annotated[int | None, Ge(1)] = None
    max_per_class: Annotated[int | None, Ge(1)] = None
    max_per_image: Annotated[int | None, Ge(1)] = None

    def __post_init__(self) -> None:
        check_rules(self)


def select_pgt(
    boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray, labels: Collection[int], rules: PgtRules
) -> np.ndarray:
    """Returns the indices of the detections that become pseudo ground truth.

    Args:
        boxes: (N, 4) float, xyxy.
        classes: (N,) int.
        scores: (N,) float; detections with scores of 0 or less are ignored.
        labels: image-level labels. Detections of other classes are removed.
        rules: rules of selection.

    Returns:
        (K,) int64, by descending score; ties in their order.
    """
    ranked = np.argsort(-scores, kind="stable")
    ranked = ranked[np.isin(classes[ranked], list(labels)) & (scores[ranked] > 0)]
    chosen = [
        _of_class(boxes[members], scores[members], members, rules, keeps_parts=label in rules.containment_except)
        for label, members in ((label, ranked[classes[ranked] == label]) for label in np.unique(classes[ranked]))
    ]
    if not chosen:
        return np.zeros(0, np.int64)
    rows = np.concatenate(chosen)
    # the best of each class before all others, each by descending score
    is_second = np.concatenate([np.arange(len(members)) > 0 for members in chosen])
    rows = rows[np.lexsort((rows, -scores[rows], is_second))][: rules.max_per_image]
    return rows[np.lexsort((rows, -scores[rows]))]


def _of_class(
    boxes: np.ndarray, scores: np.ndarray, rows: np.ndarray, rules: PgtRules, *, keeps_parts: bool
) -> np.ndarray:
    """Returns the kept detections among `rows`, the detections of one class by descending score."""
    if rules.top_k is not None:
        return rows[: rules.top_k][: rules.max_per_class]
    stays = normalise_scores(scores, rules.norm) >= rules.threshold
    stays[0] = True
    boxes, rows = boxes[stays], rows[stays]
    if keeps_parts:
        return rows[: rules.max_per_class]
    if rules.containment_rule == "all_pairs":
        covered = containment(boxes) >= rules.containment
        np.fill_diagonal(covered, False)
        rows = rows[~covered.any(1)]
    elif rules.containment_rule == "greedy":
        rows = rows[_without_parts(containment(boxes) >= rules.containment)]
    return rows[: rules.max_per_class]


def normalise_scores(scores: np.ndarray, norm: Norm) -> np.ndarray:
    """Normalises scores of one class in an image, (N,) float above 0; equal scores become 1 (`range`: inf).

    `raw` returns them unchanged.

    Args:
        scores: at least one.
        norm: see `PgtRules`.
    """
    scores = np.asarray(scores, np.float64)
    if norm == "raw":
        return scores
    low, high = scores.min(), scores.max()
    if norm not in get_args(Norm):
        raise ValueError(f"norm must be one of {', '.join(get_args(Norm))}, got {norm!r}")
    if norm == "max":
        return scores / high
    if low == high:
        return np.full(len(scores), np.inf if norm == "range" else 1.0)
    return (scores - low if norm == "minmax" else scores) / (high - low)


def _without_parts(covered: np.ndarray) -> list[int]:
    """Returns the indices of boxes that no better kept box covers, best first; `covered` (N, N) bool, row by column."""
    kept: list[int] = []
    for index in range(len(covered)):
        if not covered[index, kept].any():
            kept.append(index)
    return kept
