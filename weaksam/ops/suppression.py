"""Greedy suppression of boxes that overlap a better box.

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
    """Returns the indices of boxes whose IoU with every better kept box is at most `threshold`, by descending score.

    Args:
        boxes: (N, 4) float, xyxy.
        scores: (N,) float.
        threshold: a box is removed if its IoU with a kept box exceeds this.

    Returns:
        (K,) int64.
    """
    return batched_nms(boxes.float(), scores, torch.zeros_like(scores, dtype=torch.int64), threshold)


def nms_of_mask_boxes(boxes: Tensor, scores: Tensor, *, threshold: float) -> Tensor:
    """Runs `nms` with the IoU of SamAutomaticMaskGenerator, so the same masks are kept.

    SAM measures a mask's box from its first to its last pixel, one pixel less than our exclusive boxes, and computes
    the IoU of those. The difference matters for small masks: a box one pixel wide has area 0 and is never removed.

    Args:
        boxes: (N, 4) float, xyxy, whole pixels, right and bottom exclusive.
        scores: (N,) float.
        threshold: a box is removed if its IoU with a kept box exceeds this.

    Returns:
        (K,) int64, by descending score.
    """
    return nms(to_inclusive(boxes), scores, threshold=threshold)


def suppress_in_order(boxes: Tensor, *, threshold: float) -> Tensor:
    """Returns the indices of boxes whose IoU with every earlier kept box is at most `threshold`, in input order.

    WeakSAM uses it, with threshold 0.9, for proposals of peaks, which have no score.

    Args:
        boxes: (N, 4) float, xyxy.
        threshold: a box is removed if its IoU with an earlier kept box exceeds this.

    Returns:
        (K,) int64, ascending.
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
