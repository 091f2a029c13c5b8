"""Losses of queries that are matched one to one with objects by class and mask. Matching and mask losses: transformers.

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
    """Sums over images, weighted: of classes, of cross-entropies of masks and of their dice."""

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
    """Losses of one layer of queries.

    Differs from the published code, so that neither the size of a batch nor the number of workers changes a step: what
    it divides by is the batch's, averaged over GPUs; here it is what that is for one image on average. Losses of masks
    are published as divided by the number of masks of the batch, here by `masks_per_image` m. The class loss is
    published as a mean over all queries, in which one matched with nothing weighs w = 0.1; here an image's weighted
    sum is divided by m + w (Q - m). Over many images the means of both are the same; where every image has m objects,
    they are so in each batch.

    Args:
        logits: (B, Q, C + 1) float32; the last class is none.
        masks: (B, Q, h, w) float32, logits of the image with its padding.
        targets: B, with masks (G, H, W) float32 of the image with its padding.
        generators: B, which the points that masks are compared at are drawn from.
        config: weights, and how many points of masks are compared.
        masks_per_image: m, over 0.
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
