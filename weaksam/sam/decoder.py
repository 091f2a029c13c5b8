"""SAM's mask decoder for thousands of prompts on one image, restated so that no prompt has image tokens of its own.

SAM copies the N image tokens for every prompt, adds to them in two layers and projects them each time. But all that a
prompt ever adds to the image tokens is `attention weights over its T prompt tokens` x `T small vectors`, and between
additions stands only a LayerNorm, which is linear up to one scale per token. So with K the image's centred tokens,

    keys1 = r1 (K + P0' U0) g1 + b1                     P0 (R, N): softmax over the prompt tokens, per head; R = H T
    keys2 = r2 (r1 K g1 + Q' U) g2 + b2                 Q = (r1 P0, P1, 1)  (2R + 1, N),  U = (U0 g1, U1, b1)

(' is transpose; r1, r2 (N) are reciprocal standard deviations). Every product with keys1 or keys2 splits into a
product with K, projected once per image and shared by all prompts, and one of width 2R + 1 (113 for a point). The
variances are quadratic forms in P0 and Q. Nothing is approximated: results equal `segment_anything` to rounding, at
a quarter of its multiplications. Weights stay those of the wrapped `Sam`; only products of theirs are made per image.

Axis legend: B prompts, T prompt tokens, H heads, d channels of a head, D = H d, C channels, N image tokens, R = H T,
n tokens inside the unpadded image, S mask slots (0: the single mask; 1, 2, 3: the masks of an ambiguous prompt).
"""

# segment_anything declares no attribute types, so to a type checker each of its weights is "Tensor | Module".
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from weaksam.sam.image_side import ImageSide, Layer, Reader, upscaling_matrix


@dataclass(frozen=True)
class _PromptSide:
    """What prompts add to the image tokens: these are basis' update + key_scale * shared tokens + a common bias.

    Attributes:
        basis: (B, rows, N).
        update: (B, rows, C).
        key_scale: (B, 1, N).
    """

    basis: Tensor
    update: Tensor
    key_scale: Tensor


@dataclass(frozen=True)
class Decoded:
    """Prompts after the transformer: what scores their masks, and what it takes to draw them.

    Attributes:
        predicted_iou: (B, S) float32, the decoder's own estimate.
        hyper: (B, S, c) weights that turn an upscaled token into one logit per slot.
        prompt_side: what the prompts added to the image tokens.
    """

    predicted_iou: Tensor
    hyper: Tensor
    prompt_side: _PromptSide


def decode_prompts(sam: Sam, image: ImageSide, prompts: Tensor, slots: Sequence[int]) -> Decoded:
    """Runs the two-way transformer for prompts of one image.

    Args:
        prompts: (B, T - 5, C) embedded points and box corners; SAM's own 5 tokens are added here.
        slots: which of the masks 0..3 to score.
    """
    decoder = sam.mask_decoder
    first, second = decoder.transformer.layers
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    pe = torch.cat([own.expand(len(prompts), -1, -1), prompts], dim=1)

    tokens = first.norm1(first.self_attn(q=pe, k=pe, v=pe))
    tokens = _absorb(first, tokens, _read_first(first.cross_attn_token_to_image, tokens + pe, image.layers[0].read))
    num_rows = image.layers[0].read.key.shape[0] * pe.shape[1]
    basis = tokens.new_empty(len(pe), 2 * num_rows + 1, image.cross_bias.shape[0])
    weights0, weights1 = basis[:, :num_rows], basis[:, num_rows:-1]
    values0 = _write(first.cross_attn_image_to_token, tokens, pe, image.layers[0], None, out=weights0)
    update0 = _spread(values0, image.writers[0])
    scale1 = _first_scale(image, weights0, values0, update0)
    weights0 *= scale1

    prompt_side = _PromptSide(weights0, update0 * first.norm4.weight, scale1)
    tokens = second.norm1(tokens + second.self_attn(q=tokens + pe, k=tokens + pe, v=tokens))
    context = _read(second.cross_attn_token_to_image, tokens + pe, image.layers[1].read, prompt_side)
    tokens = _absorb(second, tokens, context)
    values1 = _write(second.cross_attn_image_to_token, tokens, pe, image.layers[1], prompt_side, out=weights1)
    basis[:, -1] = 1.0

    constant = image.bias.expand(len(pe), 1, -1)
    update = torch.cat([_spread(values0, image.writers[1]), _spread(values1, image.writers[2]), constant], dim=1)
    scale2 = _second_scale(image, basis, (values0, values1), update, scale1)
    basis *= scale2
    prompt_side = _PromptSide(basis, update * second.norm4.weight, scale1 * scale2)
    context = _read(decoder.transformer.final_attn_token_to_image, tokens + pe, image.final, prompt_side)
    return _score(decoder, decoder.transformer.norm_final_attn(tokens + context), prompt_side, list(slots))


