"""Losses of queries that are matched one to one with objects by class and mask.

Matching and mask losses are transformers'.
Axis legend: B images, Q queries, C classes, G objects of an image, H W pixels, h w cells of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from weaksam.models.detectors.base import Targets
from weaksam.models.noise import drawn_from


class SetLosses(NamedTuple):
    """Weighted sums over images of class losses, mask cross-entropies and mask dice losses."""

    classes: Tensor
    masks: Tensor
    dice: Tensor

    @property
    def total(self) -> Tensor:
        return self.classes + self.masks + self.dice


def matched_losses(
    logits: Tensor,
    masks: Tensor,
    targets: Sequence[Targets],
    generators: Sequence[torch.Generator],
    config: Mask2FormerConfig,
    masks_per_image: float,
) -> SetLosses:
    """Returns the losses of one layer of queries.

    Differs from the published code, so that neither batch size nor number of workers changes a step: the published
    divisors are the batch's, averaged over GPUs; here they are the average of one image. The published code divides
    mask losses by the number of masks of the batch, this function by `masks_per_image` m. The published class loss is a
    mean over all queries, in which an unmatched query has weight w = 0.1; here an image's weighted sum is divided by
    m + w (Q - m). Over many images both means are equal; where every image has m objects, they are equal in each batch.

    Args:
        logits: (B, Q, C + 1) float32; the last class is "no object".
        masks: (B, Q, h, w) float32, logits of the image with its padding.
        targets: B, with masks (G, H, W) float32 of the image with its padding.
        generators: B, for the sampled points of masks.
        config: loss weights, and the number of sampled points.
        masks_per_image: m, above 0.
    """
    criterion: Any = Mask2FormerLoss(config, {})
    none, weight = logits.shape[2] - 1, config.no_object_weight
    labels, by_image = torch.full(logits.shape[:2], none, device=logits.device), []
    for i, (image_targets, generator) in enumerate(zip(targets, generators, strict=True)):
        own, known = slice(i, i + 1), [image_targets.masks]
        with drawn_from(generator):
            pairs = criterion.matcher(masks[own].detach(), logits[own].detach(), known, [image_targets.classes])
            by_image.append(criterion.loss_masks(masks[own], known, pairs, masks_per_image))
        ((query, place),) = pairs
        labels[i, query.to(labels.device)] = image_targets.classes[place.to(labels.device)]
    entropies = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    weights = torch.where(labels == none, weight, 1.0)
    share = masks_per_image + weight * max(logits.shape[1] - masks_per_image, 0)
    return SetLosses(
        config.class_weight * (entropies * weights).sum() / share,
        config.mask_weight * torch.stack([losses["loss_mask"] for losses in by_image]).sum(),
        config.dice_weight * torch.stack([losses["loss_dice"] for losses in by_image]).sum(),
    )
