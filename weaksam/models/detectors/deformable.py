"""Initial weights of transformers' deformable attention layers, of any class (arXiv 2010.04159)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def start_attention(layer: Any) -> None:
    """Initialises a layer: each head samples along its own direction, each point one step further."""
    turns = torch.arange(layer.n_heads) * (2 * math.pi / layer.n_heads)
    ways = torch.stack([turns.cos(), turns.sin()], 1)
    ways = ways / ways.abs().amax(1, keepdim=True)
    points = ways[:, None, None] * torch.arange(1, layer.n_points + 1)[:, None]
    layer.sampling_offsets.bias.copy_(points.expand(-1, layer.n_levels, -1, -1).flatten())
    for part in (layer.sampling_offsets.weight, layer.attention_weights.weight, layer.attention_weights.bias):
        nn.init.zeros_(part)
    for part in (layer.value_proj, layer.output_proj):
        nn.init.zeros_(part.bias)