def _score(decoder: nn.Module, tokens: Tensor, prompt_side: _PromptSide, slots: list[int]) -> Decoded:
    """The heads that need only tokens: predicted IoU and the hypernetworks of the asked slots."""
    hyper = [decoder.output_hypernetworks_mlps[slot](tokens[:, 1 + slot]) for slot in slots]
    return Decoded(
        predicted_iou=decoder.iou_prediction_head(tokens[:, 0])[:, slots],
        hyper=torch.stack(hyper, dim=1),
        prompt_side=prompt_side,
    )


def _absorb(block: nn.Module, tokens: Tensor, context: Tensor) -> Tensor:
    """Adds what was read from the image, then the MLP."""
    tokens = block.norm2(tokens + context)
    return block.norm3(tokens + block.mlp(tokens))


def _read_first(attention: nn.Module, tokens: Tensor, reader: Reader) -> Tensor:
    """Prompt tokens read image tokens that no prompt has changed: (B, T, C) to (B, T, C)."""
    query = _heads(attention.q_proj(tokens), attention)
    weights = _scores(query, reader.key).softmax(dim=-1)
    return attention.out_proj(_merged(_context(weights, reader.value)))


def _read(attention: nn.Module, tokens: Tensor, reader: Reader, own: _PromptSide) -> Tensor:
    """Prompt tokens read image tokens that their prompt has changed: (B, T, C) to (B, T, C)."""
    query = _heads(attention.q_proj(tokens), attention)
    num_heads, num_tokens = query.shape[1:3]
    own_key = _project(own.update, attention.k_proj.weight, num_heads)
    mixed = (query @ own_key.transpose(-1, -2)).flatten(1, 2)  # (B, R, rows of the basis)
    scores = _scores(query, reader.key).mul_(own.key_scale).baddbmm_(mixed, own.basis)
    weights = _scores(query, reader.key_pe, onto=scores).softmax(dim=-1)

    read_own = (weights @ own.basis.transpose(-1, -2)).unflatten(1, (num_heads, num_tokens))
    own_value = _project(own.update, attention.v_proj.weight, num_heads)
    context = read_own @ own_value + _context(weights.mul_(own.key_scale), reader.value)
    return attention.out_proj(_merged(context) + reader.value_bias)


def _write(
    attention: nn.Module, tokens: Tensor, pe: Tensor, layer: Layer, own: _PromptSide | None, *, out: Tensor
) -> Tensor:
    """Image tokens read the prompt tokens.

    Args:
        out: (B, R, N), becomes the softmax over the prompt tokens, per head.

    Returns:
        (B, H, T, d) values of the prompt tokens.
    """
    key = _heads(attention.k_proj(tokens + pe), attention)
    num_heads, num_tokens = key.shape[1:3]
    scores = _scores(key, layer.query)
    if own is not None:
        own_query = _project(own.update, attention.q_proj.weight, num_heads)
        mixed = (key @ own_query.transpose(-1, -2)).flatten(1, 2)
        _scores(key, layer.query_pe, onto=scores.mul_(own.key_scale).baddbmm_(mixed, own.basis))
    per_head = (num_heads, num_tokens)
    torch.softmax(scores.unflatten(1, per_head), dim=2, out=out.unflatten(1, per_head))
    return attention.v_proj(tokens).unflatten(2, (num_heads, -1)).transpose(1, 2)


def _first_scale(image: ImageSide, weights: Tensor, values: Tensor, update: Tensor) -> Tensor:
    """r1, (B, 1, N): one over the standard deviation of K + P0' U0."""
    layer = image.layers[0]
    own = _scores(2 * values, image.cross[0]).baddbmm_(_gram(update), weights).mul_(weights)
    variance = layer.square + own.sum(dim=1, keepdim=True)
    return torch.rsqrt(variance / update.shape[-1] + layer.eps)


def _second_scale(
    image: ImageSide, basis: Tensor, values: tuple[Tensor, Tensor], update: Tensor, scale: Tensor
) -> Tensor:
    """r2, (B, 1, N): one over the standard deviation of r1 K g1 + Q' U."""
    layer, num_rows = image.layers[1], basis.shape[1] // 2
    own = torch.empty_like(basis)
    _scores(2 * values[0], image.cross[1], out=own[:, :num_rows])
    _scores(2 * values[1], image.cross[2], out=own[:, num_rows:-1])
    own[:, -1] = 2 * image.cross_bias
    own = own.mul_(scale).baddbmm_(_gram(update), basis).mul_(basis).sum(dim=1, keepdim=True)
    return torch.rsqrt((scale.square() * layer.square + own) / update.shape[-1] + layer.eps)


def _gram(update: Tensor) -> Tensor:
    """Inner products of the rows of U: (B, rows, C) to (B, rows, rows)."""
    return update @ update.transpose(-1, -2)


def _heads(x: Tensor, attention: nn.Module) -> Tensor:
    """(B, T, D) to (B, H, T, d), scaled for a softmax of scores."""
    x = x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
    return x / math.sqrt(x.shape[-1])


