"""Areas and overlaps of boxes as arrays, and boxes without a usable area. Boxes are xyxy, right and bottom exclusive.

Metrics and the selection of pseudo ground truth run without torch, in float64; `boxes` has overlaps of tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# With a shorter side, divisions by the area overflow float32. Views shrink boxes, but a box of a whole pixel never
# becomes this small.
LEAST_SIDE = 1e-3


def has_area(boxes: np.ndarray) -> np.ndarray:
    """Returns which of (N, 4) boxes are finite and have an area, (N,) bool."""
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    with np.errstate(invalid="ignore", over="ignore"):
        sides = boxes[:, 2:] - boxes[:, :2]
        return np.all(np.isfinite(boxes), axis=1) & np.all(sides >= LEAST_SIDE, axis=1)


def pairwise_iou(boxes: np.ndarray, others: np.ndarray, *, plus_one: bool = False) -> np.ndarray:
    """Returns the intersection over union of every pair; 0 if both are empty.

    Args:
        boxes: (G, 4) float, xyxy.
        others: (N, 4) float, xyxy.
        plus_one: whether right and bottom are inclusive.

    Returns:
        (G, N) float64.
    """
    boxes, others = as_boxes(boxes), as_boxes(others)
    extra = 1.0 if plus_one else 0.0
    shared = _intersections(boxes, others, extra)
    union = _areas(boxes, extra)[:, None] + _areas(others, extra)[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def containment(boxes: np.ndarray) -> np.ndarray:
    """Returns (N, N) float64: the share of box i's area (row) inside box j (column); 0 for a box without area."""
    boxes = as_boxes(boxes)
    shared, areas = _intersections(boxes, boxes), _areas(boxes)[:, None]
    return np.divide(shared, areas, out=np.zeros_like(shared), where=areas > 0)


def as_boxes(boxes: Any) -> np.ndarray:
    """Returns boxes as (N, 4) float64."""
    return np.asarray(boxes, np.float64).reshape(-1, 4)


def _areas(boxes: np.ndarray, extra: float = 0.0) -> np.ndarray:
    """Returns (N,) float64 areas of boxes whose sides are `extra` longer."""
    return np.clip(boxes[:, 2:] - boxes[:, :2] + extra, 0, None).prod(axis=1)


def _intersections(boxes: np.ndarray, others: np.ndarray, extra: float = 0.0) -> np.ndarray:
    """Returns (G, N) float64 intersections of boxes whose sides are `extra` longer."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low + extra, 0, None).prod(axis=2)
