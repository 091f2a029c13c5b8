"""Mask logits from decoded prompts without a tensor of upscaled tokens; the twin is in `weaksam.sam.mask_head`.

A program computes the 4 x 4 logits of each image token of a tile: nothing else is written. Inputs of
the two upscalings are rounded to half precision; sums, norm, GELU and the product with the masks' vectors are float32.

Axis legend: K prompts chosen, S mask slots, N image tokens, n tokens inside the unpadded image, u channels after the
first upscaling, c after the second.
"""

# A type checker cannot check Triton's language, and segment_anything declares no attribute types.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from segment_anything.modeling import Sam
from torch import Tensor
from torch.nn import functional as F

from weaksam.sam.image_side import ImageSide, upscaling_matrix
from weaksam.sam.kernels.layout import Layout
from weaksam.sam.passes import Decoded

TILE, WARPS = 64, 8  # image tokens of a program


def predict_mask_logits(sam: Sam, image: ImageSide, decoded: Decoded, chosen: Tensor, *, tokens_at_once: int) -> Tensor:
    """Returns mask logits of chosen prompts; see the twin. Ignores `tokens_at_once`: computes all tokens at once."""
    first, norm, _, second, _ = sam.mask_decoder.output_upscaling
    basis, num_heads, num_rows = decoded.prompt_side.basis, len(image.layers[0].query), decoded.update.shape[1] // 2
    at = Layout(num_heads, 0, num_rows // num_heads)
    rows, columns = image.grid_hw
    num_masks, dtype = decoded.hyper.shape[1], basis.dtype
    update = decoded.update[chosen] @ upscaling_matrix(first)  # (K, 2R + 1, 4 u)
    parts = [at.pad_rows(update[:, part], 1) for part in (slice(num_rows), slice(num_rows, 2 * num_rows))]
    update, constant = torch.cat(parts, dim=1).to(dtype).contiguous(), update[:, -1].contiguous()
    logits = constant.new_empty(len(chosen), num_masks, 4 * rows, 4 * columns)
    if not len(chosen):
        return logits
    widths = [x.weight.shape[1] for x in (first, second)]
    padded = [max(16, triton.next_power_of_2(width)) for width in widths]
    # Sub-pixels outermost, channels of both upscalings padded to powers of two with zeros.
    shared = _pad_channels(image.upscaled, *padded[:1])
    shared_bias = _pad_channels(image.upscaled_bias[None], *padded[:1])
    update, constant = _pad_channels(update, padded[0]), _pad_channels(constant, padded[0])
    matrix = F.pad(_pad_channels(upscaling_matrix(second), padded[1]), (0, 0, 0, padded[0] - widths[0]))
    small = [F.pad(x, (0, padded[0] - widths[0])).contiguous() for x in (norm.weight, norm.bias)]
    bias, hyper = (F.pad(x, (0, padded[1] - widths[1])).contiguous() for x in (second.bias, decoded.hyper[chosen]))
    _predict[(triton.cdiv(rows * columns, TILE), len(chosen))](
        chosen, basis, decoded.prompt_side.key_scale, update, constant, shared, shared_bias, *small,
        matrix.to(dtype).contiguous(), bias, hyper, logits, basis.shape[2], image.embedding_hw[1], rows, columns,
        norm.eps, widths[0], num_masks, basis.shape[1], *padded, TILE, num_warps=WARPS,
    )  # fmt: skip
    return logits


def _pad_channels(x: Tensor, width: int) -> Tensor:
    """Pads (..., 4 channels) to (..., 4 width)."""
    x = x.unflatten(-1, (4, -1))
    return F.pad(x, (0, width - x.shape[-1])).flatten(-2).contiguous()


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _predict(
    chosen, basis, scale, update, constant, shared, shared_bias, norm_weight, norm_bias, matrix, bias, hyper, logits,
    num_image_tokens, embedding_columns, rows, columns, eps, width, NUM_MASKS: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr, FINE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(1).to(tl.int64)
    prompt = tl.load(chosen + index)
    inside = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_token = inside < rows * columns
    row, column = inside // columns, inside % columns
    token = row * embedding_columns + column
    basis_rows, channels, fine = tl.arange(0, ROWS), tl.arange(0, CHANNELS), tl.arange(0, FINE)
    at = (prompt * ROWS + basis_rows[None, :]) * num_image_tokens + token[:, None]
    added = tl.load(basis + at, is_token[:, None], 0.0)
    kind = added.dtype
    key_scale = tl.load(scale + prompt * 2 * num_image_tokens + token, is_token, 0.0)
    norm_scale = tl.load(scale + (prompt * 2 + 1) * num_image_tokens + token, is_token, 0.0)
    in_width = channels[None, :] < width
    weight, shift = tl.load(norm_weight + channels), tl.load(norm_bias + channels)
    fine_bias = tl.load(bias + fine)
    height_out, width_out = 4 * rows, 4 * columns
    for sub in range(4):
        first = sub * CHANNELS + channels
        x = tl.load(shared + inside[:, None] * 4 * CHANNELS + first[None, :], is_token[:, None], 0.0)
        x = x * key_scale[:, None] + norm_scale[:, None] * tl.load(constant + index * 4 * CHANNELS + first)[None, :]
        x += tl.load(shared_bias + first)[None, :]
        x = tl.dot(added, tl.load(update + (index * ROWS + basis_rows[:, None]) * 4 * CHANNELS + first[None, :]), x)
        mean = tl.sum(x, 1) / width
        x = tl.where(in_width, x - mean[:, None], 0.0)
        x = x * tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None] * weight[None, :] + shift[None, :]
        x = _gelu(x).to(kind)
        for sub_sub in range(4):
            second = sub_sub * FINE + fine
            y = tl.dot(x, tl.load(matrix + channels[:, None] * 4 * FINE + second[None, :]))
            y = _gelu(y + fine_bias[None, :])
            pixel_row = 4 * row + 2 * (sub // 2) + sub_sub // 2
            pixel_column = 4 * column + 2 * (sub % 2) + sub_sub % 2
            for mask in tl.static_range(NUM_MASKS):
                vector = tl.load(hyper + (index * NUM_MASKS + mask) * FINE + fine)
                logit = tl.sum(y * vector[None, :], 1)
                pixel = ((index * NUM_MASKS + mask) * height_out + pixel_row) * width_out + pixel_column
                tl.store(logits + pixel, logit, is_token)
