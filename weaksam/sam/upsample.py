"""Upsamples mask logits from SAM's grid to pixels of the original image, one strip at a time.

SAM enlarges a mask to its own input size, cuts the padding off and resizes the rest to the image, both bilinear. Per
axis the two steps are one linear map with at most 3 taps per pixel, so the large intermediate tensor is never formed.
The weights come from PyTorch's own interpolation of unit vectors: they equal SAM's, in the same precision.

Pixels come out column by column, the order of run-length encoding: axes are (masks, columns, rows).

Axis legend: K masks, L low-resolution side, G blocks of pixels, k taps of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Pixels of one axis computed by one small matrix product. Larger blocks waste work on zeros outside the band, smaller
# ones pay per product; 32 was fastest from 375 to 2000 pixels on AVX512.
_BLOCK = 32


@dataclass(frozen=True)
class Axis:
    """The linear map of one axis, split into blocks of pixels that each depend on a window of the low-resolution side.

    Attributes:
        weights: (G, block, k) float32.
        taps: (G, k) int64 indices into the low-resolution side.
        first: (G,) int64 first tap with weight, ascending, on the CPU.
        end: (G,) int64 one past the last tap with weight, on the CPU.
        first_tap: (size,) int32 first tap of each pixel, which has three.
        tap_weights: (size, 3) float32.
        size: number of pixels; the last block may reach beyond.
    """

    weights: Tensor
    taps: Tensor
    first: Tensor
    end: Tensor
    first_tap: Tensor
    tap_weights: Tensor
    size: int

    @property
    def block(self) -> int:
        """Pixels per block."""
        return self.weights.shape[1]

    def blocks_of(self, low: int, high: int) -> tuple[int, int]:
        """Returns the half-open range of blocks that depend on any of the low-resolution elements low .. high - 1."""
        start = int(torch.searchsorted(self.end, low, right=True))
        stop = int(torch.searchsorted(self.first, high))
        return start, max(start, stop)

    def apply(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Maps the low-resolution side (second to last axis) to the pixels of blocks start .. stop - 1.

        Args:
            x: (K, L, other) float32.

        Returns:
            (K, pixels, other) float32.
        """
        windows = x[:, self.taps[start:stop]]  # (K, G, k, other)
        pixels = (self.weights[start:stop] @ windows).flatten(1, 2)
        return pixels[:, : self.size - start * self.block]


def make_axis(low_side: int, padded_side: int, cut: int, size: int, device: torch.device) -> Axis:
    """Returns the map of one axis: low_side to padded_side, keep the first `cut`, then to `size` pixels.

    The map takes the first `low_needed(low_side, padded_side, cut)` low-resolution elements; the others have no weight.
    """
    unit = torch.eye(low_side)[None]
    padded = F.interpolate(unit, padded_side, mode="linear", align_corners=False)
    dense = F.interpolate(padded[..., :cut], size, mode="linear", align_corners=False)[0].T  # (size, low_side)
    dense = dense[:, : low_needed(low_side, padded_side, cut)]
    first_tap = (dense != 0).to(torch.uint8).argmax(dim=1)
    three = F.pad(dense, (0, 2)).gather(1, first_tap[:, None] + torch.arange(3))

    block = min(_BLOCK, size)
    num_blocks = math.ceil(size / block)
    dense = F.pad(dense, (0, 0, 0, num_blocks * block - size)).unflatten(0, (num_blocks, block))
    used = (dense != 0).any(dim=1)
    first = used.to(torch.uint8).argmax(dim=1)
    end = used.shape[1] - used.flip(1).to(torch.uint8).argmax(dim=1)
    num_taps = int((end - first).max())
    taps = first.clamp(max=dense.shape[2] - num_taps)[:, None] + torch.arange(num_taps)
    weights = dense.gather(2, taps[:, None].expand(-1, block, -1)).contiguous()
    weights, taps, first_tap, three = (x.to(device) for x in (weights, taps, first_tap.int(), three.contiguous()))
    return Axis(weights, taps, first, end, first_tap, three, size)


def low_needed(low_side: int, padded_side: int, cut: int) -> int:
    """Returns how many low-resolution elements the first `cut` of `padded_side` interpolated elements depend on."""
    position = (cut - 0.5) * low_side / padded_side - 0.5
    return min(low_side, max(1, math.floor(position) + 2))


@dataclass(frozen=True)
class Upsampler:
    """The map from mask logits to image pixels for one image size.

    Attributes:
        rows: map of the rows.
        columns: map of the columns.
    """

    rows: Axis
    columns: Axis

    def strips(self, logits: Tensor, region: tuple[int, int, int, int], budget: int) -> Iterator[Strip]:
        """Yields pixels of a region, in strips of columns with at most `budget` pixels over all masks.

        A strip has at least one block of columns, so a budget below that is exceeded.

        Args:
            logits: (K, low rows, low columns) float32.
            region: blocks top, bottom, left, right (bottom and right exclusive) as `region_above` gives them.
        """
        top, bottom, left, right = region
        if top >= bottom or left >= right:
            return
        tall = self.rows.apply(logits, top, bottom).transpose(1, 2).contiguous()  # (K, low columns, rows)
        per_block = self.columns.block * tall.shape[2] * len(tall)
        step = max(1, budget // per_block)
        for start in range(left, right, step):
            pixels = self.columns.apply(tall, start, min(start + step, right))
            yield Strip(pixels, column=start * self.columns.block, row=top * self.rows.block)

    def region_above(self, logits: Tensor, threshold: float) -> tuple[int, int, int, int]:
        """Returns the blocks of pixels outside which no mask exceeds `threshold`: top, bottom, left, right.

        Interpolation never leaves the range of its taps, so low-resolution logits bound the pixels.
        """
        above = (logits > threshold).any(dim=0)
        rows, columns = above.any(dim=1).nonzero(), above.any(dim=0).nonzero()
        if len(rows) == 0:
            return 0, 0, 0, 0
        top, bottom = self.rows.blocks_of(int(rows[0]), int(rows[-1]) + 1)
        left, right = self.columns.blocks_of(int(columns[0]), int(columns[-1]) + 1)
        return top, bottom, left, right

    @property
    def everything(self) -> tuple[int, int, int, int]:
        """All blocks: top, bottom, left, right."""
        return 0, len(self.rows.taps), 0, len(self.columns.taps)


@dataclass(frozen=True)
class Strip:
    """Logits of a range of columns of an image.

    Attributes:
        pixels: (K, columns, rows) float32.
        column: first column in the image.
        row: first row in the image.
    """

    pixels: Tensor
    column: int
    row: int
