"""An image and boxes on it at another size, in a mirror, or cut: what detectors are trained on and tested with.

Axis legend: H W pixels, N boxes.
Boxes are xyxy, absolute pixels, float32, right and bottom exclusive.
"""

from __future__ import annotations

import numpy as np
from PIL import Image


def view_size(height: int, width: int, short_side: int, max_side: int) -> tuple[int, int]:
    """(height, width) of a view whose shorter side is `short_side`, unless its longer one would exceed `max_side`."""
    factor = min(short_side / min(height, width), max_side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize_view(pixels: np.ndarray, boxes: np.ndarray, short_side: int, max_side: int) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) uint8 and boxes (N, 4) on it, at another size."""
    old_height, old_width = pixels.shape[:2]
    height, width = view_size(old_height, old_width, short_side, max_side)
    factors = np.array([width / old_width, height / old_height] * 2, np.float32)
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized), boxes * factors


def flip_view(pixels: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same in a mirror."""
    width = pixels.shape[1]
    flipped = boxes.copy()
    flipped[:, 0], flipped[:, 2] = width - boxes[:, 2], width - boxes[:, 0]
    return pixels[:, ::-1], flipped


def crop_view(
    pixels: np.ndarray, boxes: np.ndarray, top: int, left: int, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A part of an image (H, W, 3), what is left of boxes (N, 4) in it, and which of them that is, (N,) bool.

    A box stays when at least a pixel of each side does.
    """
    part = pixels[top : top + height, left : left + width]
    moved = boxes - np.array([left, top, left, top], np.float32)
    moved = moved.clip(0, np.array([part.shape[1], part.shape[0]] * 2, np.float32))
    stays = np.all(moved[:, 2:] - moved[:, :2] >= 1, axis=1)
    return part, moved[stays], stays
