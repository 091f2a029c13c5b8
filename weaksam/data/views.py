"""Views of an image and its objects for training detectors: resized, flipped, cropped or padded.

Axis legend: H W pixels, N objects.
Boxes are xyxy, absolute pixels, float32, right and bottom exclusive.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

FILL = 128  # grey value of padding


class View(NamedTuple):
    """An image (H, W, 3) uint8 with boxes (N, 4) float32 and optional masks (N, H, W) bool."""

    pixels: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]


def view_size(height: int, width: int, short_side: int, max_side: int) -> tuple[int, int]:
    """Returns (height, width) scaled to the shorter side `short_side`, with the longer side at most `max_side`."""
    factor = min(short_side / min(height, width), max_side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize_view(view: View, height: int, width: int) -> View:
    """Resizes a view."""
    old_height, old_width = view.size
    factors = np.array([width / old_width, height / old_height] * 2, np.float32)
    resized = Image.fromarray(view.pixels).resize((width, height), Image.Resampling.BILINEAR)
    masks = None if view.masks is None else _resize_masks(view.masks, height, width)
    return View(np.asarray(resized), view.boxes * factors, masks)


def _resize_masks(masks: np.ndarray, height: int, width: int) -> np.ndarray:
    # not with torch: views are made in threads, and torch starts a thread pool for each of them, which slows down
    # the network
    resized = np.zeros((len(masks), height, width), bool)
    for mask, out in zip(masks, resized, strict=True):
        shares = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BILINEAR)
        np.greater_equal(np.asarray(shares), 128, out=out)
    return resized


def flip_view(view: View) -> View:
    """Mirrors a view horizontally."""
    width, boxes = view.pixels.shape[1], view.boxes
    flipped = boxes.copy()
    flipped[:, 0], flipped[:, 2] = width - boxes[:, 2], width - boxes[:, 0]
    masks = None if view.masks is None else view.masks[:, :, ::-1]
    return View(np.ascontiguousarray(view.pixels[:, ::-1]), flipped, masks)


def crop_view(view: View, top: int, left: int, height: int, width: int) -> tuple[View, np.ndarray]:
    """Crops a view; returns it and which objects are kept, (N,) bool.

    An object is kept if its clipped box is at least one pixel high and wide, and its mask has a pixel left.
    """
    part = view.pixels[top : top + height, left : left + width]
    moved = view.boxes - np.array([left, top, left, top], np.float32)
    moved = moved.clip(0, np.array([part.shape[1], part.shape[0]] * 2, np.float32))
    stays = np.all(moved[:, 2:] - moved[:, :2] >= 1, axis=1)
    masks = view.masks
    if masks is not None:
        masks = masks[:, top : top + height, left : left + width]
        stays &= masks.any((1, 2))
        masks = masks[stays]
    return View(part, moved[stays], masks), stays


def fill_view(view: View, height: int, width: int) -> View:
    """Pads a view with grey at the bottom and right to a size that is not smaller."""
    below, right = height - view.pixels.shape[0], width - view.pixels.shape[1]
    pixels = np.pad(view.pixels, ((0, below), (0, right), (0, 0)), constant_values=FILL)
    masks = None if view.masks is None else np.pad(view.masks, ((0, 0), (0, below), (0, right)))
    return View(pixels, view.boxes, masks)
