"""The decoder's two passes over the image tokens in half precision; the twins are in `weaksam.sam.passes`.

A pass is two kernels. In the first, image tokens attend to the prompt tokens: a program takes a tile of image tokens of
a prompt and keeps scores, softmax and variance in registers; only the basis is written, in half precision. In the
second, prompt tokens attend to the image: a program takes a prompt and loops over the image once. Its softmax is online
(Milakov and Gimelshein, arXiv 1805.02867). Inputs of products are rounded to half precision, sums and softmaxes are
float32.

`layout` describes the padding of rows and channels.

Axis legend: B prompts, T prompt tokens, H heads, d channels of a head, D = H d, N image tokens.
"""

# A type checker cannot check Triton's language.
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
from weaksam.sam.passes import Gathered, ImageToToken, PromptSide, TokenToImage

# Image tokens of a program of image-to-token attention, and of a step of token-to-image attention: the largest that fit
# the registers of sm_90.
IMAGE_TO_TOKEN_TILE, TOKEN_TO_IMAGE_TILE, WARPS = 64, 32, 8


def first_pass(
    image: ImageSide, image_to_token: ImageToToken, token_to_image: TokenToImage, *, dtype: torch.dtype
) -> tuple[PromptSide, Gathered]:
    """Image-to-token attention of layer 0, then token-to-image attention of layer 1.

    Returns:
        prompt_side: `basis` (B, 2 rows, N) in `dtype`, first half filled; `key_scale` (B, 2, N), first row filled.
        gathered: same as the twin's.
    """
    at, layer = Layout.of(image_to_token.key), image.layers[0]
    num_prompts, num_image_tokens = len(image_to_token.key), layer.square.shape[0]
    basis = image_to_token.key.new_empty(num_prompts, 2 * at.rows, num_image_tokens, dtype=dtype)
    scale = layer.square.new_empty(num_prompts, 2, num_image_tokens)
    largest = _largest(image_to_token.gram)
    key, value, gram, query, cross = _in(
        dtype,
        *(at.lay_out(x) for x in (image_to_token.key, 2 * image_to_token.values[0])),
        at.pad_square(image_to_token.gram / largest),
        *(at.lay_out_shared(x) for x in (layer.query, image.cross[0])),
    )
    _image_to_token_first[(num_image_tokens // IMAGE_TO_TOKEN_TILE, num_prompts)](
        key, value, gram, query, cross, largest, layer.square, basis, scale, num_image_tokens,
        1.0 / image.bias.shape[0], layer.eps, at.num_tokens, at.padded_heads, at.tokens, at.channels,
        IMAGE_TO_TOKEN_TILE, num_warps=WARPS,
    )  # fmt: skip
    return PromptSide(basis, scale), _gather(at, image.layers[1].read, token_to_image, basis, scale)


def second_pass(
    image: ImageSide,
    first: PromptSide,
    image_to_token: ImageToToken,
    token_to_image: TokenToImage,
    *,
    dtype: torch.dtype,
) -> tuple[PromptSide, Gathered]:
    """Image-to-token attention of layer 1, then the final token-to-image attention. Overwrites `first`.

    Returns:
        prompt_side: `basis` has no row for the constant: the second row of `key_scale` holds it.
        gathered: same as the twin's.
    """
    at, layer, num_rows = Layout.of(image_to_token.key), image.layers[1], image_to_token.gram.shape[1] // 2
    num_prompts, num_image_tokens = len(image_to_token.key), layer.square.shape[0]
    assert image_to_token.mixed is not None
    assert layer.query_pe is not None
    gram, own = image_to_token.gram, (slice(num_rows), slice(num_rows, 2 * num_rows))
    constant = torch.stack([at.pad_rows(2 * gram[:, -1, part], 1) for part in own], dim=1)
    constant_square, largest = gram[:, -1, -1].contiguous(), _largest(gram)
    gram = gram / largest
    operands = _in(
        dtype,
        *(at.lay_out(x) for x in (image_to_token.key, 2 * image_to_token.values[0], 2 * image_to_token.values[1])),
        *(at.pad_square(x) for x in (image_to_token.mixed, gram[:, own[0], own[0]], 2 * gram[:, own[0], own[1]])),
        at.pad_square(gram[:, own[1], own[1]]),
        *(at.lay_out_shared(x) for x in (layer.query, layer.query_pe, image.cross[1], image.cross[2])),
    )
    _image_to_token_second[(num_image_tokens // IMAGE_TO_TOKEN_TILE, num_prompts)](
        *operands, largest, constant, constant_square, layer.square, image.cross_bias, first.basis,
        first.key_scale, num_image_tokens, 1.0 / image.bias.shape[0], layer.eps, at.num_tokens, at.padded_heads,
        at.tokens, at.channels, IMAGE_TO_TOKEN_TILE, num_warps=WARPS,
    )  # fmt: skip
    return first, _gather(at, image.final, token_to_image, first.basis, first.key_scale)


def _gather(at: Layout, reader: Reader, token_to_image: TokenToImage, basis: Tensor, scale: Tensor) -> Gathered:
    """Token-to-image attention over the rows that one pass added, or over those of both passes and the constant."""
    assert reader.key_pe is not None
    num_prompts, num_rows = len(token_to_image.query), at.heads * at.num_tokens
    both = token_to_image.mixed.shape[2] > num_rows
    mixed = [at.pad_square(part) for part in token_to_image.mixed[..., : 2 * num_rows].split(num_rows, dim=2)]
    query, mixed, key, key_pe, value = _in(
        basis.dtype,
        at.lay_out(token_to_image.query),
        torch.stack(mixed, dim=1),
        *(at.lay_out_shared(x) for x in (reader.key, reader.key_pe)),
        at.lay_out_shared(reader.value.mT).T,
    )
    constant = at.pad_rows(token_to_image.mixed[..., -1], 1).contiguous()
    own = constant.new_empty(num_prompts, 2, at.rows, at.rows)
    own_constant = torch.empty_like(constant)
    shared = constant.new_empty(num_prompts, at.rows, at.channels)
    _token_to_image[(num_prompts,)](
        query, mixed, constant, key, key_pe, value, basis, scale, own, own_constant, shared, basis.shape[2],
        at.rows, at.channels, TOKEN_TO_IMAGE_TILE, both, num_warps=WARPS,
    )  # fmt: skip
    sums = [at.cut_rows(at.cut_rows(own[:, i], 1), 2) for i in range(2 if both else 1)]
    if both:
        sums.append(at.cut_rows(own_constant, 1)[..., None])
    return Gathered(torch.cat(sums, dim=2), at.take_heads(shared))


def read_unchanged(reader: Reader, query: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Token-to-image attention to unchanged image tokens, with the queries of all prompts as one sequence."""
    together, key, value = _in(dtype, query.transpose(0, 1).flatten(1, 2), reader.key.mT, reader.value)
    attended = F.scaled_dot_product_attention(together[None], key[None], value[None], scale=1.0)[0].float()
    return attended.unflatten(1, (len(query), -1)).transpose(0, 1)


def _largest(gram: Tensor) -> Tensor:
    """Returns (B, 1, 1) maximum inner product of each prompt: divided by it, all fit half precision."""
    return gram.abs().amax((1, 2), keepdim=True).clamp(min=1e-30)


def _in(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [x.to(dtype).contiguous() for x in tensors]


@triton.jit
def _over_tokens(scores, num_tokens, HEADS: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr):
    """Computes the softmax over the prompt tokens of each head."""
    scores = tl.reshape(scores, (HEADS, TOKENS, TILE))
    is_token = tl.arange(0, TOKENS)[None, :, None] < num_tokens
    scores = tl.where(is_token, scores, -float("inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None, :])
    weights = weights / tl.sum(weights, 1)[:, None, :]
    return tl.reshape(weights, (HEADS * TOKENS, TILE))


@triton.jit
def _addresses(prompt, image_tokens, num_image_tokens, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Returns rows, offsets of a prompt's (rows, channels) and (rows, rows), and of the image's (channels, tokens)."""
    rows, channels = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    wide = prompt * ROWS * CHANNELS + rows[:, None] * CHANNELS + channels[None, :]
    narrow = prompt * ROWS * ROWS + rows[:, None] * ROWS + rows[None, :]
    return rows, wide, narrow, channels[:, None] * num_image_tokens + image_tokens[None, :]


@triton.jit
def _image_to_token_first(
    key, value, gram, shared_query, shared_cross, largest, square, basis, scale, num_image_tokens, per_channel, eps,
    num_tokens, HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = HEADS * TOKENS
    prompt = tl.program_id(1).to(tl.int64)
    image_tokens = tl.program_id(0) * TILE + tl.arange(0, TILE)
    rows, wide, narrow, at = _addresses(prompt, image_tokens, num_image_tokens, ROWS, CHANNELS)
    scores = tl.dot(tl.load(key + wide), tl.load(shared_query + at))
    weights = _over_tokens(scores, num_tokens, HEADS, TOKENS, TILE)
    cross = tl.dot(tl.load(value + wide), tl.load(shared_cross + at))
    cross += tl.dot(tl.load(gram + narrow), weights.to(basis.dtype.element_ty)) * tl.load(largest + prompt)
    variance = tl.load(square + image_tokens) + tl.sum(cross * weights, 0)
    factor = tl.rsqrt(variance * per_channel + eps)
    tl.store(scale + prompt * 2 * num_image_tokens + image_tokens, factor)
    basis += prompt * 2 * ROWS * num_image_tokens + rows[:, None] * num_image_tokens + image_tokens[None, :]
    tl.store(basis, (weights * factor[None, :]).to(basis.dtype.element_ty))


@triton.jit
def _image_to_token_second(
    key, value0, value1, mixed, gram00, gram01, gram11, shared_query, shared_query_pe, shared_cross0, shared_cross1,
    largest, constant, constant_square, square, cross_constant, basis, scale, num_image_tokens, per_channel, eps,
    num_tokens, HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = HEADS * TOKENS
    prompt = tl.program_id(1).to(tl.int64)
    image_tokens = tl.program_id(0) * TILE + tl.arange(0, TILE)
    rows, wide, narrow, at = _addresses(prompt, image_tokens, num_image_tokens, ROWS, CHANNELS)
    basis += prompt * 2 * ROWS * num_image_tokens + rows[:, None] * num_image_tokens + image_tokens[None, :]
    scale += prompt * 2 * num_image_tokens + image_tokens
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
    variance += tl.load(constant_square + prompt) + 2.0 * factor * tl.load(cross_constant + image_tokens)
    variance += factor * factor * tl.load(square + image_tokens)
    norm = tl.rsqrt(variance * per_channel + eps)
    tl.store(scale, factor * norm)
    tl.store(scale + num_image_tokens, norm)
    tl.store(basis, (added.to(tl.float32) * norm[None, :]).to(kind))
    tl.store(basis + ROWS * num_image_tokens, (weights * norm[None, :]).to(kind))


@triton.jit
def _token_to_image(
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
        image_tokens = start + tl.arange(0, TILE)
        at = channels[:, None] * num_image_tokens + image_tokens[None, :]
        factor = tl.load(scale + image_tokens)
        added0 = tl.load(basis + image_tokens[None, :])
        scores = tl.dot(queries, tl.load(shared_key + at)) * factor[None, :]
        scores = tl.dot(queries, tl.load(shared_key_pe + at), scores)
        scores = tl.dot(mixed0, added0, scores)
        if BOTH:
            added1 = tl.load(basis + ROWS * num_image_tokens + image_tokens[None, :])
            norm = tl.load(scale + num_image_tokens + image_tokens)
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
        values = tl.load(shared_value + image_tokens[:, None] * CHANNELS + channels[None, :])
        sum_shared = tl.dot((weights * factor[None, :]).to(kind), values, sum_shared * fade[:, None])
    own += prompt * 2 * ROWS * ROWS + square
    tl.store(own, sum0 / total[:, None])
    if BOTH:
        tl.store(own + ROWS * ROWS, sum1 / total[:, None])
        tl.store(own_constant + prompt * ROWS + rows, sum_constant / total)
    tl.store(shared + wide, sum_shared / total[:, None])
