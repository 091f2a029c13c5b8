"""Which boxes have an area that can be counted with. Boxes are xyxy, right and bottom exclusive."""

from __future__ import annotations

import numpy as np

# A box with a shorter side has no area that float32 can count with: what is divided by it overflows. Views make boxes
# smaller, but none of a whole pixel this small.
LEAST_SIDE = 1e-3


def has_area(boxes: np.ndarray) -> np.ndarray:
    """(N,) bool, which of (N, 4) boxes are finite and have an area."""
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    with np.errstate(invalid="ignore", over="ignore"):
        sides = boxes[:, 2:] - boxes[:, :2]
        return np.all(np.isfinite(boxes), axis=1) & np.all(sides >= LEAST_SIDE, axis=1)
