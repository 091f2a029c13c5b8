"""Operations on binary masks as tensors: their boxes. Axis legend: N masks, H W pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Returns the tight boxes around masks.

    torchvision's function of this name leaves out the last row and column, and fails for an empty mask.

    Args:
        masks: (N, H, W) bool.

    Returns:
        (N, 4) float32 xyxy, right and bottom exclusive; (0, 0, 0, 0) for an empty mask.
    """
    if masks.numel() == 0:
        return torch.zeros(len(masks), 4, device=masks.device)
    return flags_to_boxes(masks.any(dim=2), masks.any(dim=1))


def flags_to_boxes(rows: Tensor, columns: Tensor) -> Tensor:
    """Returns boxes from flags of the rows and columns that contain pixels of a mask.

    Args:
        rows: (N, H) bool.
        columns: (N, W) bool.

    Returns:
        (N, 4) float32 xyxy, right and bottom exclusive; (0, 0, 0, 0) for an empty mask.
    """
    top, bottom = _first_and_end(rows)
    left, right = _first_and_end(columns)
    boxes = torch.stack([left, top, right, bottom], dim=1).float()
    return boxes * rows.any(dim=1)[:, None]


def _first_and_end(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the index of the first set flag and one past the last, per row of an (N, L) bool tensor."""
    length = flags.shape[1]
    first = flags.to(torch.uint8).argmax(dim=1)
    end = length - flags.flip(1).to(torch.uint8).argmax(dim=1)
    return first, end
