"""Losses of detectors whose queries are matched one to one with objects, and of noisy queries.

All losses are sums over images and queries; the caller divides.
Axis legend: B images, Q queries, C classes, M matched pairs of all images, N noisy queries.
Boxes are normalised cxcywh.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher

from weaksam.models.detectors.base import Targets
from weaksam.models.detectors.dino_denoising import FILLER, Noised
from weaksam.ops.roi_drop import RoiDropRules, select_drops

BOX_WEIGHT, GIOU_WEIGHT = 5.0, 2.0
_matcher = DeformableDetrHungarianMatcher(class_cost=2.0, bbox_cost=5.0, giou_cost=2.0)


class Matched(NamedTuple):
    """Pairs of query and object: image (M,), query (M,), class (M,) int64 and box (M, 4) of the object."""

    image: Tensor
    query: Tensor
    classes: Tensor
    boxes: Tensor


class SetLosses(NamedTuple):
    """Weighted sums of class losses, of box L1 and of box GIoU losses, and numbers of dropped terms."""

    classes: Tensor
    boxes: Tensor
    giou: Tensor
    dropped_classes: Tensor
    dropped_boxes: Tensor

    @property
    def total(self) -> Tensor:
        return self.classes + self.boxes + self.giou


def match(logits: Tensor, boxes: Tensor, targets: Sequence[Targets]) -> Matched:
    """Matches logits (B, Q, C) and boxes (B, Q, 4) with objects at minimum cost, image by image."""
    labels = [{"class_labels": image_targets.classes, "boxes": image_targets.boxes} for image_targets in targets]
    pairs = _matcher({"logits": logits.detach(), "pred_boxes": boxes.detach()}, labels)
    device = logits.device
    image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(pairs)]).to(device)
    query = torch.cat([query for query, _ in pairs]).to(device)
    chosen = [place.to(device) for _, place in pairs]
    classes = torch.cat([image_targets.classes[place] for image_targets, place in zip(targets, chosen, strict=True)])
    return Matched(image, query, classes, torch.cat([t.boxes[p] for t, p in zip(targets, chosen, strict=True)]))


def focal_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns focal losses (...,) of logits (..., C), summed over classes, with alpha 0.25 and gamma 2.

    Labels (...,) are int64, -1 = background.
    """
    class_targets = F.one_hot(labels.clamp(min=0), logits.shape[-1]) * (labels >= 0)[..., None]
    return sigmoid_focal_loss(logits, class_targets.to(logits.dtype), alpha=0.25, gamma=2.0).sum(-1)


def box_losses(boxes: Tensor, target_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (M,) L1, summed over the four coordinates, and (M,) 1 - GIoU of pairs of boxes (M, 4)."""
    giou = generalized_box_iou_loss(box_convert(boxes, "cxcywh", "xyxy"), box_convert(target_boxes, "cxcywh", "xyxy"))
    return (boxes - target_boxes).abs().sum(-1), giou


def matched_losses(
    logits: Tensor, boxes: Tensor, targets: Sequence[Targets], rules: RoiDropRules, step: int
) -> SetLosses:
    """Returns the losses of one layer of queries, logits (B, Q, C), boxes (B, Q, 4), without terms `rules` drop."""
    pairs = match(logits, boxes, targets)
    labels = torch.full(logits.shape[:2], -1, device=logits.device)
    labels[pairs.image, pairs.query] = pairs.classes
    focal = focal_losses(logits, labels)
    l1, giou = box_losses(boxes[pairs.image, pairs.query], pairs.boxes)
    own = focal[pairs.image, pairs.query].detach()
    drop_cls, drop_box = select_drops(own, l1.detach(), torch.ones_like(own, dtype=torch.bool), rules, step)
    is_kept = torch.ones_like(focal, dtype=torch.bool)
    is_kept[pairs.image, pairs.query] = ~drop_cls
    return SetLosses(
        (focal * is_kept).sum(),
        BOX_WEIGHT * (l1 * ~drop_box).sum(),
        GIOU_WEIGHT * (giou * ~drop_box).sum(),
        drop_cls.sum(),
        drop_box.sum(),
    )


def denoising_loss(logits: Tensor, boxes: Tensor, noised: Noised, targets: Sequence[Targets]) -> Tensor:
    """Returns the loss of one layer of noisy queries, logits (B, N, C), boxes (B, N, 4), as the mean over groups."""
    image, query = torch.nonzero(noised.objects >= 0, as_tuple=True)
    first = torch.tensor([0, *(len(t.classes) for t in targets)], device=logits.device).cumsum(0)
    place = first[image] + noised.objects[image, query]
    labels = torch.full(logits.shape[:2], -1, device=logits.device)
    labels[image, query] = torch.cat([image_targets.classes for image_targets in targets])[place]
    focal = focal_losses(logits, labels) * (noised.groups != FILLER)
    l1, giou = box_losses(boxes[image, query], torch.cat([image_targets.boxes for image_targets in targets])[place])
    share = 1 / noised.num_groups
    return (focal.sum(1) * share).sum() + ((BOX_WEIGHT * l1 + GIOU_WEIGHT * giou) * share[image]).sum()
