"""Chooses the images of a report: examples of each split, best and worst by ground truth, most uncertain.

Axis legend: N detections of all images together.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from weaksam.ops.detection_metrics import HIT, MISS, DetectionRecords, DetectionRules, concat_records, match_image

log = logging.getLogger(__name__)

EXAMPLES, BEST, WORST, UNCERTAIN = "examples", "best", "worst", "most uncertain"
GROUPS = (EXAMPLES, BEST, WORST, UNCERTAIN)
_USUAL = 3  # detections shown for an image if there is no ground truth
_RULES = DetectionRules(thresholds=(0.5,))


def examples(images: pa.Table, count: int, among: Sequence[set[str]]) -> list[str]:
    """Returns image ids taken in turn from each split, deterministically; images in most tables come first.

    Args:
        images: image_id, split.
        count: number of image ids.
        among: the image ids of each table that is shown.
    """
    by_split: dict[str, list[str]] = {}
    for row in images.select(["image_id", "split"]).to_pylist():
        by_split.setdefault(row["split"], []).append(row["image_id"])

    def rank(image_id: str) -> tuple[int, str]:
        return -sum(image_id in ids for ids in among), hashlib.sha256(image_id.encode()).hexdigest()

    table_counts = {split: sum(ids[0] in table_ids for table_ids in among) for split, ids in by_split.items()}
    queues = [sorted(by_split[split], key=rank) for split in sorted(by_split, key=lambda s: (-table_counts[s], s))]
    chosen: list[str] = []
    while len(chosen) < count and any(queues):
        chosen += [queue.pop(0) for queue in queues if queue]
    return chosen[:count]


def best_threshold(records: DetectionRecords) -> float:
    """Returns the score threshold with the best F1 at IoU 0.5, all classes together; 0 without any hit."""
    counts = records.outcomes[:, 0] != -1
    order = np.argsort(-records.scores[counts], kind="stable")
    hits = np.cumsum(records.outcomes[counts, 0][order] == HIT)
    if not len(hits) or not hits[-1]:
        return 0.0
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + records.num_objects.sum())
    return float(records.scores[counts][order][int(f1.argmax())])


def usual_threshold(scores: np.ndarray, images: int) -> float:
    """Returns the score threshold that keeps about three detections per image; 0 if there are fewer.

    It replaces `best_threshold` in datasets without ground truth.
    """
    return float(np.sort(scores)[-_USUAL * images]) if 0 < _USUAL * images <= len(scores) else 0.0


def rate_images(
    pairs: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]], num_classes: int
) -> tuple[dict[str, float], float]:
    """Returns the F1 at IoU 0.5 of each image with objects, and the score threshold of its detections.

    Args:
        pairs: by image id, the rows of `ground_truth` and `detections`.
        num_classes: number of classes of the dataset.
    """
    records, faults = {}, []
    for key, (truth, detections) in pairs.items():
        try:
            records[key] = match_image(truth, detections, num_classes, _RULES)
        except ValueError as error:
            faults.append(f"{key}: {error}")
    if faults:
        log.warning("warning: %d of %d images cannot be rated, e.g. %s", len(faults), len(pairs), faults[0])
    if not records:
        return {}, 0.0
    threshold = best_threshold(concat_records(records.values()))
    rated = {}
    for image_id, record in records.items():
        counted = record.outcomes[record.scores >= threshold, 0]
        objects = int(record.num_objects.sum())
        if objects:
            hits = int((counted == HIT).sum())
            rated[image_id] = 2 * hits / (hits + int((counted == MISS).sum()) + objects)
    return rated, threshold


def best_and_worst(rated: Mapping[str, float], count: int) -> tuple[list[str], list[str]]:
    """Returns the image ids with the highest and with the lowest F1; no image is in both lists."""
    order = sorted(rated, key=lambda image_id: (-rated[image_id], image_id))
    half = min(count, len(order) // 2)
    return order[:half], order[::-1][:half]
