"""The two passes of the rewritten decoder over all image tokens, in plain PyTorch: see `decoder` for the symbols.

A pass computes image-to-token attention (softmax over the prompt tokens), normalises the image tokens, and computes
token-to-image attention (softmax over the image). `kernels.passes` does the same in half precision.

Axis legend: B prompts, T prompt tokens, H heads, d channels of a head, N image tokens, R = H T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weaksam.sam.image_side import ImageSide, Reader


@dataclass(frozen=True)
class ImageToToken:
    """Prompt side of an image-to-token attention and of the norm after it; image tokens are the queries.

    Attributes:
        key: (B, H, T, d) scaled for a softmax of scores.
        mixed: (B, R, R) products of keys with the queries of the first pass's update; None in the first pass.
        values: (B, H, T, d) values of the first pass, and of the second.
        gram: (B, rows, rows) inner products of the rows of U.
    """

    key: Tensor
    mixed: Tensor | None
    values: tuple[Tensor, ...]
    gram: Tensor


@dataclass(frozen=True)
class TokenToImage:
    """Prompt side of a token-to-image attention; prompt tokens are the queries.

    Attributes:
        query: (B, H, T, d) scaled for a softmax of scores.
        mixed: (B, R, rows) products of queries with the keys of the prompts' updates.
    """

    query: Tensor
    mixed: Tensor


@dataclass(frozen=True)
class PromptSide:
    """Update of the image tokens by prompts: the tokens are basis' U + key_scale * shared tokens + a common bias.

    Attributes:
        basis: (B, 2R + 1, N); after the first pass only the first R rows are filled.
        key_scale: (B, 1, N).
    """

    basis: Tensor
    key_scale: Tensor


@dataclass(frozen=True)
class Gathered:
    """Attention sums of prompt tokens over the image.

    Attributes:
        own: (B, R, rows) sums of the basis.
        shared: (B, H, T, d) sums of the shared image tokens' values.
    """

    own: Tensor
    shared: Tensor


@dataclass(frozen=True)
class Decoded:
    """Prompts after the transformer: predicted IoU, and the inputs of the mask head.

    Attributes:
        predicted_iou: (B, S) float32, the decoder's own estimate.
        hyper: (B, S, c) weights that turn an upscaled token into one logit per slot.
        update: (B, 2R + 1, C) U g2, the update of an image token per unit of the basis.
        prompt_side: the basis.
    """

    predicted_iou: Tensor
    hyper: Tensor
    update: Tensor
    prompt_side: PromptSide


def first_pass(
    image: ImageSide, image_to_token: ImageToToken, token_to_image: TokenToImage
) -> tuple[PromptSide, Gathered]:
    """Image-to-token attention of layer 0, then token-to-image attention of layer 1."""
    layer, num_rows = image.layers[0], image_to_token.gram.shape[1]
    basis = image_to_token.key.new_empty(len(image_to_token.key), 2 * num_rows + 1, layer.square.shape[0])
    weights = basis[:, :num_rows]
    _softmax_over_tokens(_scores(image_to_token.key, layer.query), image_to_token.key, out=weights)

    own = _scores(2 * image_to_token.values[0], image.cross[0]).baddbmm_(image_to_token.gram, weights).mul_(weights)
    variance = layer.square + own.sum(dim=1, keepdim=True)
    scale = torch.rsqrt(variance / image.bias.shape[0] + layer.eps)
    weights *= scale
    return PromptSide(basis, scale), _gather(image.layers[1].read, token_to_image, weights, scale)


def second_pass(
    image: ImageSide, first: PromptSide, image_to_token: ImageToToken, token_to_image: TokenToImage
) -> tuple[PromptSide, Gathered]:
    """Image-to-token attention of layer 1, then the final token-to-image attention. Overwrites `first`."""
    layer, basis, scale = image.layers[1], first.basis, first.key_scale
    num_rows = basis.shape[1] // 2
    assert image_to_token.mixed is not None
    assert layer.query_pe is not None
    scores = _scores(image_to_token.key, layer.query).mul_(scale).baddbmm_(image_to_token.mixed, basis[:, :num_rows])
    _scores(image_to_token.key, layer.query_pe, onto=scores)
    _softmax_over_tokens(scores, image_to_token.key, out=basis[:, num_rows:-1])
    basis[:, -1] = 1.0

    own = torch.empty_like(basis)
    _scores(2 * image_to_token.values[0], image.cross[1], out=own[:, :num_rows])
    _scores(2 * image_to_token.values[1], image.cross[2], out=own[:, num_rows:-1])
    own[:, -1] = 2 * image.cross_bias
    own = own.mul_(scale).baddbmm_(image_to_token.gram, basis).mul_(basis).sum(dim=1, keepdim=True)
    second_scale = torch.rsqrt((scale.square() * layer.square + own) / image.bias.shape[0] + layer.eps)
    basis *= second_scale
    return PromptSide(basis, scale * second_scale), _gather(image.final, token_to_image, basis, scale * second_scale)


def _gather(reader: Reader, token_to_image: TokenToImage, basis: Tensor, key_scale: Tensor) -> Gathered:
    """Token-to-image attention to image tokens that the prompt has updated."""
    assert reader.key_pe is not None
    scores = _scores(token_to_image.query, reader.key).mul_(key_scale).baddbmm_(token_to_image.mixed, basis)
    weights = _scores(token_to_image.query, reader.key_pe, onto=scores).softmax(dim=-1)
    own = weights @ basis.transpose(-1, -2)
    return Gathered(own, _weighted_sums(weights.mul_(key_scale), reader.value))


def read_unchanged(reader: Reader, query: Tensor) -> Tensor:
    """Token-to-image attention to unchanged image tokens: (B, H, T, d) to the same."""
    return _weighted_sums(_scores(query, reader.key).softmax(dim=-1), reader.value)


def _softmax_over_tokens(scores: Tensor, key: Tensor, *, out: Tensor) -> None:
    """Computes the softmax over the prompt tokens, per head, of (B, R, N)."""
    per_head = key.shape[1:3]
    torch.softmax(scores.unflatten(1, per_head), dim=2, out=out.unflatten(1, per_head))


def _scores(tokens: Tensor, shared: Tensor, *, out: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
    """Multiplies prompt tokens with shared image tokens: (B, H, T, d), (H, d, N) to (B, R, N).

    Args:
        out: optional output tensor.
        onto: optional tensor to add to in place.
    """
    num_prompts, num_heads, num_tokens, _ = tokens.shape
    if onto is not None:
        out = onto
    elif out is None:
        out = tokens.new_empty(num_prompts, num_heads * num_tokens, shared.shape[2])
    if tokens.is_cuda:  # one product for all prompts, with zeros where heads differ: a batched one copies `shared`
        apart = torch.eye(num_heads, device=tokens.device)[:, None, :, None] * tokens[:, :, :, None]
        apart, shared = apart.flatten(3).flatten(1, 2), shared.flatten(0, 1).expand(num_prompts, -1, -1)
        return torch.baddbmm(out, apart, shared, beta=int(onto is not None), out=out)
    # On a CPU one product per prompt is fastest: a batched product needs heads first in its result and copies it.
    for part, token in zip(out.unflatten(1, (num_heads, num_tokens)), tokens, strict=True):
        torch.baddbmm(part, token, shared, beta=int(onto is not None), out=part)
    return out


def _weighted_sums(weights: Tensor, shared: Tensor) -> Tensor:
    """Returns weighted sums of shared image tokens: (B, R, N), (H, N, d) to (B, H, T, d)."""
    num_heads = len(shared)
    if weights.is_cuda:
        sums = weights @ shared.transpose(0, 1).flatten(1)  # over all heads; each row needs its own head
        return sums.unflatten(1, (num_heads, -1)).unflatten(3, (num_heads, -1)).diagonal(0, 1, 3).permute(0, 3, 1, 2)
    return torch.stack([torch.bmm(weight, shared) for weight in weights.unflatten(1, (num_heads, -1))])
