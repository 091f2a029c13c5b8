"""SAM's training loss: pixels and dice on the best of three masks, and the error of the predicted IoU.

Differs from the paper: masks are compared on a sample of cells, dense where targets are (weighted, so that sums are
unbiased), which costs a quarter; cross-entropy replaces the focal loss, since the sample already has
fewer easy pixels (training was twice as fast); and a point has both its object and its part as targets, so that every
ambiguous prompt trains three masks. Two auxiliary losses without prompts, the hints, train the encoder directly: which
pixels are objects or outlines, and which cells belong together.

Axis legend: B images, P prompts, G targets, K cells, 16 pixels of a cell, M masks (mask 0 is for unambiguous prompts).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIXEL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT, HINT_WEIGHT = 4.0, 1.0, 1.0, 0.5
OUTLINE_WEIGHT = 4.0


def mask_losses(
    logits: Tensor, targets: Tensor, weights: Tensor, *, dice_weight: float = DICE_WEIGHT
) -> tuple[Tensor, Tensor]:
    """Returns loss and IoU of every mask against every target.

    Args:
        logits: (B, P, K, 16, M) float32.
        targets: (B, P, G, K, 16) bool.
        weights: (B, P, K) float32, number of cells that each cell represents.
        dice_weight: weight of the dice term; the larger, the closer the loss is to the IoU itself.

    Returns:
        losses, ious: (B, P, G, M) float32; IoU carries no gradient and is 0 where a target is empty.
    """
    batch, prompts, _, _, masks = logits.shape
    flat = logits.reshape(batch, prompts, -1, masks)
    probability = flat.sigmoid()
    truth = targets.flatten(3).to(flat.dtype)  # (B, P, G, L)
    area = weights.repeat_interleave(16, -1)  # (B, P, L)
    # unweighted cross-entropy over the sampled pixels, which emphasises outlines: softplus(x) - x * truth
    pixel = (F.softplus(flat).sum(2, keepdim=True) - truth @ flat) / truth.shape[-1]
    overlap = (truth * area.unsqueeze(2)) @ probability
    sizes = (area.unsqueeze(-1) * probability).sum(2, keepdim=True) + (truth * area.unsqueeze(2)).sum(-1, keepdim=True)
    dice = 1 - (2 * overlap + 1) / (sizes + 1)
    with torch.no_grad():
        hard = (flat > 0).to(flat.dtype) * area.unsqueeze(-1)
        both = truth @ hard
        either = hard.sum(2, keepdim=True) + (truth * area.unsqueeze(2)).sum(-1, keepdim=True) - both
        ious = both / either.clamp(min=1)
    return PIXEL_WEIGHT * pixel + dice_weight * dice, ious


def segmentation_loss(
    logits: Tensor, predicted_iou: Tensor, batch: dict[str, Tensor], *, dice_weight: float = DICE_WEIGHT
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the sum over images of the mean loss of an image's prompts, and sums of metrics.

    Args:
        logits: (B, P, K, 16, M); predicted_iou: (B, P, M).
        batch: `targets`, `has_target`, `is_ambiguous`, `cell_weights` from `sam_training_prompts.pack`.
        dice_weight: weight of the dice term.
    """
    losses, ious = mask_losses(logits, batch["targets"], batch["cell_weights"], dice_weight=dice_weight)
    ambiguous, has_target = batch["is_ambiguous"], batch["has_target"].float()
    best = losses[..., 1:].min(-1).values  # (B, P, G)
    chosen = torch.where(ambiguous.unsqueeze(-1), best, losses[..., 0])
    mask_loss = (chosen * has_target).sum(-1) / has_target.sum(-1).clamp(min=1)
    reached = (ious * has_target.unsqueeze(-1)).amax(2)  # (B, P, M); 0 on the background
    uses = torch.ones_like(reached)
    uses[..., 0] = (~ambiguous).float()
    uses[..., 1:] = ambiguous.float().unsqueeze(-1)
    iou_loss = ((predicted_iou - reached) ** 2 * uses).sum(-1) / uses.sum(-1)
    total = (mask_loss + IOU_WEIGHT * iou_loss).mean(-1).sum()
    with torch.no_grad():
        has_object = has_target[..., 0]
        hit = torch.where(ambiguous, ious[..., 0, 1:].amax(-1), ious[..., 0, 0])
        points, single = has_object * ambiguous, has_object * ~ambiguous
        metrics = {
            "mask_loss": mask_loss.mean(-1).sum(),
            "iou_error": ((predicted_iou - reached).abs() * uses).sum(-1).div(uses.sum(-1)).mean(-1).sum(),
            "point_iou": ((hit * points).sum(-1) / points.sum(-1).clamp(min=1)).sum(),
            "box_iou": ((hit * single).sum(-1) / single.sum(-1).clamp(min=1)).sum(),
        }
    return total, metrics


class Hints(nn.Module):
    """Auxiliary heads on the image embedding, only for training."""

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        self.together = nn.Linear(channels, width)
        self.pixels = nn.Linear(channels, 48)
        self.scale = nn.Parameter(torch.tensor([5.0, -2.0]))  # scale of a cosine, and offset

    def forward(self, embedding: Tensor, cell_labels: Tensor, cell_pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns two losses summed over images: separation of cells by object, and pixel classification.

        Args:
            embedding: (B, N, C).
            cell_labels: (B, N) int64, object of a cell, 0 = background, -1 = several objects.
            cell_pixels: (B, N, 3, 16) bool, pixels of each cell on an object, its outline, the outline of a part.
        """
        logits = self.pixels(embedding).unflatten(-1, (3, 16))
        # outlines are rare: without the weight, predicting none is a good solution for long
        rare = 1 + (OUTLINE_WEIGHT - 1) * cell_pixels * torch.tensor([0, 1, 1], device=logits.device).unsqueeze(-1)
        pixel_loss = ((F.softplus(logits) - logits * cell_pixels) * rare).mean((1, 2, 3)).sum()
        places = F.normalize(self.together(embedding), dim=-1)
        alike = places @ places.transpose(1, 2) * self.scale[0] + self.scale[1]
        same = cell_labels.unsqueeze(1) == cell_labels.unsqueeze(2)
        pure = (cell_labels >= 0).unsqueeze(1) & (cell_labels >= 0).unsqueeze(2)
        counts = pure & ((cell_labels > 0).unsqueeze(1) | (cell_labels > 0).unsqueeze(2))
        loss = F.softplus(torch.where(same, -alike, alike))
        shares = [(loss * pick).sum((1, 2)) / pick.sum((1, 2)).clamp(min=1) for pick in (counts & same, counts & ~same)]
        return (shares[0] + shares[1]).sum() / 2, pixel_loss
