"""Between boxes in pixels and what detectors with queries speak of: cxcywh boxes in sizes of the image.

Axis legend: B images, Q queries, C classes, G objects of an image, K detections of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torchvision.ops import box_convert

from weaksam.models.detectors.base import Detections, Targets
from weaksam.ops.boxes import clip_boxes


def to_relative(targets: Targets, size: tuple[int, int]) -> Targets:
    """Objects with cxcywh boxes in sizes of the image (height, width) of those with xyxy boxes in its pixels."""
    height, width = size
    boxes = targets.boxes.float() / targets.boxes.new_tensor([width, height, width, height])
    return Targets(box_convert(boxes, "xyxy", "cxcywh"), targets.classes)


def best_detections(logits: Tensor, boxes: Tensor, sizes: Sequence[tuple[int, int]], limit: int) -> list[Detections]:
    """The best pairs of query and class of each image; nothing is suppressed, a query may be found as several classes.

    Args:
        logits: (B, Q, C) of the sigmoid.
        boxes: (B, Q, 4) cxcywh, in sizes of the image.
        sizes: (height, width) of each image, pixels.
        limit: K is at most this.
    """
    num_classes = logits.shape[2]
    scores, order = logits.float().sigmoid().flatten(1).topk(min(limit, logits[0].numel()), dim=1)
    corners = box_convert(boxes.float(), "cxcywh", "xyxy")
    detections = []
    for i, (height, width) in enumerate(sizes):
        pixels = corners[i, order[i] // num_classes] * corners.new_tensor([width, height, width, height])
        detections.append(Detections(clip_boxes(pixels, height, width), order[i] % num_classes, scores[i]))
    return detections


def take(values: Tensor, rows: Tensor) -> Tensor:
    """(B, Q, D) of values (B, S, D): of each image the rows (B, Q) int64."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))


def inverse_sigmoid(shares: Tensor, eps: float = 1e-3) -> Tensor:
    """Logits of shares, of which neither a share nor its rest counts as less than `eps`, each on its own, as in DINO.

    In float32: sigmoids of half precision are 1 from a logit of 7 on.
    """
    shares = shares.float().clamp(0, 1)
    return (shares.clamp(min=eps) / (1 - shares).clamp(min=eps)).log()