def _merged(x: Tensor) -> Tensor:
    """(B, H, T, d) to (B, T, D)."""
    return x.transpose(1, 2).flatten(2)


def _project(update: Tensor, weight: Tensor, num_heads: int) -> Tensor:
    """Rows of U through a projection: (B, rows, C) to (B, H, rows, d)."""
    return F.linear(update, weight).unflatten(2, (num_heads, -1)).transpose(1, 2)


def _spread(values: Tensor, writer: Tensor) -> Tensor:
    """Values through an output projection, head by head: (B, H, T, d) to (B, R, C)."""
    per_head = writer.unflatten(1, (values.shape[1], -1)).permute(1, 2, 0)  # (H, d, C)
    return (values @ per_head).flatten(1, 2)


def _scores(tokens: Tensor, shared: Tensor, *, out: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
    """Products of prompt tokens with shared image tokens: (B, H, T, d), (H, d, N) to (B, R, N).

    Args:
        out: written to, when given.
        onto: added to in place, when given.
    """
    num_prompts, num_heads, num_tokens, _ = tokens.shape
    if tokens.is_cuda:
        product = (tokens @ shared).flatten(1, 2)
        return out.copy_(product) if out is not None else product if onto is None else onto.add_(product)
    if onto is not None:
        out = onto
    elif out is None:
        out = tokens.new_empty(num_prompts, num_heads * num_tokens, shared.shape[2])
    # On a CPU one product per prompt is fastest: a batched one wants its result heads first and copies it.
    for part, token in zip(out.unflatten(1, (num_heads, num_tokens)), tokens, strict=True):
        torch.baddbmm(part, token, shared, beta=int(onto is not None), out=part)
    return out


def _context(weights: Tensor, shared: Tensor) -> Tensor:
    """Sums of shared image tokens: (B, R, N), (H, N, d) to (B, H, T, d)."""
    per_head = weights.unflatten(1, (len(shared), -1))
    if weights.is_cuda:
        return per_head @ shared
    return torch.stack([torch.bmm(weight, shared) for weight in per_head])


def draw_masks(sam: Sam, image: ImageSide, decoded: Decoded, chosen: Tensor, *, tokens_at_once: int) -> Tensor:
    """Mask logits of some prompts, without the rows and columns that only hold padding.

    Args:
        chosen: (K,) int64 indices of prompts.
        tokens_at_once: image tokens upscaled at a time.

    Returns:
        (K, S, 4 rows, 4 columns) float32.
    """
    own, brush = decoded.prompt_side, _Brush(sam.mask_decoder.output_upscaling, image)
    rows, columns = image.grid_hw
    num_masks = decoded.hyper.shape[1]
    logits = own.basis.new_empty(len(chosen), num_masks, 16 * rows * columns)
    update = own.update[chosen] @ brush.first
    for index, prompt in enumerate(chosen.tolist()):
        basis, key_scale = brush.inside(own.basis[prompt]).T, brush.inside(own.key_scale[prompt]).T
        for start in range(0, rows * columns, tokens_at_once):
            part = slice(start, start + tokens_at_once)
            x = (key_scale[part] * image.upscaled[part]).addmm_(basis[part], update[index])
            pixels = slice(16 * part.start, 16 * part.stop)
            torch.mm(decoded.hyper[prompt], brush.upscale(x).T, out=logits[index, :, pixels])
    # A pixel is token row, sub-row, sub-sub-row by the same of columns.
    logits = logits.view(-1, num_masks, rows, columns, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
    return logits.reshape(-1, num_masks, 4 * rows, 4 * columns)


class _Brush:
    """SAM's upscaling of image tokens to mask features, as matrix products."""

    def __init__(self, upscaling: nn.Sequential, image: ImageSide) -> None:
        first, self.norm, _, second, _ = upscaling
        self.image = image
        self.first = upscaling_matrix(first)
        self.second, self.second_bias = upscaling_matrix(second), second.bias.repeat(4)

    def inside(self, x: Tensor) -> Tensor:
        """Of image tokens those inside the unpadded image: (rows, N) to (rows, n)."""
        rows, columns = self.image.grid_hw
        return x.unflatten(1, self.image.embedding_hw)[:, :rows, :columns].flatten(1)

    def upscale(self, x: Tensor) -> Tensor:
        """(tokens, 4 u) from the first transposed convolution, without bias, to (16 tokens, c). Changes `x`."""
        x += self.image.upscaled_bias
        norm = self.norm
        x = F.layer_norm(x.unflatten(1, (4, -1)).flatten(0, 1), norm.weight.shape, norm.weight, norm.bias, norm.eps)
        x = torch.addmm(self.second_bias, torch.ops.aten.gelu_(x), self.second)
        return torch.ops.aten.gelu_(x).unflatten(1, (4, -1)).flatten(0, 1)
