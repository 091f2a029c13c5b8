"""Encodes boxes as offsets from other boxes, the regression targets of a network.

Axis legend: N boxes; leading axes "..." are kept.
Boxes are xyxy, absolute pixels, right and bottom exclusive. Published code adds 1 to widths because its right and
bottom are inclusive; with exclusive coordinates the offsets are the same without it.
Source: R-CNN (arXiv 1311.2524, appendix C).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # Fast R-CNN's: offsets of about unit variance
_MAX_LOG = math.log(1000 / 16)  # limit of the growth of a side in one step


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Returns the offsets from `anchors` to `boxes`.

    Args:
        boxes: (..., 4) float, xyxy, not empty.
        anchors: (..., 4) float, xyxy, not empty.

    Returns:
        (..., 4): shift of the centre in units of the anchor's sides, log of the ratio of sides, times `WEIGHTS`.
    """
    centres, sides = _centres_and_sides(boxes)
    anchor_centres, anchor_sides = _centres_and_sides(anchors)
    offsets = torch.cat([(centres - anchor_centres) / anchor_sides, torch.log(sides / anchor_sides)], -1)
    return offsets * offsets.new_tensor(WEIGHTS)


def decode_boxes(offsets: Tensor, anchors: Tensor) -> Tensor:
    """Applies `offsets` to `anchors`; returns boxes (..., 4). The inverse of `encode_boxes`."""
    offsets = offsets / offsets.new_tensor(WEIGHTS)
    centres, sides = _centres_and_sides(anchors)
    centres = centres + offsets[..., :2] * sides
    half = 0.5 * sides * torch.exp(offsets[..., 2:].clamp(max=_MAX_LOG))
    return torch.cat([centres - half, centres + half], -1)


def _centres_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
