"""The two passes of the restated decoder over all image tokens, in plain PyTorch: see `decoder` for the symbols.

A pass lets image tokens read the prompt tokens (a write: softmax over the prompt tokens), norms the image tokens, and
lets prompt tokens read them (softmax over the image). `kernels.passes` does the same in half precision.

Axis legend: B prompts, T prompt tokens, H heads, d channels of a head, N image tokens, R = H T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weaksam.sam.image_side import ImageSide, Reader


@dataclass(frozen=True)
class Write:
    """Prompt side of an attention in which image tokens read the prompt tokens, and of the norm after it.

    Attributes:
        key: (B, H, T, d) scaled for a softmax of scores.
        mixed: (B, R, R) products of keys and of queries from what the first pass added; None in the first pass.
        values: (B, H, T, d) values of the first pass, and of the second.
        gram: (B, rows, rows) inner products of the rows of U.
    """

    key: Tensor
    mixed: Tensor | None
    values: tuple[Tensor, ...]
    gram: Tensor


@dataclass(frozen=True)
class Read:
    """Prompt side of an attention in which prompt tokens read the image.

    Attributes:
        query: (B, H, T, d) scaled for a softmax of scores.
        mixed: (B, R, rows) products of queries and of keys from what prompts added.
    """

    query: Tensor
    mixed: Tensor


@dataclass(frozen=True)
class PromptSide:
    """What prompts add to the image tokens: these are basis' U + key_scale * shared tokens + a common bias.

    Attributes:
        basis: (B, 2R + 1, N); after the first pass only the first R rows are there.
        key_scale: (B, 1, N).
    """

    basis: Tensor
    key_scale: Tensor


@dataclass(frozen=True)
class Gathered:
    """What prompt tokens read.

    Attributes:
        own: (B, R, rows) sums of the basis.
        shared: (B, H, T, d) sums of the shared image tokens' values.
    """

    own: Tensor
    shared: Tensor


@dataclass(frozen=True)
class Decoded:
    """Prompts after the transformer: what scores their masks, and what it takes to draw them.

    Attributes:
        predicted_iou: (B, S) float32, the decoder's own estimate.
        hyper: (B, S, c) weights that turn an upscaled token into one logit per slot.
        update: (B, 2R + 1, C) U g2, what a unit of the basis adds to an image token.
        prompt_side: the basis.
    """

    predicted_iou: Tensor
    hyper: Tensor
    update: Tensor
    prompt_side: PromptSide


def first_pass(image: ImageSide, write: Write, read: Read) -> tuple[PromptSide, Gathered]:
    """Layer 0 writes, layer 1 reads."""
    layer, num_rows = image.layers[0], write.gram.shape[1]
    basis = write.key.new_empty(len(write.key), 2 * num_rows + 1, layer.square.shape[0])
    weights = basis[:, :num_rows]
    _softmax_over_tokens(_scores(write.key, layer.query), write.key, out=weights)

    own = _scores(2 * write.values[0], image.cross[0]).baddbmm_(write.gram, weights).mul_(weights)
    variance = layer.square + own.sum(dim=1, keepdim=True)
    scale = torch.rsqrt(variance / image.bias.shape[0] + layer.eps)
    weights *= scale
    return PromptSide(basis, scale), _gather(image.layers[1].read, read, weights, scale)


def second_pass(image: ImageSide, first: PromptSide, write: Write, read: Read) -> tuple[PromptSide, Gathered]:
    """Layer 1 writes, the last attention reads. Uses up `first`."""
    layer, basis, scale = image.layers[1], first.basis, first.key_scale
    num_rows = basis.shape[1] // 2
    assert write.mixed is not None
    assert layer.query_pe is not None
    scores = _scores(write.key, layer.query).mul_(scale).baddbmm_(write.mixed, basis[:, :num_rows])
    _scores(write.key, layer.query_pe, onto=scores)
    _softmax_over_tokens(scores, write.key, out=basis[:, num_rows:-1])
    basis[:, -1] = 1.0

    own = torch.empty_like(basis)
    _scores(2 * write.values[0], image.cross[1], out=own[:, :num_rows])
    _scores(2 * write.values[1], image.cross[2], out=own[:, num_rows:-1])
    own[:, -1] = 2 * image.cross_bias
    own = own.mul_(scale).baddbmm_(write.gram, basis).mul_(basis).sum(dim=1, keepdim=True)
    second_scale = torch.rsqrt((scale.square() * layer.square + own) / image.bias.shape[0] + layer.eps)
    basis *= second_scale
    return PromptSide(basis, scale * second_scale), _gather(image.final, read, basis, scale * second_scale)


def _gather(reader: Reader, read: Read, basis: Tensor, key_scale: Tensor) -> Gathered:
    """Prompt tokens read image tokens that their prompt has changed."""
    assert reader.key_pe is not None
    scores = _scores(read.query, reader.key).mul_(key_scale).baddbmm_(read.mixed, basis)
    weights = _scores(read.query, reader.key_pe, onto=scores).softmax(dim=-1)
    own = weights @ basis.transpose(-1, -2)
    return Gathered(own, _weighted_sums(weights.mul_(key_scale), reader.value))


def read_unchanged(reader: Reader, query: Tensor) -> Tensor:
    """Prompt tokens read image tokens that no prompt has changed: (B, H, T, d) to the same."""
    return _weighted_sums(_scores(query, reader.key).softmax(dim=-1), reader.value)


def _softmax_over_tokens(scores: Tensor, key: Tensor, *, out: Tensor) -> None:
    """Softmax over the prompt tokens, per head, of (B, R, N)."""
    per_head = key.shape[1:3]
    torch.softmax(scores.unflatten(1, per_head), dim=2, out=out.unflatten(1, per_head))


def _scores(tokens: Tensor, shared: Tensor, *, out: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
    """Products of prompt tokens with shared image tokens: (B, H, T, d), (H, d, N) to (B, R, N).

    Args:
        out: written to, when given.
        onto: added to in place, when given.
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
    # On a CPU one product per prompt is fastest: a batched one wants its result heads first and copies it.
    for part, token in zip(out.unflatten(1, (num_heads, num_tokens)), tokens, strict=True):
        torch.baddbmm(part, token, shared, beta=int(onto is not None), out=part)
    return out


def _weighted_sums(weights: Tensor, shared: Tensor) -> Tensor:
    """Sums of shared image tokens: (B, R, N), (H, N, d) to (B, H, T, d)."""
    num_heads = len(shared)
    if weights.is_cuda:
        sums = weights @ shared.transpose(0, 1).flatten(1)  # of all heads; each row wants its own
        return sums.unflatten(1, (num_heads, -1)).unflatten(3, (num_heads, -1)).diagonal(0, 1, 3).permute(0, 3, 1, 2)
    return torch.stack([torch.bmm(weight, shared) for weight in weights.unflatten(1, (num_heads, -1))])
