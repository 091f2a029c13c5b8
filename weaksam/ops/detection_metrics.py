"""Average precision and CorLoc as PASCAL VOC and the weakly supervised literature define them.

Two steps, so that the first can run anywhere in parallel: `match_image` makes a compact record of one image, and
`detection_metrics` sums records up.
A detection hits when its best overlap with an object of its class, at least the threshold, is with one that no better
detection of the image took. Best overlaps with difficult objects or crowds count neither for nor against.
Source: the VOC devkit (VOCevaldet.m), Deselaers et al. 2012 (CorLoc).
Boxes are xyxy, absolute pixels, right and bottom exclusive: IoU equals the devkit's "+1" IoU of inclusive boxes.
Axis legend: G objects (ground truth), N detections, T thresholds, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from weaksam.core.schemas import OK
from weaksam.ops.checks import check_objects
from weaksam.ops.proposal_metrics import pairwise_iou

HIT, MISS, IGNORED = 1, 0, -1
# The levels as the published evaluators in Python compute them: three are one rounding step above 0.3, 0.6 and 0.7, so
# that a recall of 3 of 10 does not reach its level.
_ELEVEN_LEVELS = np.arange(0, 1.1, 0.1)


@dataclass(frozen=True)
class DetectionRules:
    """What counts as found. The defaults are the devkit's.

    Attributes:
        thresholds: IoU from which a detection may hit.
        eleven_point: AP as the mean of 11 precisions (VOC up to 2009) instead of the area under the curve.
        plus_one: take one pixel more of width and height, as the reference evaluator does by mistake: it makes boxes
            inclusive and adds 1 in the overlap again.
        corloc_threshold: IoU from which an object counts as localised.
        corloc_difficult: whether an image whose objects of a class are all difficult counts for the CorLoc of the
            class, as in the evaluators of OICR and MIST; it does not in detectron2's.
    """

    thresholds: tuple[float, ...] = (0.5, 0.75)
    eleven_point: bool = False
    plus_one: bool = False
    corloc_threshold: float = 0.5
    corloc_difficult: bool = True


@dataclass(frozen=True)
class DetectionRecords:
    """What AP and CorLoc need to know of some images."""

    outcomes: np.ndarray  # (N, T) int8: HIT, MISS or IGNORED
    scores: np.ndarray  # (N,) float64
    classes: np.ndarray  # (N,) int32
    num_objects: np.ndarray  # (C,) int64, objects that are to be found
    num_localised: np.ndarray  # (C,) int64, images whose best detection of a class that is there overlaps one of it
    num_present: np.ndarray  # (C,) int64, images that hold the class and count for its CorLoc
    num_images: np.ndarray  # () int64


def match_image(
    truth: Mapping[str, Any],
    detections: Mapping[str, Any],
    num_classes: int,
    rules: DetectionRules,
    *,
    iou: np.ndarray | None = None,
) -> DetectionRecords:
    """The record of one image from its rows in the tables `ground_truth` and `detections`.

    Args:
        truth: `boxes`, `classes`, `difficult`, `crowd`.
        found: `status`, `boxes`, `classes`, `scores`. A row that is not ok has no detections.
        num_classes: C.
        rules: what counts.
        iou: (G, N) float, of something else than the boxes, such as masks; rows and columns as in `truth` and `found`.

    Raises:
        ValueError: a box or a score is not finite, a class is none of `num_classes`, or there are not as many of each.
    """
    usable: Mapping[str, Any] = detections if detections["status"] == OK else {"boxes": [], "classes": [], "scores": []}
    check_objects({key: truth[key] for key in ("boxes", "classes")}, "objects", num_classes)
    check_objects(usable, "detections", num_classes)
    scores = np.asarray(usable["scores"], np.float64)
    order = np.argsort(-scores, kind="stable")
    classes, scores = np.asarray(usable["classes"], np.int32)[order], scores[order]
    truth_classes = np.asarray(truth["classes"], np.int32)
    crowd = np.asarray(truth["crowd"], bool)
    ignorable = crowd | np.asarray(truth["difficult"], bool)
    iou = pairwise_iou(truth["boxes"], usable["boxes"], plus_one=rules.plus_one) if iou is None else iou
    iou = iou[:, order]
    outcomes = np.zeros((len(scores), len(rules.thresholds)), np.int8)
    localised, present = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
    for label in np.union1d(classes, truth_classes):
        detected, labelled = np.flatnonzero(classes == label), truth_classes == label
        overlaps = iou[labelled][:, detected]
        outcomes[detected] = _outcomes(overlaps, ignorable[labelled], rules.thresholds)
        if (labelled & ~(crowd if rules.corloc_difficult else ignorable)).any():
            present[label] = 1
            best = iou[labelled & ~crowd][:, detected[:1]].max(initial=0.0)
            localised[label] = len(detected) > 0 and best >= rules.corloc_threshold
    num_objects = np.bincount(truth_classes[~ignorable], minlength=num_classes)
    return DetectionRecords(outcomes, scores, classes, num_objects, localised, present, np.int64(1))  # type: ignore[arg-type]


def _outcomes(iou: np.ndarray, ignorable: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """(N, T) what each detection of a class, best first, comes to; `iou` (G, N)."""
    outcomes = np.full((iou.shape[1], len(thresholds)), MISS, np.int8)
    if not len(iou):
        return outcomes
    best = iou.argmax(0)
    for column, threshold in enumerate(thresholds):
        taken = np.zeros(len(iou), bool)
        for row in np.flatnonzero(iou.max(0) >= threshold):
            if ignorable[best[row]]:
                outcomes[row, column] = IGNORED
            elif not taken[best[row]]:
                outcomes[row, column], taken[best[row]] = HIT, True
    return outcomes


def concat_records(records: Iterable[DetectionRecords]) -> DetectionRecords:
    """Many records as one; ValueError when there are none."""
    parts = list(records)
    if not parts:
        raise ValueError("records must hold one record at least, got none")
    listed = ("outcomes", "scores", "classes")
    joined = {
        f.name: (np.concatenate if f.name in listed else np.sum)([getattr(p, f.name) for p in parts], axis=0)
        for f in fields(DetectionRecords)
    }
    return DetectionRecords(**joined)


def precision_recall(outcomes: np.ndarray, scores: np.ndarray, num_objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall after each detection that counts, by falling score; ties keep their order.

    Args:
        outcomes: (N,) int8.
        scores: (N,) float.
        num_objects: to be found, at least 1.

    Returns:
        two arrays (K,) float64, K the number of detections not ignored.
    """
    hits = outcomes[np.argsort(-scores, kind="stable")]
    hits = hits[hits != IGNORED]
    num_hits = np.cumsum(hits == HIT)
    return num_hits / np.arange(1, len(hits) + 1), num_hits / num_objects


