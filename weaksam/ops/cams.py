"""Fuses the class activation maps of several views of an image to heatmaps of its size.

A view is the image at another scale, mirrored or not. The inputs are maps of the views, already mirrored back; the
outputs are heatmaps in [0, 1] in image pixels: the sum over the views, then min-max scaled per map, as in the published
`generate_cams` of WeakSAM.

Axis legend: K maps, H W pixels of the image, h w of a view's maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-8  # as published: avoids 0 / 0 for a constant map


def snap_to_patches(hw: tuple[int, int], *, scale: float, patch: int) -> tuple[int, int]:
    """Returns the size of a view: each side times `scale`, rounded to a whole number of patches, at least one.

    Differs from the published code, which rounds to whole pixels: its patch embedding then drops up to `patch` - 1
    pixels at the right and bottom, the remaining map is stretched over the whole image, and peaks there move by up to
    15 pixels (375 pixels, scale 0.8, patches of 16).

    Args:
        hw: height and width of the image.
        patch: side of a patch, in pixels.

    Returns:
        Height and width, multiples of `patch`.
    """
    height, width = (max(1, round(side * scale / patch)) * patch for side in hw)
    return height, width


def fuse_views(views: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Resizes the maps of all views to the image, sums them and scales each heatmap to [0, 1].

    A map that is constant in every view becomes 0 everywhere.

    Args:
        views: at least one (K, h, w) float; the same K maps at any resolution, not mirrored. K may be 0.
        size: height and width of the image.

    Returns:
        (K, H, W) float32 in [0, 1].

    Raises:
        ValueError: no views, or views of different K.
    """
    if not views:
        raise ValueError("views must hold at least one view, got none")
    if len({len(view) for view in views}) > 1:
        raise ValueError(f"views must hold the same number of maps, got {[len(view) for view in views]}")
    # Resizing is linear: views of the same resolution, such as mirrored pairs, are summed and resized once.
    sums: dict[tuple[int, ...], Tensor] = {}
    for view in views:
        shape = tuple(view.shape[1:])
        sums[shape] = sums[shape] + view.float() if shape in sums else view.float()
    num_maps = len(views[0])
    fused = views[0].new_zeros(num_maps, *size, dtype=torch.float32)
    if num_maps == 0:
        return fused
    varies = torch.zeros(num_maps, dtype=torch.bool, device=fused.device)
    for maps in sums.values():
        fused += F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
        varies |= maps.amax(dim=(1, 2)) > maps.amin(dim=(1, 2))
    low, high = fused.amin(dim=(1, 2), keepdim=True), fused.amax(dim=(1, 2), keepdim=True)
    # Resizing a constant leaves rounding noise, which min-max would scale to peaks of up to 1.
    return (fused - low) / (high - low + _TINY) * varies[:, None, None]
