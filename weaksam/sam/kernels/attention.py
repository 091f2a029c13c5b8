"""Fused attention with decomposed relative positions; the twin is `weaksam.sam.attention.attend`.

A block of keys is one row of tokens. The row part of its position term is one number per query, the column part is the
same table for all rows, loaded once. The softmax is computed online (Milakov and Gimelshein, arXiv 1805.02867).
"""

# A type checker cannot check Triton's language.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)  # softmax by powers of two


def attend(query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Softmax attention with relative positions; same arguments as `weaksam.sam.attention.attend`."""
    num_sequences, num_tokens, dim = query.shape
    query, key, value, rel_h, rel_w = (x.contiguous() for x in (query, key, value, rel_h, rel_w))
    mixed = torch.empty_like(value)
    height, width = rel_h.shape[2], rel_w.shape[2]
    constants, warps = tiling(num_tokens, width, dim)
    grid = (triton.cdiv(num_tokens, constants["QUERIES"]), num_sequences)
    _attend[grid](
        query, key, value, rel_h, rel_w, mixed, num_tokens, height, width, dim**-0.5 * _LOG2_E.value, **constants,
        num_warps=warps,
    )  # fmt: skip
    return mixed


def tiling(num_tokens: int, width: int, dim: int) -> tuple[dict[str, int], int]:
    """Returns the kernel's constants and its number of warps."""
    main = 1 << (dim.bit_length() - 1)
    rest = 0 if main == dim else max(16, triton.next_power_of_2(dim - main))
    queries = min(128, max(16, triton.next_power_of_2(num_tokens // 4)))
    columns = max(16, triton.next_power_of_2(width))
    constants = {"DIM": dim, "MAIN": main, "REST": rest, "COLUMNS": columns, "QUERIES": queries}
    return constants, 8 if queries == 128 else 4


@triton.jit
def _attend(
    query, key, value, rel_h, rel_w, mixed, num_tokens, height, width, scale_by, DIM: tl.constexpr, MAIN: tl.constexpr,
    REST: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    # A head of 80 channels is no power of two: it is taken as 64 and 16.
    sequence = tl.program_id(1).to(tl.int64) * num_tokens
    rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    columns = tl.arange(0, COLUMNS)
    main = tl.arange(0, MAIN)
    in_rows, in_columns = (rows < num_tokens)[:, None], columns < width
    from_row = (sequence + rows)[:, None]
    query_main = tl.load(query + from_row * DIM + main[None, :], in_rows, 0.0)
    sum_main = tl.zeros([QUERIES, MAIN], tl.float32)
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        in_rest = rest < DIM
        query_rest = tl.load(query + from_row * DIM + rest[None, :], in_rows & in_rest[None, :], 0.0)
        sum_rest = tl.zeros([QUERIES, REST], tl.float32)
    by_column = tl.load(rel_w + from_row * width + columns[None, :], in_rows & in_columns[None, :], 0.0)
    by_column = tl.where(in_columns[None, :], by_column.to(tl.float32) * _LOG2_E, -float("inf"))
    highest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for row in range(height):
        from_key = sequence + row * width + columns
        key_main = tl.load(key + from_key[None, :] * DIM + main[:, None], in_columns[None, :], 0.0)
        scores = tl.dot(query_main, key_main)
        if REST > 0:
            picked = in_rest[:, None] & in_columns[None, :]
            key_rest = tl.load(key + from_key[None, :] * DIM + rest[:, None], picked, 0.0)
            scores = tl.dot(query_rest, key_rest, scores)
        by_row = tl.load(rel_h + (sequence + rows) * height + row, rows < num_tokens, 0.0)
        scores = scores * scale_by + by_column + (by_row.to(tl.float32) * _LOG2_E)[:, None]
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        fade = tl.exp2(highest - new_highest)
        highest = new_highest
        total = total * fade + tl.sum(weights, 1)
        value_main = tl.load(value + from_key[:, None] * DIM + main[None, :], in_columns[:, None], 0.0)
        weights = weights.to(value_main.dtype)
        sum_main = tl.dot(weights, value_main, sum_main * fade[:, None])
        if REST > 0:
            picked = in_columns[:, None] & in_rest[None, :]
            value_rest = tl.load(value + from_key[:, None] * DIM + rest[None, :], picked, 0.0)
            sum_rest = tl.dot(weights, value_rest, sum_rest * fade[:, None])
    kind = mixed.dtype.element_ty
    tl.store(mixed + from_row * DIM + main[None, :], (sum_main / total[:, None]).to(kind), in_rows)
    if REST > 0:
        tl.store(
            mixed + from_row * DIM + rest[None, :], (sum_rest / total[:, None]).to(kind), in_rows & in_rest[None, :]
        )
