"""The image encoder of a SAM as the patch embedding of another transformer, for images of any size.

Axis legend: B images, H W pixels, h w patches, D channels asked for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weaksam.sam.build import VARIANTS, build_sam


class SamStem(nn.Module):
    """(B, 3, H, W) to (B, h, w, D): frozen features of a SAM and a trained projection.

    A SAM sees where things begin and end without being told what they are, so a network on top of it learns classes
    from few images. Sides that are no whole number of patches are cut.
    """

    def __init__(self, variant: str, dim: int) -> None:
        super().__init__()
        self.patch = VARIANTS[variant].patch_size
        self.encoder: Any = build_sam(variant).image_encoder.requires_grad_(False)
        self.proj = nn.Linear(VARIANTS[variant].prompt_dim, dim)

    def train(self, mode: bool = True) -> SamStem:
        """The encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        height, width = (side // self.patch * self.patch for side in images.shape[2:])
        with torch.no_grad():
            x = self.encoder.patch_embed(images[:, :, :height, :width])
            x = x + _resize(self.encoder.pos_embed, x.shape[1:3])
            for block in self.encoder.blocks:
                x = block(x)
            x = self.encoder.neck(x.permute(0, 3, 1, 2))
        return self.proj(x.permute(0, 2, 3, 1))


def _resize(positions: Tensor, hw: torch.Size) -> Tensor:
    """Position embedding (1, S, S, D) for (h, w) patches."""
    if positions.shape[1:3] == hw:
        return positions
    grid = F.interpolate(positions.permute(0, 3, 1, 2), tuple(hw), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1)
