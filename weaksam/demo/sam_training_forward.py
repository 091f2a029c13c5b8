"""Forward pass of SAM's own modules for training: same results as their `forward`, at a fraction of the memory traffic.

Differs from calling the modules in four ways, none of which changes the meaning of a weight: image tokens stay
channels-last, computation shared by prompts is done once per image, decomposed relative positions are extra channels of
the attention (so fused attention applies), and masks are enlarged only in the chosen cells.

Axis legend: B images, P prompts of an image, T prompt tokens, N image tokens (S x S), K chosen cells, C channels,
M masks (4). A cell is one image token: 4 x 4 low-resolution mask pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weaksam.sam.attention import attend_augmented, relative_scores
from weaksam.sam.build import ConvStem

Module = Any  # a module of SAM; torch declares no types of a module's attributes

PROMPT_ABSENT, PROMPT_PAD, PROMPT_NEGATIVE, PROMPT_POSITIVE, PROMPT_TOP_LEFT, PROMPT_BOTTOM_RIGHT = -2, -1, 0, 1, 2, 3


def _linear(x: Tensor, layer: Module) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def _norm(x: Tensor, layer: Module) -> Tensor:
    """LayerNorm, or SAM's LayerNorm2d, over the last axis."""
    return F.layer_norm(x, x.shape[-1:], layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(-2, -3).flatten(-2)


def _self_attention(x: Tensor, layer: Module) -> Tensor:
    """Computes encoder attention with decomposed relative positions; x is (B', S, S, C)."""
    batch, side, _, channels = x.shape
    q, k, v = _linear(x, layer.qkv).unflatten(3, (3, layer.num_heads, -1)).permute(3, 0, 4, 1, 2, 5).flatten(1, 2)
    rows, columns = relative_scores(q, layer.rel_pos_h, 1), relative_scores(q, layer.rel_pos_w, 2)
    out = attend_augmented(*(part.flatten(1, 2) for part in (q, k, v, rows, columns)))
    return _linear(out.unflatten(0, (batch, -1)).transpose(1, 2).reshape(batch, side, side, channels), layer.proj)


def _block(x: Tensor, block: Module) -> Tensor:
    batch, side, _, channels = x.shape
    y, window = _norm(x, block.norm1), block.window_size
    if window:
        tiles = side // window
        y = y.view(batch, tiles, window, tiles, window, channels).transpose(2, 3).reshape(-1, window, window, channels)
        y = _self_attention(y, block.attn)
        y = y.view(batch, tiles, tiles, window, window, channels).transpose(2, 3).reshape(x.shape)
    else:
        y = _self_attention(y, block.attn)
    x = x + y
    return x + _linear(F.gelu(_linear(_norm(x, block.norm2), block.mlp.lin1)), block.mlp.lin2)


def _embed_patches(stem: Module, pixels: Tensor) -> Tensor:
    """Applies SAM's patch embedding, or a `ConvStem`: (B, 3, H, W) -> (B, S, S, C)."""
    has_convs = isinstance(stem, ConvStem)
    convs: Module = stem.convs if has_convs else [stem.proj]
    first = convs[0]
    patch, side = first.kernel_size[0], pixels.shape[-1] // first.kernel_size[0]
    x = pixels.unflatten(3, (side, patch)).unflatten(2, (side, patch)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    x = F.linear(x, first.weight.flatten(1).to(x.dtype), first.bias.to(x.dtype))
    for norm, conv in zip(stem.norms if has_convs else [], convs[1:], strict=True):
        x = F.gelu(_norm(x, norm)).permute(0, 3, 1, 2)
        x = F.conv2d(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype), stride=2, padding=1).permute(0, 2, 3, 1)
    return x


def encode_images(encoder: Module, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Encodes normalised pictures (B, 3, side, side) to (B, N, C) in `dtype`; S must be a multiple of the window."""
    x = _embed_patches(encoder.patch_embed, pixels.to(dtype))
    x = x + encoder.pos_embed.to(dtype)
    for block in encoder.blocks:
        x = _block(x, block)
    neck = encoder.neck
    x = _norm(F.linear(x, neck[0].weight.flatten(1).to(dtype)), neck[1])
    x = F.conv2d(x.permute(0, 3, 1, 2), neck[2].weight.to(dtype), padding=1).permute(0, 2, 3, 1)
    return _norm(x, neck[3]).flatten(1, 2)


def embed_prompts(encoder: Module, coords: Tensor, labels: Tensor) -> Tensor:
    """Prompt tokens (B, P, T, C) float32 from `coords` (B, P, T, 2), xy pixels, and `labels` (B, P, T)."""
    where = encoder.pe_layer.forward_with_coords((coords + 0.5).flatten(0, 1), encoder.input_image_size)
    where = where.view(*coords.shape[:-1], -1) * (labels >= PROMPT_NEGATIVE).unsqueeze(-1)
    table = torch.cat([encoder.not_a_point_embed.weight, *(e.weight for e in encoder.point_embeddings)])
    return where + table[labels.clamp(min=PROMPT_PAD) + 1]


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, absent: Tensor | None = None) -> Tensor:
    """Computes attention of (..., Q, C) to (..., K, C); `absent` (..., 1, 1, K) is added to the logits."""
    q, k, v = _split_heads(q, heads), _split_heads(k, heads), _split_heads(v, heads)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if absent is not None:
        logits = logits + absent
    return _merge_heads(logits.softmax(-1) @ v)


def _project(x: Tensor, pe: Tensor, with_pe: list[Module], plain: list[Module]) -> tuple[Tensor, ...]:
    """Computes `layer(x + pe)` for `with_pe` and `layer(x)` for `plain` layers as one product over `x`."""
    layers = with_pe + plain
    weight = torch.cat([layer.weight for layer in layers]).to(x.dtype)
    bias = torch.cat([layer.bias for layer in layers]).to(x.dtype)
    widths = [layer.out_features for layer in layers]
    shift = F.linear(pe, weight[: sum(widths[: len(with_pe)])])
    return (F.linear(x, weight, bias) + F.pad(shift, (0, sum(widths[len(with_pe) :])))).split(widths, -1)


def run_decoder(decoder: Module, image: Tensor, pe: Tensor, prompts: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the two-way transformer for every prompt of every image.

    Args:
        image: (B, N, C), the embedding plus `no_mask_embed`.
        pe: (N, C), positions of the cells.
        prompts: (B, P, T, C); labels: (B, P, T), tokens labelled PROMPT_ABSENT are masked.

    Returns:
        tokens: (B, P, 1 + M, C), the IoU token and the mask tokens.
        cells: (B, P, N, C).
    """
    learnt = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).to(image.dtype)
    query_pe = torch.cat([learnt.expand(*prompts.shape[:2], -1, -1), prompts.to(image.dtype)], 2)
    absent = F.pad((labels == PROMPT_ABSENT).to(image.dtype) * -1e4, (len(learnt), 0))[:, :, None, None, :]
    queries, keys = query_pe, image.unsqueeze(1)
    for layer in decoder.transformer.layers:
        own, to_image, to_token = layer.self_attn, layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        q = queries if layer.skip_first_layer_pe else queries + query_pe
        mixed = _attend(
            _linear(q, own.q_proj), _linear(q, own.k_proj), _linear(queries, own.v_proj), own.num_heads, absent
        )
        mixed = _linear(mixed, own.out_proj)
        queries = _norm(mixed if layer.skip_first_layer_pe else queries + mixed, layer.norm1)
        k, image_q, v = _project(keys, pe, [to_image.k_proj, to_token.q_proj], [to_image.v_proj])
        attended = _attend(_linear(queries + query_pe, to_image.q_proj), k, v, to_image.num_heads)
        queries = _norm(queries + _linear(attended, to_image.out_proj), layer.norm2)
        queries = _norm(queries + _linear(F.relu(_linear(queries, layer.mlp.lin1)), layer.mlp.lin2), layer.norm3)
        token_k, token_v = _linear(queries + query_pe, to_token.k_proj), _linear(queries, to_token.v_proj)
        cell_update = _attend(image_q, token_k, token_v, to_token.num_heads, absent)
        keys = _norm(keys + _linear(cell_update, to_token.out_proj), layer.norm4)
    final = decoder.transformer.final_attn_token_to_image
    k, v = _project(keys, pe, [final.k_proj], [final.v_proj])
    attended = _attend(_linear(queries + query_pe, final.q_proj), k, v, final.num_heads)
    queries = _norm(queries + _linear(attended, final.out_proj), decoder.transformer.norm_final_attn)
    return queries[:, :, : len(learnt)], keys


def predict_cells(decoder: Module, tokens: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mask logits (B, P, K, 16, M) in cell order, and predicted IoU (B, P, M), both float32.

    The 16 pixels of a cell are in the order of the two nested 2 x 2 enlargements; `CELL_PIXELS` lists them.
    """
    grow = decoder.output_upscaling
    x = F.gelu(_norm(_enlarge(cells, grow[0]), grow[1]))
    x = F.gelu(_enlarge(x, grow[3])).flatten(-3, -2)  # (B, P, K, 16, C / 8)
    tokens = tokens.float()
    weights = torch.stack([mlp(tokens[:, :, 1 + m]) for m, mlp in enumerate(decoder.output_hypernetworks_mlps)], -1)
    logits = x.flatten(2, 3) @ weights.to(x.dtype)  # (B, P, K * 16, M)
    return logits.unflatten(2, (-1, 16)).float(), decoder.iou_prediction_head(tokens[:, :, 0])


def _enlarge(x: Tensor, layer: Module) -> Tensor:
    """Applies a 2 x 2 transposed convolution as a product: (..., C) -> (..., 4, C'), pixels in row-major order."""
    weight = layer.weight.permute(2, 3, 1, 0).flatten(0, 2).to(x.dtype)
    return F.linear(x, weight, layer.bias.repeat(4).to(x.dtype)).unflatten(-1, (4, -1))


# (16,) row and column inside a 4 x 4 cell of each pixel of `predict_cells`
CELL_PIXELS = [(2 * (a // 2) + b // 2, 2 * (a % 2) + b % 2) for a in range(4) for b in range(4)]
