"""The decoder's two passes over the image tokens in half precision; the twins are in `weaksam.sam.passes`.

A pass is two kernels. In the first, image tokens read the prompt tokens: a program takes some image tokens of a prompt,
and scores, softmax and variance never leave it; only the basis is written, in half precision. In the second, prompt
tokens read the image: a program takes a prompt and walks the image once, the softmax runs along (Milakov and
Gimelshein, arXiv 1805.02867). Inputs of products are rounded to half precision, sums and softmaxes are float32.

How rows and channels are padded: `layout`.

Axis legend: B prompts, T prompt tokens, H heads, d channels of a head, D = H d, N image tokens.
"""

# Triton's language is no Python to a type checker.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from weaksam.sam.image_side import ImageSide, Reader
from weaksam.sam.kernels.layout import Layout
from weaksam.sam.passes import Gathered, PromptSide, Read, Write

# Image tokens in a program that writes, and in a step of one that reads: the largest that fit the registers of sm_90.
WRITE_TILE, READ_TILE, WARPS = 64, 32, 8


def first_pass(image: ImageSide, write: Write, read: Read, *, dtype: torch.dtype) -> tuple[PromptSide, Gathered]:
    """Layer 0 writes, layer 1 reads.

    Returns:
        prompt_side: `basis` is (B, 2 rows, N) in `dtype`, the first half of it is there; of `key_scale`, (B, 2, N),
            the first row.
        gathered: as the twin's.
    """
    at, layer = Layout.of(write.key), image.layers[0]
    num_prompts, num_image_tokens = len(write.key), layer.square.shape[0]
    basis = write.key.new_empty(num_prompts, 2 * at.rows, num_image_tokens, dtype=dtype)
    scale = layer.square.new_empty(num_prompts, 2, num_image_tokens)
    largest = _largest(write.gram)
    key, value, gram, query, cross = _in(
        dtype,
        *(at.lay_out(x) for x in (write.key, 2 * write.values[0])),
        at.pad_square(write.gram / largest),
        *(at.lay_out_shared(x) for x in (layer.query, image.cross[0])),
    )
    _write_first[(num_image_tokens // WRITE_TILE, num_prompts)](
        key, value, gram, query, cross, largest, layer.square, basis, scale, num_image_tokens,
        1.0 / image.bias.shape[0], layer.eps, at.num_tokens, at.padded_heads, at.tokens, at.channels, WRITE_TILE,
        num_warps=WARPS,
    )  # fmt: skip
    return PromptSide(basis, scale), _gather(at, image.layers[1].read, read, basis, scale)


def second_pass(
    image: ImageSide, first: PromptSide, write: Write, read: Read, *, dtype: torch.dtype
) -> tuple[PromptSide, Gathered]:
    """Layer 1 writes, the last attention reads. Uses up `first`.

    Returns:
        prompt_side: `basis` has no row for the constant, it is the second row of `key_scale`.
        gathered: as the twin's.
    """
    at, layer, num_rows = Layout.of(write.key), image.layers[1], write.gram.shape[1] // 2
    num_prompts, num_image_tokens = len(write.key), layer.square.shape[0]
    assert write.mixed is not None
    assert layer.query_pe is not None
    gram, own = write.gram, (slice(num_rows), slice(num_rows, 2 * num_rows))
    constant = torch.stack([at.pad_rows(2 * gram[:, -1, part], 1) for part in own], dim=1)
    constant_square, largest = gram[:, -1, -1].contiguous(), _largest(gram)
    gram = gram / largest
    operands = _in(
        dtype,
        *(at.lay_out(x) for x in (write.key, 2 * write.values[0], 2 * write.values[1])),
        *(at.pad_square(x) for x in (write.mixed, gram[:, own[0], own[0]], 2 * gram[:, own[0], own[1]])),
        at.pad_square(gram[:, own[1], own[1]]),
        *(at.lay_out_shared(x) for x in (layer.query, layer.query_pe, image.cross[1], image.cross[2])),
    )
    _write_second[(num_image_tokens // WRITE_TILE, num_prompts)](
        *operands, largest, constant, constant_square, layer.square, image.cross_bias, first.basis,
        first.key_scale, num_image_tokens, 1.0 / image.bias.shape[0], layer.eps, at.num_tokens, at.padded_heads,
        at.tokens, at.channels, WRITE_TILE, num_warps=WARPS,
    )  # fmt: skip
    return first, _gather(at, image.final, read, first.basis, first.key_scale)


def _gather(at: Layout, reader: Reader, read: Read, basis: Tensor, scale: Tensor) -> Gathered:
    """Prompt tokens read the image: what one pass added, or what both and the constant did."""
    assert reader.key_pe is not None
    num_prompts, num_rows = len(read.query), at.heads * at.num_tokens
    both = read.mixed.shape[2] > num_rows
    mixed = [at.pad_square(part) for part in read.mixed[..., : 2 * num_rows].split(num_rows, dim=2)]
    query, mixed, key, key_pe, value = _in(
        basis.dtype,
        at.lay_out(read.query),
        torch.stack(mixed, dim=1),
        *(at.lay_out_shared(x) for x in (reader.key, reader.key_pe)),
        at.lay_out_shared(reader.value.mT).T,
    )
    constant = at.pad_rows(read.mixed[..., -1], 1).contiguous()
    own = constant.new_empty(num_prompts, 2, at.rows, at.rows)
    own_constant = torch.empty_like(constant)
    shared = constant.new_empty(num_prompts, at.rows, at.channels)
    _read[(num_prompts,)](
        query, mixed, constant, key, key_pe, value, basis, scale, own, own_constant, shared, basis.shape[2],
        at.rows, at.channels, READ_TILE, both, num_warps=WARPS,
    )  # fmt: skip
    found = [at.cut_rows(at.cut_rows(own[:, i], 1), 2) for i in range(2 if both else 1)]
    if both:
        found.append(at.cut_rows(own_constant, 1)[..., None])
    return Gathered(torch.cat(found, dim=2), at.take_heads(shared))


def read_unchanged(reader: Reader, query: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Prompt tokens read image tokens that no prompt has changed: the queries of all prompts as one sequence."""
    together, key, value = _in(dtype, query.transpose(0, 1).flatten(1, 2), reader.key.mT, reader.value)
    found = F.scaled_dot_product_attention(together[None], key[None], value[None], scale=1.0)[0].float()
    return found.unflatten(1, (len(query), -1)).transpose(0, 1)


def _largest(gram: Tensor) -> Tensor:
    """(B, 1, 1) largest inner product of each prompt: divided by it, they fit half precision whatever the weights."""
    return gram.abs().amax((1, 2), keepdim=True).clamp(min=1e-30)


def _in(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [x.to(dtype).contiguous() for x in tensors]


@triton.jit
def _over_tokens(scores, num_tokens, HEADS: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr):
    """Softmax over the prompt tokens of each head."""
    scores = tl.reshape(scores, (HEADS, TOKENS, TILE))
    there = tl.arange(0, TOKENS)[None, :, None] < num_tokens
    scores = tl.where(there, scores, -float("inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None, :])
    weights = weights / tl.sum(weights, 1)[:, None, :]
    return tl.reshape(weights, (HEADS * TOKENS, TILE))


@triton.jit
def _addresses(prompt, here, num_image_tokens, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Rows; where a prompt's (rows, channels) and (rows, rows) lie; where (channels, tokens here) of the image do."""
    rows, channels = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    wide = prompt * ROWS * CHANNELS + rows[:, None] * CHANNELS + channels[None, :]
    narrow = prompt * ROWS * ROWS + rows[:, None] * ROWS + rows[None, :]
    return rows, wide, narrow, channels[:, None] * num_image_tokens + here[None, :]


@triton.jit
def _write_first(
    key, value, gram, shared_query, shared_cross, largest, square, basis, scale, num_image_tokens, per_channel, eps,
    num_tokens, HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = HEADS * TOKENS
    prompt = tl.program_id(1).to(tl.int64)
    here = tl.program_id(0) * TILE + tl.arange(0, TILE)
    rows, wide, narrow, at = _addresses(prompt, here, num_image_tokens, ROWS, CHANNELS)
    scores = tl.dot(tl.load(key + wide), tl.load(shared_query + at))
    weights = _over_tokens(scores, num_tokens, HEADS, TOKENS, TILE)
    cross = tl.dot(tl.load(value + wide), tl.load(shared_cross + at))
    cross += tl.dot(tl.load(gram + narrow), weights.to(basis.dtype.element_ty)) * tl.load(largest + prompt)
    variance = tl.load(square + here) + tl.sum(cross * weights, 0)
    factor = tl.rsqrt(variance * per_channel + eps)
    tl.store(scale + prompt * 2 * num_image_tokens + here, factor)
    basis += prompt * 2 * ROWS * num_image_tokens + rows[:, None] * num_image_tokens + here[None, :]
    tl.store(basis, (weights * factor[None, :]).to(basis.dtype.element_ty))


@triton.jit
def _write_second(
    key, value0, value1, mixed, gram00, gram01, gram11, shared_query, shared_query_pe, shared_cross0, shared_cross1,
    largest, constant, constant_square, square, cross_constant, basis, scale, num_image_tokens, per_channel, eps,
    num_tokens, HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = HEADS * TOKENS
    prompt = tl.program_id(1).to(tl.int64)
    here = tl.program_id(0) * TILE + tl.arange(0, TILE)
    rows, wide, narrow, at = _addresses(prompt, here, num_image_tokens, ROWS, CHANNELS)
    basis += prompt * 2 * ROWS * num_image_tokens + rows[:, None] * num_image_tokens + here[None, :]
    scale += prompt * 2 * num_image_tokens + here
    factor = tl.load(scale)
    added = tl.load(basis)
    kind = added.dtype
    keys = tl.load(key + wide)
    scores = tl.dot(keys, tl.load(shared_query + at)) * factor[None, :]
    scores = tl.dot(keys, tl.load(shared_query_pe + at), scores)
    scores = tl.dot(tl.load(mixed + narrow), added, scores)
    weights = _over_tokens(scores, num_tokens, HEADS, TOKENS, TILE)
    half = weights.to(kind)

    # The variance: pairs of rows of the first pass, of the first and the second, of the second, and the constant's.
    largest = tl.load(largest + prompt)
    cross = tl.dot(tl.load(value0 + wide), tl.load(shared_cross0 + at)) * factor[None, :]
    inner = tl.dot(tl.load(gram00 + narrow), added)
    cross += tl.dot(tl.load(gram01 + narrow), half, inner) * largest
    cross += tl.load(constant + prompt * 2 * ROWS + rows)[:, None]
    variance = tl.sum(cross * added.to(tl.float32), 0)
    cross = tl.dot(tl.load(value1 + wide), tl.load(shared_cross1 + at)) * factor[None, :]
    cross += tl.dot(tl.load(gram11 + narrow), half) * largest
    cross += tl.load(constant + prompt * 2 * ROWS + ROWS + rows)[:, None]
    variance += tl.sum(cross * weights, 0)
    variance += tl.load(constant_square + prompt) + 2.0 * factor * tl.load(cross_constant + here)
    variance += factor * factor * tl.load(square + here)
    norm = tl.rsqrt(variance * per_channel + eps)
    tl.store(scale, factor * norm)
    tl.store(scale + num_image_tokens, norm)
    tl.store(basis, (added.to(tl.float32) * norm[None, :]).to(kind))
    tl.store(basis + ROWS * num_image_tokens, (weights * norm[None, :]).to(kind))


@triton.jit
def _read(
    query, mixed, constant, shared_key, shared_key_pe, shared_value, basis, scale, own, own_constant, shared,
    num_image_tokens, ROWS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = 2 if BOTH else 1
    prompt = tl.program_id(0).to(tl.int64)
    rows, channels = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    wide = prompt * ROWS * CHANNELS + rows[:, None] * CHANNELS + channels[None, :]
    square = rows[:, None] * ROWS + rows[None, :]
    mixed += prompt * PARTS * ROWS * ROWS + square
    basis += prompt * 2 * ROWS * num_image_tokens + rows[:, None] * num_image_tokens
    scale += prompt * 2 * num_image_tokens
    queries, mixed0 = tl.load(query + wide), tl.load(mixed)
    kind = mixed0.dtype
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sum0 = tl.zeros([ROWS, ROWS], tl.float32)
    sum_shared = tl.zeros([ROWS, CHANNELS], tl.float32)
    if BOTH:
        mixed1 = tl.load(mixed + ROWS * ROWS)
        constants = tl.load(constant + prompt * ROWS + rows)
        sum1 = tl.zeros([ROWS, ROWS], tl.float32)
        sum_constant = tl.zeros([ROWS], tl.float32)
    for start in range(0, num_image_tokens, TILE):
        here = start + tl.arange(0, TILE)
        at = channels[:, None] * num_image_tokens + here[None, :]
        factor = tl.load(scale + here)
        added0 = tl.load(basis + here[None, :])
        scores = tl.dot(queries, tl.load(shared_key + at)) * factor[None, :]
        scores = tl.dot(queries, tl.load(shared_key_pe + at), scores)
        scores = tl.dot(mixed0, added0, scores)
        if BOTH:
            added1 = tl.load(basis + ROWS * num_image_tokens + here[None, :])
            norm = tl.load(scale + num_image_tokens + here)
            scores = tl.dot(mixed1, added1, scores) + constants[:, None] * norm[None, :]
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        fade = tl.exp(highest - new_highest)
        highest = new_highest
        weights = tl.exp(scores - new_highest[:, None])
        total = total * fade + tl.sum(weights, 1)
        half = weights.to(kind)
        sum0 = tl.dot(half, tl.trans(added0), sum0 * fade[:, None])
        if BOTH:
            sum1 = tl.dot(half, tl.trans(added1), sum1 * fade[:, None])
            sum_constant = sum_constant * fade + tl.sum(weights * norm[None, :], 1)
        values = tl.load(shared_value + here[:, None] * CHANNELS + channels[None, :])
        sum_shared = tl.dot((weights * factor[None, :]).to(kind), values, sum_shared * fade[:, None])
    own += prompt * 2 * ROWS * ROWS + square
    tl.store(own, sum0 / total[:, None])
    if BOTH:
        tl.store(own + ROWS * ROWS, sum1 / total[:, None])
        tl.store(own_constant + prompt * ROWS + rows, sum_constant / total)
    tl.store(shared + wide, sum_shared / total[:, None])
