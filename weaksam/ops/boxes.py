"""Operations on boxes as tensors: areas, overlaps, clipping.

Axis legend: N, M boxes.
Boxes are xyxy, absolute pixels, float32, right and bottom exclusive unless a function says otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def box_areas(boxes: Tensor) -> Tensor:
    """Returns the areas of boxes in square pixels; 0 for a box with right < left or bottom < top.

    Args:
        boxes: (N, 4) float, xyxy.

    Returns:
        (N,) of the same dtype and device.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
    return sides[:, 0] * sides[:, 1]


def box_intersections(boxes: Tensor, others: Tensor) -> Tensor:
    """Returns the intersection of every pair of boxes, in square pixels.

    Args:
        boxes: (N, 4) float, xyxy.
        others: (M, 4) float, xyxy.

    Returns:
        (N, M) of the same dtype and device.
    """
    top_left = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    bottom_right = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    sides = (bottom_right - top_left).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Returns the intersection over union of every pair of boxes.

    A pair of empty boxes has IoU 0, not NaN.

    Args:
        boxes: (N, 4) float, xyxy.
        others: (M, 4) float, xyxy.

    Returns:
        (N, M) in [0, 1], same dtype and device.
    """
    shared = box_intersections(boxes, others)
    union = box_areas(boxes)[:, None] + box_areas(others)[None, :] - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(shared))


def clip_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Clips boxes to an image of (height, width) pixels. A box outside the image gets area 0.

    Args:
        boxes: (N, 4) float, xyxy.

    Returns:
        (N, 4), a copy.
    """
    limits = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limits)


def enlarge_boxes(boxes: Tensor, margin: float) -> Tensor:
    """Enlarges (N, 4) boxes by a share of their size on each side."""
    extra = margin * (boxes[:, 2:] - boxes[:, :2])
    return torch.cat([boxes[:, :2] - extra, boxes[:, 2:] + extra], 1)


def mirror_boxes(boxes: Tensor, width: int) -> Tensor:
    """Mirrors (..., 4) boxes horizontally; the image is `width` pixels wide."""
    return torch.stack([width - boxes[..., 2], boxes[..., 1], width - boxes[..., 0], boxes[..., 3]], -1)


def to_inclusive(boxes: Tensor) -> Tensor:
    """Converts boxes to inclusive right and bottom, the last pixel inside; (0, 0, 0, 0) is unchanged.

    Args:
        boxes: (N, 4) float, xyxy, right and bottom exclusive, whole pixels.

    Returns:
        (N, 4), a copy.
    """
    return (boxes - boxes.new_tensor([0, 0, 1, 1])).clamp(min=0)
