"""A faster SAM image encoder with the weights and the results of `segment_anything`'s.

Savings over the stock code: windows are padded after their projection, when padding is only a bias; scores never exist
as one matrix (`attention`); on request linear maps are in half precision while the tokens themselves, norms and sums
stay in float32.

Axis legend: B images, H W tokens, C channels, w side of a window, d channels of a head.
"""

# segment_anything declares no attribute types, so to a type checker each of its weights is "Tensor | Module".
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import copy
import math

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from weaksam.sam.attention import attend, relative_scores


class FastEncoder:
    """Runs an `ImageEncoderViT`.

    Args:
        encoder: its weights are shared for float32, and copied for another dtype.
        dtype: dtype of linear maps and attention: float32, bfloat16 or float16.
    """

    def __init__(self, encoder: ImageEncoderViT, dtype: torch.dtype = torch.float32) -> None:
        self.encoder, self.dtype = encoder, dtype
        if dtype != torch.float32:
            self.encoder = copy.deepcopy(encoder)
            for module in self.encoder.blocks.modules():
                if isinstance(module, nn.Linear):
                    module.to(dtype)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Encodes (B, 3, side, side) float32, normalised and padded, to (B, C, H, W) float32 embeddings."""
        encoder = self.encoder
        tokens = encoder.patch_embed(pixels).contiguous()  # the convolution's output has channels outermost
        if encoder.pos_embed is not None:
            tokens = tokens + encoder.pos_embed
        for block in encoder.blocks:
            tokens = tokens + self._attention(block.attn, self._norm(block.norm1, tokens), block.window_size)
            tokens = tokens + block.mlp(self._norm(block.norm2, tokens))
        return encoder.neck(tokens.permute(0, 3, 1, 2))

    def _norm(self, norm: nn.LayerNorm, tokens: Tensor) -> Tensor:
        return norm(tokens).to(self.dtype)

    def _attention(self, attention: nn.Module, tokens: Tensor, window: int) -> Tensor:
        """Attends within windows, or among all tokens for window 0: (B, H, W, C) to the same."""
        height, width = tokens.shape[1:3]
        projected = attention.qkv(tokens)
        if window:
            projected = partition(projected, window, attention.qkv.bias)
        side_h, side_w = projected.shape[1:3]
        query, key, value = projected.unflatten(3, (3, attention.num_heads, -1)).permute(3, 0, 4, 1, 2, 5).flatten(1, 2)
        rel_h = relative_scores(query, attention.rel_pos_h, 1)
        rel_w = relative_scores(query, attention.rel_pos_w, 2)
        mixed = attend(*(x.flatten(1, 2) for x in (query, key, value, rel_h, rel_w)))
        mixed = mixed.unflatten(0, (-1, attention.num_heads)).unflatten(2, (side_h, side_w))
        mixed = mixed.permute(0, 2, 3, 1, 4).flatten(3)
        if window:
            mixed = join(mixed, height, width)
        return attention.proj(mixed)


def partition(x: Tensor, window: int, padding: Tensor) -> Tensor:
    """Splits (B, H, W, C) into (B windows, w, w, C), row by row; tokens beyond the image are `padding`, (C,).

    SAM pads the tokens with zeros before the projection, so their projection is its bias; they are attended to.
    """
    num_images, height, width, channels = x.shape
    rows, columns = math.ceil(height / window), math.ceil(width / window)
    if (height, width) != (rows * window, columns * window):
        padded = padding.expand(num_images, rows * window, columns * window, channels).contiguous()
        padded[:, :height, :width] = x
        x = padded
    x = x.unflatten(1, (rows, window)).unflatten(3, (columns, window))
    return x.transpose(2, 3).flatten(0, 2)


def join(x: Tensor, height: int, width: int) -> Tensor:
    """Inverts `partition`: (B windows, w, w, C) to (B, height, width, C), without the padding."""
    window = x.shape[1]
    rows, columns = math.ceil(height / window), math.ceil(width / window)
    x = x.unflatten(0, (-1, rows, columns)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)[:, :height, :width]
