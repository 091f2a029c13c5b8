"""Encodes masks as COCO's compressed run lengths, without torch. Axis legend: H W pixels, R runs.

A run-length encoded mask is COCO compressed counts as bytes; the caller stores its (height, width). Runs go down the
columns, the first run is zeros. The format: run lengths, from the fourth on minus the run two before, each written in
groups of 5 bits from the low end, bit 6 set if more groups follow, 48 added (cocoapi `common/maskApi.c`).
"""

from __future__ import annotations

import numpy as np


def encode_rle(mask: np.ndarray) -> bytes:
    """Encodes a mask as COCO compressed counts, the same bytes as `pycocotools.mask.encode`.

    Args:
        mask: (H, W) bool or 0/1 integers.
    """
    flat = np.asarray(mask, dtype=bool).T.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    return edges_to_rle(edges, first=bool(flat[0]) if flat.size else False, size=flat.size)


def edges_to_rle(edges: np.ndarray, *, first: bool, size: int) -> bytes:
    """Returns compressed counts from the positions where a column-major mask changes value.

    Args:
        edges: (E,) int, ascending: positions whose pixel differs from the previous one, in 1 .. size - 1.
        first: value of the first pixel.
        size: number of pixels.
    """
    runs = np.diff(np.concatenate([[0], edges, [size]]))
    return runs_to_rle(np.concatenate([[0], runs]) if first else runs)


def runs_to_rle(runs: np.ndarray) -> bytes:
    """Encodes run lengths (zeros first) as COCO compressed counts.

    Args:
        runs: (R,) int, each >= 0.
    """
    if len(runs) == 0:
        return b""
    values = runs.astype(np.int64)
    values[3:] -= runs[1:-2]  # the difference starts with the fourth run, as in maskApi.c (`i > 2`)
    groups, pending = [], np.ones(len(values), dtype=bool)
    while pending.any():
        low = values & 0x1F
        values = values >> 5
        # A value is complete if the rest is only its sign: 0 after a clear bit 5, -1 after a set one.
        more = np.where(low & 0x10, values != -1, values != 0)
        groups.append(np.where(pending, low + 48 + (more << 5), 0).astype(np.uint8))
        pending = pending & more
    digits = np.stack(groups, axis=1).reshape(-1)
    return digits[digits != 0].tobytes()


def rle_to_runs(rle: bytes) -> np.ndarray:
    """Returns the run lengths (zeros first) of COCO compressed counts.

    Returns:
        (R,) int64.

    Raises:
        ValueError: `rle` ends inside a number.
    """
    if not rle:
        return np.zeros(0, dtype=np.int64)
    digits = np.frombuffer(rle, dtype=np.uint8).astype(np.int64) - 48
    is_last = (digits & 0x20) == 0
    if not is_last[-1]:
        raise ValueError(f"rle ends inside a number: {rle[-8:]!r}")
    starts = np.concatenate([[0], np.flatnonzero(is_last)[:-1] + 1])
    place = np.arange(len(digits)) - np.repeat(starts, np.diff(np.append(starts, len(digits))))
    values = np.add.reduceat((digits & 0x1F) << (5 * place), starts)
    negative = (digits[is_last] & 0x10) != 0
    values -= np.where(negative, np.int64(1) << (5 * (place[is_last] + 1)), 0)
    # Undo the difference to the run two before: odd and even runs are two independent cumulative sums.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def decode_rle(rle: bytes, height: int, width: int) -> np.ndarray:
    """Decodes COCO compressed counts to a mask.

    Returns:
        (H, W) bool, column-major in memory.

    Raises:
        ValueError: the runs do not add up to height * width.
    """
    runs = rle_to_runs(rle)
    if runs.sum() != height * width or (len(runs) and runs.min() < 0):
        raise ValueError(f"rle covers {runs.sum()} pixels, not height * width = {height} * {width}")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def rle_area(rle: bytes) -> int:
    """Returns the number of set pixels of COCO compressed counts."""
    return int(rle_to_runs(rle)[1::2].sum())
