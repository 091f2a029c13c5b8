"""Attention with the decomposed relative positions of SAM's image encoder (Li et al., MViTv2, arXiv 2112.01526).

A score is `scale q k + rel_h[row of key] + rel_w[column of key]`: two small tables per query hold all
position terms. The stock code adds them to a matrix of all queries by all keys, in several passes; this module forms
that matrix for one block of queries at a time.

Axis legend: B images or windows times heads, N = H W tokens, d channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from weaksam.sam import kernels

# Scores alive at a time on a CPU: 128 queries by 4096 keys are 2 MiB and stay in the second-level cache.
_CPU_SCORES = 2**19
_DEVICE_SCORES = 2**28
_SMALL = 64  # tokens up to which a CPU is faster without a fused kernel


def relative_scores(query: Tensor, table: Tensor, axis: int) -> Tensor:
    """Returns the position term of the attention scores along one axis.

    Args:
        query: (B, H, W, d), not scaled.
        table: (2 L - 1, d) embeddings of the distances along the axis, L its length.
        axis: 1 for rows, 2 for columns.

    Returns:
        (B, H, W, L).
    """
    length = query.shape[axis]
    place = torch.arange(length, device=query.device)
    by_place = table[place[:, None] - place + length - 1].to(query.dtype)  # (L of the query, L of the key, d)
    if axis == 1:
        return query @ by_place.transpose(1, 2)
    return (query.transpose(1, 2) @ by_place.transpose(1, 2)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Softmax attention with relative positions.

    Args:
        query: (B, N, d), not scaled; float32, or half precision with sums in float32.
        key: (B, N, d).
        value: (B, N, d).
        rel_h: (B, N, H) added to scores of keys by their row.
        rel_w: (B, N, W) added to scores of keys by their column.

    Returns:
        (B, N, d).
    """
    if query.dtype == torch.float32:
        return _attend_in_blocks(query, key, value, rel_h, rel_w)
    if kernels.usable(query.device):
        from weaksam.sam.kernels.attention import attend as fused

        return fused(query, key, value, rel_h, rel_w)
    return attend_augmented(query, key, value, rel_h, rel_w)


def _attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    query = query * query.shape[-1] ** -0.5
    key = key.transpose(1, 2)
    num_keys, budget = key.shape[2], _CPU_SCORES if query.is_cpu else _DEVICE_SCORES
    queries = min(query.shape[1], max(1, budget // num_keys))
    sequences = max(1, budget // (num_keys * queries))
    mixed = torch.empty_like(value)
    for first in range(0, len(query), sequences):
        batch = slice(first, first + sequences)
        for start in range(0, query.shape[1], queries):
            part = (batch, slice(start, start + queries))
            scores = (rel_h[part][..., :, None] + rel_w[part][..., None, :]).flatten(2)
            torch.baddbmm(scores, query[part], key[batch], out=scores)
            torch.softmax(scores, dim=-1, out=scores)
            mixed[part] = scores @ value[batch]
    return mixed


def attend_augmented(query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Attends with the tables as extra channels of the query, selected by ones in the key; any fused attention fits.

    Costs two to three times the products of the scores, little on half-precision units. Differentiable.
    """
    height, width = rel_h.shape[2], rel_w.shape[2]
    rows = torch.eye(height, dtype=key.dtype, device=key.device).repeat_interleave(width, dim=0)
    columns = torch.eye(width, dtype=key.dtype, device=key.device).repeat(height, 1)
    picks = torch.cat([rows, columns], dim=1).expand(len(key), -1, -1)
    query = torch.cat([query * query.shape[-1] ** -0.5, rel_h, rel_w], dim=2)
    key = torch.cat([key, picks], dim=2)
    if query.is_cpu and height * width <= _SMALL:
        return (query @ key.mT).softmax(dim=-1) @ value
    padded = F.pad(value, (0, height + width))  # fused kernels require equal widths
    mixed = F.scaled_dot_product_attention(query[None], key[None], padded[None], scale=1.0)
    return mixed[0, ..., : value.shape[2]]
