"""Greedy suppression of boxes that overlap a better one.

Axis legend: N boxes.
Boxes are xyxy, absolute pixels, float32, right and bottom exclusive.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from weaksam.ops.boxes import box_iou, to_inclusive

# Rows of the overlap matrix computed at once by suppress_in_order: bounds its memory to 1024 x N floats.
_BLOCK = 1024


def nms(boxes: Tensor, scores: Tensor, *, threshold: float) -> Tensor:
    """Indices of the boxes that no better kept box overlaps by more than `threshold`, by falling score.

    Args:
        boxes: (N, 4) float, xyxy.
        scores: (N,) float.
        threshold: a box goes when its IoU with a kept box is above this.

    Returns:
        (K,) int64.
    """
    return batched_nms(boxes.float(), scores, torch.zeros_like(scores, dtype=torch.int64), threshold)


def nms_of_mask_boxes(boxes: Tensor, scores: Tensor, *, threshold: float) -> Tensor:
    """`nms` with the overlap that SamAutomaticMaskGenerator computes, so the same masks survive.

    SAM measures a mask's box from its first to its last pixel, one pixel less than our exclusive boxes, and takes
    IoU of that. The difference matters for small masks: a box one pixel wide has area 0 there and is never dropped.

    Args:
        boxes: (N, 4) float, xyxy, whole pixels, right and bottom exclusive.
        scores: (N,) float.
        threshold: a box goes when its IoU with a kept box is above this.

    Returns:
        (K,) int64, by falling score.
    """
    return nms(to_inclusive(boxes), scores, threshold=threshold)


def suppress_in_order(boxes: Tensor, *, threshold: float) -> Tensor:
    """Indices of the boxes that no earlier kept box overlaps by more than `threshold`, in the given order.

    The WeakSAM post-suppression of peak proposals, which have no score (threshold 0.9 there).

    Args:
        boxes: (N, 4) float, xyxy.
        threshold: a box goes when its IoU with an earlier kept box is above this.

    Returns:
        (K,) int64, rising.
    """
    num_boxes = len(boxes)
    keep = torch.ones(num_boxes, dtype=torch.bool)
    for start in range(0, num_boxes, _BLOCK):
        block = slice(start, min(start + _BLOCK, num_boxes))
        overlaps = (box_iou(boxes[block], boxes) > threshold).cpu()
        for row, index in enumerate(range(block.start, block.stop)):
            if keep[index]:
                keep[index + 1 :] &= ~overlaps[row, index + 1 :]
    return keep.nonzero().flatten().to(boxes.device)
