"""Results of the engine.

Axis legend: N proposals, M boxes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Proposals:
    """Proposals of one image, best predicted IoU first.

    Attributes:
        boxes: (N, 4) float32 xyxy pixels, right and bottom exclusive.
        predicted_iou: (N,) float32.
        stability: (N,) float32; NaN only when it is not filtered by.
        source: (N,) uint8 source of the proposal's prompt.
        masks: N COCO compressed counts, or None when not requested.
    """

    boxes: np.ndarray
    predicted_iou: np.ndarray
    stability: np.ndarray
    source: np.ndarray
    masks: list[bytes] | None


@dataclass(frozen=True)
class BoxMasks:
    """Masks of boxes.

    Attributes:
        masks: per box and slot, COCO compressed counts.
        predicted_iou: (boxes, slots) float32.
    """

    masks: list[list[bytes]]
    predicted_iou: np.ndarray
