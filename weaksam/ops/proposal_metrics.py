"""Recall and average recall of class-agnostic proposals.

Two steps, so the first can run in parallel: `match_row` returns a compact record of an image, and `proposal_metrics`
computes metrics of many records. Classes of proposals are ignored.
An object is recalled at threshold t if a proposal overlaps it with IoU >= t. Objects flagged difficult and crowds do
not count. Objects of an image without proposals, including failed images, do count and are not recalled.
`RecallRules` changes any of this; REFERENCE_RULES are those of the published method's evaluator on VOC.
Axis legend: G objects (ground truth), N proposals of an image, I images, S subsets of the proposals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from weaksam.core.schemas import OK, SOURCES
from weaksam.ops.box_areas import as_boxes, pairwise_iou
from weaksam.ops.checks import check_objects

THRESHOLDS = (0.5, 0.75, 0.9)
AR_THRESHOLDS = tuple(t / 100 for t in range(50, 100, 5))  # COCO's 0.5:0.05:0.95
_SIZE_LIMITS = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}  # COCO's, square pixels
_NO_PROPOSALS: Mapping[str, Any] = {"boxes": [], "source": [], "predicted_iou": []}
ALL = "all"


@dataclass(frozen=True)
class RecallRules:
    """Rules of recall. The defaults are the plain definition of recall.

    Attributes:
        one_to_one: a proposal recalls at most one object; pairs are assigned greedily by descending IoU.
        plus_one: widths and heights are right - left + 1, which is correct for boxes with inclusive corners. Tables
            have exclusive corners.
        truth_offset: pixels added to the coordinates of objects.
        include_difficult: whether objects flagged difficult count.
        include_crowd: whether crowds count.
        include_images_without_proposals: whether the objects of an image without proposals count.
        top_k: additional metrics are computed for these numbers of best-scored proposals.
        sources: names of the values in a row's `source`.
    """

    one_to_one: bool = False
    plus_one: bool = False
    truth_offset: float = 0.0
    include_difficult: bool = False
    include_crowd: bool = False
    include_images_without_proposals: bool = True
    top_k: tuple[int, ...] = (1, 10, 50, 100, 300, 1000)
    sources: tuple[str, ...] = SOURCES


# Its +1 is for inclusive corners, so exclusive corners need no +1. It compares 1-based objects with 0-based proposals,
# which is an offset of one pixel.
REFERENCE_RULES = RecallRules(
    one_to_one=True,
    truth_offset=1.0,
    include_difficult=True,
    include_crowd=True,
    include_images_without_proposals=False,
)


@dataclass(frozen=True)
class RecallRecords:
    """The data of one or more images that recall needs; a few numbers per object."""

    iou: np.ndarray  # (G, S) float64: best IoU with a proposal of each subset, in the order of `subset_names`
    areas: np.ndarray  # (G,) float64, square pixels
    classes: np.ndarray  # (G,) int32
    num_proposals: np.ndarray  # (I, 1 + number of sources) int64: all, then by source

    @property
    def num_images(self) -> int:
        return len(self.num_proposals)

    @property
    def num_objects(self) -> int:
        return len(self.areas)


def subset_names(rules: RecallRules) -> list[str]:
    """Returns S names: `all`, `top10` ..., each source, and cumulative sources (`grid+coarse` ...)."""
    sums = ["+".join(rules.sources[:k]) for k in range(2, len(rules.sources))]
    return [ALL, *(f"top{k}" for k in rules.top_k), *rules.sources, *sums]


def match_row(truth: Mapping[str, Any], proposals: Mapping[str, Any] | None, rules: RecallRules) -> RecallRecords:
    """Returns the record of an image from its rows in the tables `ground_truth` and `proposals`.

    Args:
        truth: `boxes`, `classes`, `difficult`, `crowd`; optionally `areas`, (G,) square pixels, for size classes by the
            area of masks. Lists or arrays.
        proposals: `status`, `boxes`, `source`, and `predicted_iou` as the score. None: no row.
        rules: rules of recall.
    """
    keep = np.ones(len(truth["boxes"]), bool)
    if not rules.include_difficult:
        keep &= ~np.asarray(truth["difficult"], bool)
    if not rules.include_crowd:
        keep &= ~np.asarray(truth["crowd"], bool)
    boxes = as_boxes(truth["boxes"])
    areas = truth.get("areas")
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) if areas is None else np.asarray(areas, np.float64)
    usable = proposals if proposals is not None and proposals["status"] == OK else _NO_PROPOSALS
    proposal_boxes = as_boxes(usable["boxes"])
    sources, scores = np.asarray(usable["source"], np.int64), np.asarray(usable["predicted_iou"], np.float64)
    if not len(proposal_boxes) and not rules.include_images_without_proposals:
        keep[:] = False
    counts = np.bincount(sources, minlength=len(rules.sources))
    if not len(proposal_boxes) == len(sources) == len(scores) or len(counts) > len(rules.sources):
        raise ValueError(
            f"proposals must have one score and one source below {len(rules.sources)} each, got {len(proposal_boxes)} "
            f"boxes, {len(scores)} scores, {len(sources)} sources up to {sources.max(initial=0)}"
        )
    check_objects({"boxes": truth["boxes"], "classes": truth["classes"]}, "objects")
    check_objects({"boxes": proposal_boxes, "scores": scores}, "proposals")
    return RecallRecords(
        iou=match_proposals(boxes[keep], proposal_boxes, scores, sources, rules=rules),
        areas=areas[keep],
        classes=np.asarray(truth["classes"], np.int32)[keep],
        num_proposals=np.array([[len(proposal_boxes), *counts]], np.int64),
    )


def match_proposals(
    truth: np.ndarray, proposals: np.ndarray, scores: np.ndarray, sources: np.ndarray, *, rules: RecallRules
) -> np.ndarray:
    """Returns the best IoU of each object with each subset of the proposals of an image.

    Args:
        truth: (G, 4) float, xyxy; all objects count.
        proposals: (N, 4) float, xyxy.
        scores: (N,) float; higher is better, ties keep their order.
        sources: (N,) int, index into `rules.sources`.
        rules: rules of recall.

    Returns:
        (G, S) float64, IoU with the best proposal of each of `subset_names(rules)`, 0 for an empty subset.
    """
    order = np.argsort(-scores, kind="stable")
    iou = pairwise_iou(truth + rules.truth_offset, proposals[order], plus_one=rules.plus_one)
    ranked = sources[order]
    parts = [iou, *(iou[:, :k] for k in rules.top_k)]
    parts += [iou[:, ranked == s] for s in range(len(rules.sources))]
    parts += [iou[:, ranked < k] for k in range(2, len(rules.sources))]
    if rules.one_to_one:
        columns = [_assigned_iou(part) for part in parts]
    else:
        columns = [part.max(axis=1, initial=0.0) for part in parts]
    return np.stack(columns, axis=1)


def _assigned_iou(iou: np.ndarray) -> np.ndarray:
    """Returns (G,) IoU of each object with its proposal, assigned greedily by descending IoU, each member once."""
    left = iou.copy()
    assigned = np.zeros(len(iou))
    for _ in range(min(iou.shape)):
        row, column = np.unravel_index(left.argmax(), left.shape)
        assigned[row] = max(left[row, column], 0.0)
        left[row], left[:, column] = -1.0, -1.0
    return assigned


def concat_records(records: Iterable[RecallRecords]) -> RecallRecords:
    """Concatenates records; raises ValueError without any."""
    parts = list(records)
    if not parts:
        raise ValueError("records must hold one record at least, got none")
    return RecallRecords(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(RecallRecords)})


def recall_of(best_iou: np.ndarray, thresholds: Sequence[float]) -> list[float]:
    """Returns the fraction of objects whose best IoU (G,) reaches each threshold; G must not be 0."""
    return [float((best_iou >= t).mean()) for t in thresholds]


def proposal_metrics(
    records: RecallRecords, rules: RecallRules, *, thresholds: Sequence[float] = THRESHOLDS
) -> dict[str, float]:
    """Returns all metrics of a set of proposals, as fractions of objects; boxes per image are counts.

    Names: `recall@0.5`, `AR` (mean over 0.5:0.05:0.95) and `AR@100` (for the 100 best-scored proposals of an image);
    `recall@0.5_top100`; with `_small`, `_medium`, `_large` by size of objects; with `_grid` for the proposals of a
    single source, with `_grid+coarse` for several; `boxes_per_image`, `boxes_per_image_median`,
    `boxes_per_image_grid`. Metrics without objects, or of a source without boxes, are omitted.
    """
    metrics: dict[str, float] = {}
    totals = records.num_proposals.sum(axis=0)
    used = {name for name, total in zip(rules.sources, totals[1:], strict=True) if total}
    if records.num_images:
        metrics["boxes_per_image"] = float(records.num_proposals[:, 0].mean())
        metrics["boxes_per_image_median"] = float(np.median(records.num_proposals[:, 0]))
        for name, total in zip(rules.sources, totals[1:], strict=True):
            metrics |= {f"boxes_per_image_{name}": float(total / records.num_images)} if name in used else {}
    if not records.num_objects:
        return metrics
    for column, name in enumerate(subset_names(rules)):
        # Cumulative sources differ from the previous ones only if the last source has boxes.
        if (name in rules.sources or "+" in name) and name.rpartition("+")[2] not in used:
            continue
        metrics |= _figures(records.iou[:, column], thresholds, name)
    for name, (low, high) in _SIZE_LIMITS.items():
        chosen = (records.areas >= low) & (records.areas < high)
        if chosen.any():
            metrics |= _figures(records.iou[chosen, 0], thresholds, name)
    return metrics


def _figures(best_iou: np.ndarray, thresholds: Sequence[float], name: str) -> dict[str, float]:
    suffix = "" if name == ALL else f"_{name}"
    average = f"AR@{name[3:]}" if name.startswith("top") else f"AR{suffix}"
    figures = {f"recall@{t:g}{suffix}": r for t, r in zip(thresholds, recall_of(best_iou, thresholds), strict=True)}
    return figures | {average: float(np.mean(recall_of(best_iou, AR_THRESHOLDS)))}


def recall_by_class(
    records: RecallRecords, class_names: Sequence[str], *, thresholds: Sequence[float] = THRESHOLDS
) -> list[dict[str, Any]]:
    """Returns a row per class that occurs: `class`, `num_objects`, `recall@...` and `AR`, for all proposals."""
    rows = []
    present = np.unique(records.classes)
    if len(present) and not 0 <= present[0] <= present[-1] < len(class_names):
        raise ValueError(f"objects: classes {present[0]} to {present[-1]} are not all of 0 to {len(class_names) - 1}")
    for index in present:
        best_iou = records.iou[records.classes == index, 0]
        figures = _figures(best_iou, thresholds, ALL)
        rows.append({"class": class_names[index], "num_objects": len(best_iou)} | figures)
    return rows
