"""Detects boxes without a usable area. Boxes are xyxy, right and bottom exclusive."""

from __future__ import annotations

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
