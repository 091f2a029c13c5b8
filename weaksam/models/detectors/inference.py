"""Inference of a detector on several views of an image, and selection of detections.

A weakly supervised detector has the same proposals in every view, so their scores and boxes are averaged. Other
detectors have different boxes in each view, which are merged and suppressed.

Axis legend: N proposals, C classes, K detections, H W pixels.
Boxes are xyxy, absolute pixels of the original image, right and bottom exclusive.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms

from weaksam.data.views import view_size
from weaksam.models.detectors.base import Detections, Detector
from weaksam.models.detectors.rules import InferenceRules
from weaksam.models.wsod.network import WsodNet
from weaksam.ops.boxes import mirror_boxes, to_inclusive


@torch.no_grad()
def detect_objects(net: WsodNet, image: Tensor, boxes: Tensor, rules: InferenceRules) -> Detections:
    """Returns the detections among proposals on an image.

    Scores and boxes are means over the views, as published: every view has the same proposals.

    Args:
        net: in eval mode.
        image: (3, H, W) uint8 RGB, on the device of `net`.
        boxes: (N, 4) float32, on the same device.
        rules: views and thresholds.
    """
    if not len(boxes):
        return Detections(boxes, torch.zeros(0, dtype=torch.int64), boxes.new_zeros(0))
    views = [
        _detect_view(net, image, boxes, scale, rules.max_side, is_mirrored) for scale, is_mirrored in _views(rules)
    ]
    scores = torch.stack([view_scores for view_scores, _ in views]).mean(0)
    return select_detections(scores, torch.stack([moved for _, moved in views]).mean(0), rules)


@torch.no_grad()
def detect_in_views(net: Detector, image: Tensor, rules: InferenceRules) -> Detections:
    """Returns the detections of a detector without proposals, with masks if it has them.

    The boxes of a single view are used unchanged; those of several views are suppressed per class.

    Args:
        net: in eval mode; its own thresholds apply before those of `rules`.
        image: (3, H, W) uint8 RGB, on the device of `net`.
        rules: views and thresholds.
    """
    height, width = image.shape[1:]
    views = []
    for scale, is_mirrored in _views(rules):
        hw = view_size(height, width, scale, rules.max_side)
        detections = net.detect([_view(image, hw, is_mirrored)], [(height, width)])[0]
        boxes = mirror_boxes(detections.boxes, hw[1]) if is_mirrored else detections.boxes
        masks = detections.masks.flip(2) if is_mirrored and detections.masks is not None else detections.masks
        views.append(
            detections._replace(boxes=boxes / boxes.new_tensor([hw[1] / width, hw[0] / height] * 2), masks=masks)
        )
    boxes, classes, scores = (torch.cat(parts) for parts in zip(*(view[:3] for view in views), strict=True))
    view_masks = [view.masks for view in views if view.masks is not None]
    masks = torch.cat(view_masks) if view_masks else None
    keep = scores.argsort(descending=True, stable=True)
    if len(views) > 1:
        keep = batched_nms(boxes.float(), scores, classes, rules.nms_threshold)
    keep = keep[scores[keep] > rules.score_threshold][: rules.max_detections]
    return Detections(boxes[keep], classes[keep], scores[keep], None if masks is None else masks[keep])


def _views(rules: InferenceRules) -> list[tuple[int, bool]]:
    return [
        (scale, is_mirrored) for scale in rules.scales for is_mirrored in ((False, True) if rules.flip else (False,))
    ]


def _detect_view(
    net: WsodNet, image: Tensor, boxes: Tensor, scale: int, max_side: int, is_mirrored: bool
) -> tuple[Tensor, Tensor]:
    """Returns scores (N, C) and boxes (N, C, 4) on one view, the boxes in the frame of the image."""
    height, width = image.shape[1:]
    hw = view_size(height, width, scale, max_side)
    factors = boxes.new_tensor([hw[1] / width, hw[0] / height] * 2)
    rois = boxes * factors
    scores, moved = net.detect(_view(image, hw, is_mirrored), mirror_boxes(rois, hw[1]) if is_mirrored else rois)
    return scores, (mirror_boxes(moved, hw[1]) if is_mirrored else moved) / factors


def _view(image: Tensor, hw: tuple[int, int], is_mirrored: bool) -> Tensor:
    """Resizes an image (3, H, W) uint8 to (3, *hw) float in 0..255."""
    view = F.interpolate(image[None].float(), hw, mode="bilinear", antialias=True, align_corners=False)[0]
    return view.flip(2) if is_mirrored else view


def select_detections(scores: Tensor, boxes: Tensor, rules: InferenceRules) -> Detections:
    """Selects detections by threshold, NMS in each class, and the maximum number.

    Overlaps are computed from first to last pixel, as in the published detectors, whose boxes are inclusive and are not
    widened by 1 for the overlap.

    Args:
        scores: (N, C) float.
        boxes: (N, C, 4) float, xyxy.
        rules: thresholds.
    """
    rows, classes = (scores > rules.score_threshold).nonzero(as_tuple=True)
    chosen, values = boxes[rows, classes], scores[rows, classes]
    keep = batched_nms(to_inclusive(chosen.float()), values, classes, rules.nms_threshold)[: rules.max_detections]
    return Detections(chosen[keep], classes[keep], values[keep])
