"""Boxes and stability of masks from their low-resolution logits; the twin is `weaksam.sam.postprocess.measure_masks`.

A program computes a tile of pixel rows of a mask and counts them: nothing at full size is written. Rows and columns
whose logits all lie below the lower cut are skipped, because interpolation never leaves the range of its taps.

Axis legend: K masks.
"""

# A type checker cannot check Triton's language.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weaksam.sam.postprocess import MaskStats
from weaksam.sam.upsample import Upsampler

ROWS, COLUMNS, WARPS = 16, 128, 4  # pixels of a step


def measure_masks(upsampler: Upsampler, logits: Tensor, *, offset: float, budget: int) -> MaskStats:
    """Returns boxes and stability of masks cut at 0; see the twin. Stores no pixels, so `budget` is ignored."""
    rows, columns, num_masks = upsampler.rows, upsampler.columns, len(logits)
    counts = torch.zeros(num_masks, 2, dtype=torch.int32, device=logits.device)
    empty_box = [columns.size, rows.size, 0, 0]
    boxes = torch.tensor(empty_box, dtype=torch.int32, device=logits.device).repeat(num_masks, 1)
    if num_masks:
        _measure[(triton.cdiv(rows.size, ROWS), num_masks)](
            logits.contiguous(), rows.first_tap, rows.tap_weights, columns.first_tap, columns.tap_weights, counts,
            boxes, rows.size, columns.size, *logits.shape[1:], offset, min(-offset, 0.0), ROWS, COLUMNS,
            triton.next_power_of_2(logits.shape[2]), num_warps=WARPS,
        )  # fmt: skip
    stability = counts[:, 0].float() / counts[:, 1].float()
    return MaskStats(boxes=boxes * (boxes[:, 2:3] > 0).float(), stability=stability)


@triton.jit
def _measure(
    logits, row_taps, row_weights, column_taps, column_weights, counts, boxes, height, width, low_rows, low_columns,
    offset, lowest, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOW_COLUMNS: tl.constexpr,
):  # fmt: skip
    mask = tl.program_id(1).to(tl.int64)
    logits += mask * low_rows * low_columns
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_height = row < height
    row_tap = tl.load(row_taps + row, in_height, 0)
    low_column = tl.arange(0, LOW_COLUMNS)
    peak = tl.full([LOW_COLUMNS], -float("inf"), tl.float32)
    top = tl.min(tl.where(in_height, row_tap, low_rows), 0)
    for low_row in range(top, tl.minimum(tl.max(row_tap, 0) + 3, low_rows)):
        row_logits = tl.load(logits + low_row * low_columns + low_column, low_column < low_columns, -float("inf"))
        peak = tl.maximum(peak, row_logits)
    leftmost = tl.min(tl.where(peak > lowest, low_column, LOW_COLUMNS), 0)
    rightmost = tl.max(tl.where(peak > lowest, low_column, -1), 0)
    inner, outer, left, right = 0, 0, width, 0
    is_row_set = tl.zeros([ROWS], tl.int32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        in_width = column < width
        column_tap = tl.load(column_taps + column, in_width, 0)
        first = tl.min(tl.where(in_width, column_tap, LOW_COLUMNS), 0)
        if (first <= rightmost) & (tl.max(column_tap, 0) + 2 >= leftmost):
            pixels = tl.zeros([ROWS, COLUMNS], tl.float32)
            for j in tl.static_range(3):
                from_column = tl.minimum(column_tap + j, low_columns - 1)
                tall = tl.zeros([ROWS, COLUMNS], tl.float32)
                for i in tl.static_range(3):
                    from_row = tl.minimum(row_tap + i, low_rows - 1)
                    value = tl.load(logits + from_row[:, None] * low_columns + from_column[None, :])
                    tall += tl.load(row_weights + row * 3 + i, in_height, 0.0)[:, None] * value
                pixels += tl.load(column_weights + column * 3 + j, in_width, 0.0)[None, :] * tall
            is_pixel = in_height[:, None] & in_width[None, :]
            inner += tl.sum(tl.sum((is_pixel & (pixels > offset)).to(tl.int32), 1), 0)
            outer += tl.sum(tl.sum((is_pixel & (pixels > -offset)).to(tl.int32), 1), 0)
            above = (is_pixel & (pixels > 0)).to(tl.int32)
            is_row_set = tl.maximum(is_row_set, tl.max(above, 1))
            is_column_set = tl.max(above, 0) > 0
            left = tl.minimum(left, tl.min(tl.where(is_column_set, column, width), 0))
            right = tl.maximum(right, tl.max(tl.where(is_column_set, column + 1, 0), 0))
    if outer > 0:
        tl.atomic_add(counts + mask * 2, inner)
        tl.atomic_add(counts + mask * 2 + 1, outer)
    if right > 0:
        tl.atomic_min(boxes + mask * 4, left)
        tl.atomic_min(boxes + mask * 4 + 1, tl.min(tl.where(is_row_set > 0, row, height), 0))
        tl.atomic_max(boxes + mask * 4 + 2, right)
        tl.atomic_max(boxes + mask * 4 + 3, tl.max(tl.where(is_row_set > 0, row + 1, 0), 0))
