"""Converts mask logits to boxes, stability and run lengths, without storing full-size masks.

In: mask logits on SAM's grid. Out: per mask a box, a stability score, or COCO compressed counts. Only a bounded number
of pixels exists at a time, whatever the size of the image.

Axis legend: K masks, H W pixels of the original image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weaksam.ops.masks import flags_to_boxes
from weaksam.ops.rle import edges_to_rle
from weaksam.sam.upsample import Upsampler


@dataclass(frozen=True)
class MaskStats:
    """Boxes and stability of masks.

    Attributes:
        boxes: (K, 4) float32 xyxy pixels, right and bottom exclusive; (0, 0, 0, 0) for an empty mask.
        stability: (K,) float32 in [0, 1]; NaN where no pixel lies above -offset.
    """

    boxes: Tensor
    stability: Tensor


def measure_masks(upsampler: Upsampler, logits: Tensor, *, offset: float, budget: int) -> MaskStats:
    """Returns boxes and stability of masks cut at 0, as SAM computes them at full size.

    Args:
        logits: (K, low rows, low columns) float32.
        offset: stability compares the masks cut at +offset and -offset.
        budget: pixels to compute at a time, below 2**24 per mask and strip for exact counts.
    """
    height, width = upsampler.rows.size, upsampler.columns.size
    num_masks = len(logits)
    rows = torch.zeros(num_masks, height, dtype=torch.bool, device=logits.device)
    columns = torch.zeros(num_masks, width, dtype=torch.bool, device=logits.device)
    inner = torch.zeros(num_masks, device=logits.device, dtype=torch.float64)
    outer = torch.zeros_like(inner)
    group = max(1, budget // (height * width))
    for start in range(0, num_masks, group):
        part = slice(start, start + group)
        region = upsampler.region_above(logits[part], min(-offset, 0.0))
        for strip in upsampler.strips(logits[part], region, budget):
            pixels = strip.pixels
            # Zeros and ones as floats: twice as fast as booleans to write and six times to add up.
            above = torch.empty_like(pixels)
            inner[part] += torch.gt(pixels, offset, out=above).sum((1, 2))
            outer[part] += torch.gt(pixels, -offset, out=above).sum((1, 2))
            strip_columns = slice(strip.column, strip.column + pixels.shape[1])
            columns[part, strip_columns] = pixels.amax(dim=2) > 0
            rows[part, strip.row : strip.row + pixels.shape[2]] |= pixels.amax(dim=1) > 0
    return MaskStats(boxes=flags_to_boxes(rows, columns), stability=inner.float() / outer.float())


def encode_masks(upsampler: Upsampler, logits: Tensor, *, budget: int) -> list[bytes]:
    """Encodes masks cut at 0 as COCO compressed counts.

    Args:
        logits: (K, low rows, low columns) float32.
        budget: pixels to compute at a time.
    """
    if logits.is_cpu or not len(logits):
        return [_encode_mask(upsampler, mask[None], budget) for mask in logits]
    step = max(1, budget // (upsampler.rows.size * upsampler.columns.size))
    return [rle for part in logits.split(step) for rle in encode_masks_together(upsampler, part)]


def _encode_mask(upsampler: Upsampler, logits: Tensor, budget: int) -> bytes:
    height, width = upsampler.rows.size, upsampler.columns.size
    edges, position, last = [], 0, False
    first = False
    region = (0, len(upsampler.rows.taps), *upsampler.region_above(logits, 0.0)[2:])  # whole columns, for run lengths
    for strip in upsampler.strips(logits, region, budget):
        flat = (strip.pixels[0] > 0).flatten().cpu().numpy()
        start = strip.column * height
        if start > position:  # columns left of the region are empty
            position, last = start, False
        if position == 0:
            first = bool(flat[0])
        elif flat[0] != last:
            edges.append(np.array([position]))
        edges.append(np.flatnonzero(flat[1:] != flat[:-1]) + position + 1)
        position, last = position + flat.size, bool(flat[-1])
    if last and position < height * width:  # columns right of the region are empty
        edges.append(np.array([position]))
    joined = np.concatenate(edges) if edges else np.zeros(0, dtype=np.int64)
    return edges_to_rle(joined, first=first, size=height * width)


def encode_masks_together(upsampler: Upsampler, logits: Tensor) -> list[bytes]:
    """Same as `encode_masks`, all pixels at once; only the positions of value changes leave the device."""
    (strip,) = upsampler.strips(logits, upsampler.everything, budget=2**62)
    flat = (strip.pixels > 0).flatten(1)  # column by column
    changes = (flat[:, 1:] != flat[:, :-1]).nonzero().cpu().numpy()
    first = flat[:, 0].cpu().numpy()
    ends = np.searchsorted(changes[:, 0], np.arange(len(flat)), side="right")
    edges = np.split(changes[:, 1] + 1, ends[:-1])
    return [edges_to_rle(e, first=bool(f), size=flat.shape[1]) for e, f in zip(edges, first, strict=True)]
