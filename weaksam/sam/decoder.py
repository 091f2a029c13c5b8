"""SAM's mask decoder for thousands of prompts on one image, rewritten so that no prompt has image tokens of its own.

SAM copies the N image tokens for every prompt, adds to them in two layers and projects them each time. But a
prompt only ever adds `attention weights over its T prompt tokens` x `T small vectors` to the image tokens, and between
additions there is only a LayerNorm, which is linear up to one scale per token. So with K the image's centred tokens,

    keys1 = r1 (K + P0' U0) g1 + b1                     P0 (R, N): softmax over the prompt tokens, per head; R = H T
    keys2 = r2 (r1 K g1 + Q' U) g2 + b2                 Q = (r1 P0, P1, 1)  (2R + 1, N),  U = (U0 g1, U1, b1)

(' is transpose; r1, r2 (N) are reciprocal standard deviations). Every product with keys1 or keys2 splits into a
product with K, projected once per image and shared by all prompts, and one of width 2R + 1 (113 for a point). The
variances are quadratic forms in P0 and Q. Nothing is approximated: results equal `segment_anything` to rounding, at
a quarter of its multiplications. Weights stay those of the wrapped `Sam`; only their products are formed per image.

Axis legend: B prompts, T prompt tokens, H heads, d channels of a head, D = H d, C channels, N image tokens, R = H T,
n tokens inside the unpadded image, S mask slots (0: the single mask; 1, 2, 3: the masks of an ambiguous prompt).
"""

# segment_anything declares no attribute types, so to a type checker each of its weights is "Tensor | Module".
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from weaksam.sam.backend import PLAIN, Backend
from weaksam.sam.image_side import ImageSide
from weaksam.sam.passes import Decoded, Gathered, ImageToToken, TokenToImage


def decode_prompts(
    sam: Sam, image: ImageSide, prompts: Tensor, slots: Sequence[int], *, backend: Backend = PLAIN
) -> Decoded:
    """Runs the two-way transformer for prompts of one image.

    Args:
        prompts: (B, T - 5, C) embedded points and box corners; SAM's own 5 tokens are added.
        slots: which of the masks 0..3 to score.
        backend: implementation of the work over all image tokens.
    """
    decoder = sam.mask_decoder
    first, second = decoder.transformer.layers
    last = decoder.transformer.final_attn_token_to_image
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    pe = torch.cat([own.expand(len(prompts), -1, -1), prompts], dim=1)

    tokens = first.norm1(first.self_attn(q=pe, k=pe, v=pe))
    token_attention = first.cross_attn_token_to_image
    context = backend.read_unchanged(image.layers[0].read, _heads(token_attention.q_proj(tokens + pe), token_attention))
    tokens = _absorb(first, tokens, token_attention.out_proj(_merged(context)))
    key0, value0 = _key_value(first.cross_attn_image_to_token, tokens, pe)
    update0 = _spread(value0, image.writers[0])
    added = update0 * first.norm4.weight

    tokens = second.norm1(tokens + second.self_attn(q=tokens + pe, k=tokens + pe, v=tokens))
    token_attention = second.cross_attn_token_to_image
    token_to_image = _token_to_image(token_attention, tokens + pe, added)
    prompt_side, gathered = backend.first_pass(
        image, ImageToToken(key0, None, (value0,), _gram(update0)), token_to_image
    )
    context = _context(token_attention, gathered, added, image.layers[1].read.value_bias)
    tokens = _absorb(second, tokens, context)

    image_attention = second.cross_attn_image_to_token
    key1, value1 = _key_value(image_attention, tokens, pe)
    constant = image.bias.expand(len(pe), 1, -1)
    update = torch.cat([_spread(value0, image.writers[1]), _spread(value1, image.writers[2]), constant], dim=1)
    image_to_token = ImageToToken(key1, _mixed(key1, added, image_attention.q_proj), (value0, value1), _gram(update))
    update = update * second.norm4.weight
    token_to_image = _token_to_image(last, tokens + pe, update)
    prompt_side, gathered = backend.second_pass(image, prompt_side, image_to_token, token_to_image)
    context = _context(last, gathered, update, image.final.value_bias)
    tokens = decoder.transformer.norm_final_attn(tokens + context)

    hyper = [decoder.output_hypernetworks_mlps[slot](tokens[:, 1 + slot]) for slot in slots]
    predicted_iou = decoder.iou_prediction_head(tokens[:, 0])[:, list(slots)]
    return Decoded(predicted_iou, torch.stack(hyper, dim=1), update, prompt_side)


def _absorb(block: nn.Module, tokens: Tensor, context: Tensor) -> Tensor:
    """Adds the attention output from the image, then the MLP."""
    tokens = block.norm2(tokens + context)
    return block.norm3(tokens + block.mlp(tokens))


def _key_value(attention: nn.Module, tokens: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Returns keys and values of prompt tokens for image-to-token attention, both (B, H, T, d)."""
    value = attention.v_proj(tokens).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
    return _heads(attention.k_proj(tokens + pe), attention), value


def _token_to_image(attention: nn.Module, tokens: Tensor, update: Tensor) -> TokenToImage:
    query = _heads(attention.q_proj(tokens), attention)
    return TokenToImage(query, _mixed(query, update, attention.k_proj))


def _context(attention: nn.Module, gathered: Gathered, update: Tensor, value_bias: Tensor) -> Tensor:
    """Returns the output of a token-to-image attention: (B, T, C)."""
    own_value = _project(update, attention.v_proj.weight, attention.num_heads)
    own = gathered.own.unflatten(1, (attention.num_heads, -1)) @ own_value
    return attention.out_proj(_merged(own + gathered.shared) + value_bias)


def _mixed(tokens: Tensor, update: Tensor, projection: nn.Linear) -> Tensor:
    """Multiplies prompt tokens, (B, H, T, d), with the projected rows of U: (B, R, rows)."""
    return (tokens @ _project(update, projection.weight, tokens.shape[1]).transpose(-1, -2)).flatten(1, 2)


def _gram(update: Tensor) -> Tensor:
    """Returns inner products of the rows of U: (B, rows, C) to (B, rows, rows)."""
    return update @ update.transpose(-1, -2)


def _heads(x: Tensor, attention: nn.Module) -> Tensor:
    """Reshapes (B, T, D) to (B, H, T, d), scaled for a softmax of scores."""
    x = x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
    return x / math.sqrt(x.shape[-1])


def _merged(x: Tensor) -> Tensor:
    """Reshapes (B, H, T, d) to (B, T, D)."""
    return x.transpose(1, 2).flatten(2)


def _project(update: Tensor, weight: Tensor, num_heads: int) -> Tensor:
    """Projects the rows of U: (B, rows, C) to (B, H, rows, d)."""
    return F.linear(update, weight).unflatten(2, (num_heads, -1)).transpose(1, 2)


def _spread(values: Tensor, writer: Tensor) -> Tensor:
    """Applies an output projection to values, head by head: (B, H, T, d) to (B, R, C)."""
    per_head = writer.unflatten(1, (values.shape[1], -1)).permute(1, 2, 0)  # (H, d, C)
    return (values @ per_head).flatten(1, 2)
