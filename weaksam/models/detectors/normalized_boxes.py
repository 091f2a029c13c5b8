"""Converts between xyxy boxes in pixels and the normalised cxcywh boxes of detectors with queries.

Axis legend: B images, Q queries, C classes, G objects of an image, K detections of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image

from weaksam.models.detectors.base import Detections, Targets


def to_relative(targets: Targets, size: tuple[int, int]) -> Targets:
    """Converts xyxy boxes in pixels to cxcywh boxes normalised by the image size (height, width)."""
    height, width = size
    boxes = targets.boxes.float() / targets.boxes.new_tensor([width, height, width, height])
    return Targets(box_convert(boxes, "xyxy", "cxcywh"), targets.classes)


def best_detections(logits: Tensor, boxes: Tensor, sizes: Sequence[tuple[int, int]], limit: int) -> list[Detections]:
    """Returns the best pairs of query and class of each image, without NMS; a query may have several classes.

    Args:
        logits: (B, Q, C), for a sigmoid.
        boxes: (B, Q, 4) normalised cxcywh.
        sizes: (height, width) of each image, pixels.
        limit: maximum K.
    """
    num_classes = logits.shape[2]
    scores, order = logits.float().sigmoid().flatten(1).topk(min(limit, logits[0].numel()), dim=1)
    corners = box_convert(boxes.float(), "cxcywh", "xyxy")
    detections = []
    for i, (height, width) in enumerate(sizes):
        pixels = corners[i, order[i] // num_classes] * corners.new_tensor([width, height, width, height])
        detections.append(Detections(clip_boxes_to_image(pixels, (height, width)), order[i] % num_classes, scores[i]))
    return detections


def take(values: Tensor, rows: Tensor) -> Tensor:
    """Gathers rows (B, Q) int64 of values (B, S, D) per image: (B, Q, D)."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))


def inverse_sigmoid(shares: Tensor, eps: float = 1e-3) -> Tensor:
    """Returns logits of shares; a share and its complement are each clamped to at least `eps`, as in DINO.

    In float32: half-precision sigmoids are 1 from a logit of 7 on.
    """
    shares = shares.float().clamp(0, 1)
    return (shares.clamp(min=eps) / (1 - shares).clamp(min=eps)).log()
