"""Quality of pseudo ground truth, measured before an expensive training: precision and recall of its boxes.

A box is correct if it hits an object as in VOC's AP (`detection_metrics`); every box counts, whatever its score,
because a detector is trained on all boxes with equal weight. Overall metrics are over all boxes, not means of classes:
the share of wrong training boxes, and the share of objects that are trained as background.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weaksam.ops.detection_metrics import HIT, MISS, DetectionRecords, DetectionRules


def pgt_table(records: DetectionRecords, class_names: Sequence[str], rules: DetectionRules) -> list[dict[str, Any]]:
    """Returns a row per class: `class`, `num_objects`, `num_boxes`, `precision@0.5`, `recall@0.5` ...; may be null."""
    return [
        {"class": name} | _figures(records, records.classes == label, int(records.num_objects[label]), rules)
        for label, name in enumerate(class_names)
    ]


def pgt_metrics(records: DetectionRecords, rules: DetectionRules) -> dict[str, float]:
    """Returns `precision@0.5`, `recall@0.5` ... of all boxes, and `boxes_per_image`; undefined metrics are omitted."""
    figures = _figures(records, slice(None), int(records.num_objects.sum()), rules)
    boxes = figures.pop("num_boxes")
    figures["num_objects"] = None
    return {key: value for key, value in figures.items() if value is not None} | {
        "boxes_per_image": boxes / max(int(records.num_images), 1)
    }


def _figures(records: DetectionRecords, selection: Any, num_objects: int, rules: DetectionRules) -> dict[str, Any]:
    outcomes = records.outcomes[selection]
    figures: dict[str, Any] = {"num_objects": num_objects, "num_boxes": len(outcomes)}
    for column, threshold in enumerate(rules.thresholds):
        hits, misses = ((outcomes[:, column] == what).sum() for what in (HIT, MISS))
        figures[f"precision@{threshold:g}"] = float(hits / (hits + misses)) if hits + misses else None
        figures[f"recall@{threshold:g}"] = float(hits / num_objects) if num_objects else None
    return figures
