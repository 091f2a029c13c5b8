"""Average precision and CorLoc as defined by PASCAL VOC and the weakly supervised literature.

Two steps, so the first can run in parallel: `match_image` returns a compact record of an image, and
`detection_metrics` computes metrics of many records.
A detection is a hit if its best overlap with an object of its class reaches the threshold, and no better detection of
the image has hit that object. Detections whose best overlap is with a difficult object or a crowd are ignored.
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
from weaksam.ops.box_areas import pairwise_iou
from weaksam.ops.checks import check_objects

HIT, MISS, IGNORED = 1, 0, -1
# The levels of the published Python evaluators: three are one rounding step above 0.3, 0.6 and 0.7, so a recall of
# 3 of 10 does not reach its level.
_ELEVEN_LEVELS = np.arange(0, 1.1, 0.1)


@dataclass(frozen=True)
class DetectionRules:
    """Rules of matching detections to objects. The defaults are the devkit's.

    Attributes:
        thresholds: minimum IoU of a hit.
        eleven_point: AP as the mean of 11 precisions (VOC up to 2009) instead of the area under the curve.
        plus_one: add one pixel to width and height, an error of the reference evaluator: it makes boxes inclusive and
            adds 1 in the overlap again.
        corloc_threshold: minimum IoU of a localised object.
        corloc_difficult: whether an image with only difficult objects of a class counts for the CorLoc of the class,
            as in the evaluators of OICR and MIST; in detectron2's it does not.
    """

    thresholds: tuple[float, ...] = (0.5, 0.75)
    eleven_point: bool = False
    plus_one: bool = False
    corloc_threshold: float = 0.5
    corloc_difficult: bool = True


@dataclass(frozen=True)
class DetectionRecords:
    """The data of one or more images that AP and CorLoc need."""

    outcomes: np.ndarray  # (N, T) int8: HIT, MISS or IGNORED
    scores: np.ndarray  # (N,) float64
    classes: np.ndarray  # (N,) int32
    num_objects: np.ndarray  # (C,) int64, objects that count
    num_localised: np.ndarray  # (C,) int64, images with the class whose best detection overlaps an object of it
    num_present: np.ndarray  # (C,) int64, images with the class that count for its CorLoc
    num_images: np.ndarray  # () int64


def match_image(
    truth: Mapping[str, Any],
    detections: Mapping[str, Any],
    num_classes: int,
    rules: DetectionRules,
    *,
    iou: np.ndarray | None = None,
) -> DetectionRecords:
    """Returns the record of an image from its rows in the tables `ground_truth` and `detections`.

    Args:
        truth: `boxes`, `classes`, `difficult`, `crowd`.
        detections: `status`, `boxes`, `classes`, `scores`. A row that is not ok has no detections.
        num_classes: C.
        rules: rules of matching.
        iou: (G, N) float, IoU of e.g. masks instead of boxes, in the order of `truth` and `detections`.

    Raises:
        ValueError: a box or a score is not finite, a class is not below `num_classes`, or lengths differ.
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
    """Returns the outcomes (N, T) of the detections of a class, best first; `iou` (G, N)."""
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
    """Concatenates records; raises ValueError without any."""
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
    """Returns precision and recall after each detection that is not ignored, by descending score; sorting is stable.

    Args:
        outcomes: (N,) int8.
        scores: (N,) float.
        num_objects: number of objects that count, at least 1.

    Returns:
        two arrays (K,) float64, K the number of detections not ignored.
    """
    hits = outcomes[np.argsort(-scores, kind="stable")]
    hits = hits[hits != IGNORED]
    num_hits = np.cumsum(hits == HIT)
    return num_hits / np.arange(1, len(hits) + 1), num_hits / num_objects


def average_precision(precision: np.ndarray, recall: np.ndarray, *, eleven_point: bool) -> float:
    """Returns the AP of a precision-recall curve; 0 without detections."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this or a higher recall
    if eleven_point:
        firsts = np.searchsorted(recall, _ELEVEN_LEVELS)
        return float(sum(envelope[i] for i in firsts if i < len(recall)) / 11)
    return float((np.diff(recall, prepend=0.0) * envelope).sum())


def sample_curve(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Returns (101,) the best precision at recall >= 0, 0.01, ... 1; 0 beyond the highest recall."""
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return envelope[np.searchsorted(recall, np.linspace(0, 1, 101) - 1e-9)]


def detection_table(
    records: DetectionRecords, class_names: Sequence[str], rules: DetectionRules
) -> list[dict[str, Any]]:
    """Returns a row per class: `class`, `num_objects`, `num_detections`, `AP50` ..., `CorLoc`, `curve`; may be null.

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
    """Returns the means over classes of a `detection_table`; metrics that are null for every class are omitted."""
    metrics = {}
    for key in (*(ap_name(t) for t in rules.thresholds), "CorLoc"):
        values = [row[key] for row in rows if row[key] is not None]
        if values:
            metrics[key] = float(np.mean(values))
    return metrics


def ap_name(threshold: float) -> str:
    """Returns `AP50` for 0.5."""
    return f"AP{100 * threshold:g}"