def average_precision(precision: np.ndarray, recall: np.ndarray, *, eleven_point: bool) -> float:
    """AP of a precision-recall curve; 0 when nothing was detected."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or a higher one
    if eleven_point:
        firsts = np.searchsorted(recall, _ELEVEN_LEVELS)
        return float(sum(envelope[i] for i in firsts if i < len(recall)) / 11)
    return float((np.diff(recall, prepend=0.0) * envelope).sum())


def sample_curve(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """(101,) the best precision at a recall of at least 0, 0.01, ... 1; 0 beyond the last one reached."""
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return envelope[np.searchsorted(recall, np.linspace(0, 1, 101) - 1e-9)]


def detection_table(
    records: DetectionRecords, class_names: Sequence[str], rules: DetectionRules
) -> list[dict[str, Any]]:
    """One row per class: `class`, `num_objects`, `num_detections`, `AP50` ..., `CorLoc`, `curve`; null: there is none.

    `curve` is the precision-recall curve at the first threshold, see `sample_curve`.
    """
    rows = []
    for label, name in enumerate(class_names):
        is_class = records.classes == label
        total, present = int(records.num_objects[label]), int(records.num_present[label])
        row: dict[str, Any] = {"class": name, "num_objects": total, "num_detections": int(is_class.sum())}
        for column, threshold in enumerate(rules.thresholds):
            curve = precision_recall(records.outcomes[is_class, column], records.scores[is_class], max(total, 1))
            average = average_precision(*curve, eleven_point=rules.eleven_point)
            row[ap_name(threshold)] = average if total else None
            if not column:
                row["curve"] = sample_curve(*curve).tolist() if total else None
        row["CorLoc"] = records.num_localised[label] / present if present else None
        rows.append(row)
    return rows


def detection_metrics(rows: Sequence[Mapping[str, Any]], rules: DetectionRules) -> dict[str, float]:
    """The mean over classes of a `detection_table`; what no class has is left out."""
    metrics = {}
    for key in (*(ap_name(t) for t in rules.thresholds), "CorLoc"):
        values = [row[key] for row in rows if row[key] is not None]
        if values:
            metrics[key] = float(np.mean(values))
    return metrics


def ap_name(threshold: float) -> str:
    """`AP50` for 0.5."""
    return f"AP{100 * threshold:g}"
