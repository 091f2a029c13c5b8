"""Operations on boxes as tensors that torchvision.ops lacks.

Axis legend: N, M boxes.
Boxes are xyxy, absolute pixels, float32, right and bottom exclusive unless a function says otherwise.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Returns the intersection over union of every pair of boxes: torchvision's, with areas from 0 on.

    A box with right < left or bottom < top, as `to_inclusive` makes of a box narrower than a pixel, has no area; a pair
    of boxes without area has IoU 0. torchvision's function has negative areas and NaN for them.

    Args:
        boxes: (N, 4) float, xyxy.
        others: (M, 4) float, xyxy.

    Returns:
        (N, M) in [0, 1], on the same device.
    """
    return torchvision.ops.box_iou(_not_inverted(boxes), _not_inverted(others)).nan_to_num(0.0)


def _not_inverted(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[:, :2], torch.maximum(boxes[:, :2], boxes[:, 2:])], 1)


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
