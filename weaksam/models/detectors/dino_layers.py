"""Layers of DINO: flattened maps of a pyramid, the encoder over their cells, the decoder of queries.

Attention layers are transformers' Deformable DETR layers. Coordinates are normalised by the image without padding.
Results of an image do not depend on other images: normalisation and attention ignore padding.

Axis legend: B images, h w cells of a map, S cells of all L levels, D channels, Q queries.
Boxes are normalised cxcywh, or their logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrDecoderLayer,
    DeformableDetrEncoderLayer,
    DeformableDetrMLPPredictionHead,
    DeformableDetrMultiscaleDeformableAttention,
)

from weaksam.models.detectors.base import Batch
from weaksam.models.detectors.deformable import start_attention
from weaksam.models.detectors.normalized_boxes import inverse_sigmoid

PRIOR = 0.01  # initial probability of every class
_ANSWER_EPS = 1e-5  # of the inverse sigmoid for a layer's output; for the next layer's reference box it is 1e-3


class Cells(NamedTuple):
    """Cells of all levels, fine to coarse.

    Attributes:
        tokens: (B, S, D).
        places: (B, S, D), encoded positions and levels.
        inside: (B, S) bool, cells inside the image.
        centres: (B, S, 2) x and y, normalised by the image.
        levels: (S,) int64.
        shares: (B, L, 2), width and height of the image as shares of the padded map.
        shapes: L of (h, w).
    """

    tokens: Tensor
    places: Tensor
    inside: Tensor
    centres: Tensor
    levels: Tensor
    shares: Tensor
    shapes: list[tuple[int, int]]

    @property
    def layout(self) -> tuple[Tensor, list[tuple[int, int]], Tensor]:
        """Arguments of deformable attention: shapes (L, 2), shapes as a list, first cells (L,)."""
        shapes = torch.tensor(self.shapes, device=self.inside.device)
        return shapes, self.shapes, shapes.prod(1).cumsum(0) - shapes.prod(1)


def sine(shares: Tensor, dim: int, temperature: float) -> Tensor:
    """Returns (..., dim) sines and cosines of numbers (...) in 0..1, one period at the highest frequency."""
    powers = torch.arange(dim // 2, device=shares.device) * (2 / dim)
    angles = shares.float()[..., None] * 2 * math.pi / temperature**powers
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def class_head(dim: int, num_classes: int) -> nn.Linear:
    head = nn.Linear(dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - PRIOR) / PRIOR))
    return head


def box_head(dim: int) -> nn.Module:
    """Returns a three-layer head that initially leaves boxes unchanged."""
    head = DeformableDetrMLPPredictionHead(dim, dim, 4, num_layers=3)
    for part in head.layers[-1].parameters():
        nn.init.zeros_(part)
    return head


class InsideNorm(nn.GroupNorm):
    """Group normalisation over the cells inside images; zero elsewhere."""

    def forward(self, input: Tensor, inside: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Normalises a map (B, D, h, w) over cells inside the image (B, h, w) bool."""
        groups = input.float().unflatten(1, (self.num_groups, -1))
        weight = inside[:, None, None] / (inside.sum((1, 2)) * groups.shape[2])[:, None, None, None, None]
        mean = (groups * weight).sum((2, 3, 4), keepdim=True)
        spread = ((groups - mean).square() * weight).sum((2, 3, 4), keepdim=True)
        normed = ((groups - mean) * (spread + self.eps).rsqrt()).flatten(1, 2)
        return (normed * self.weight[:, None, None] + self.bias[:, None, None]) * inside[:, None]


class Levels(nn.Module):
    """Projects maps of a pyramid to L levels of D channels, further levels from the last map, with cell positions.

    Args:
        channels, strides: channels and strides of the maps, fine to coarse.
        dim: D, a multiple of 4.
        levels: L, at least the number of maps.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], dim: int, levels: int) -> None:
        super().__init__()
        extra = levels - len(channels)
        self.dim, self.strides = dim, [*strides, *(strides[-1] * 2**i for i in range(1, extra + 1))]
        inputs = [channels[-1], *[dim] * extra][:extra]
        coarser = [nn.Conv2d(depth, dim, 3, stride=2, padding=1) for depth in inputs]
        self.projections = nn.ModuleList([*(nn.Conv2d(depth, dim, 1) for depth in channels), *coarser])
        self.norms = nn.ModuleList(InsideNorm(math.gcd(32, dim), dim) for _ in range(levels))
        self.level = nn.Parameter(torch.randn(levels, dim))
        for layer in self.projections:
            nn.init.xavier_uniform_(layer.weight)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, maps: Sequence[Tensor], batch: Batch) -> Cells:
        """Returns the cells of maps (B, D, h, w) of a batch."""
        sizes = torch.tensor(batch.sizes, device=batch.pixels.device, dtype=torch.float32).flip(1)
        inside = [batch.inside[:, ::stride, ::stride] for stride in self.strides]
        x = maps[-1] * inside[len(maps) - 1][:, None]
        rows = []
        for i, (project, norm, stride) in enumerate(zip(self.projections, self.norms, self.strides, strict=True)):
            x = norm(project(maps[i]), inside[i]) if i < len(maps) else norm(project(x), inside[i])
            rows.append((x, *self._lie(x, i, stride, sizes)))
            if i == len(maps) - 1:
                x = maps[-1] * inside[i][:, None]
        return _in_a_row(rows, inside)

    def _lie(self, x: Tensor, level: int, stride: int, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns places (B, D, h, w) and centres (B, 2, h, w) of a level's cells, and its shares (B, 2)."""
        height, width = x.shape[2:]
        rows, columns = (torch.arange(n, device=x.device, dtype=torch.float32) for n in (height, width))
        num = (sizes / stride).ceil()
        down = sine((rows + 1) / num[:, 1:], self.dim // 2, 20).mT[..., None].expand(-1, -1, -1, width)
        across = sine((columns + 1) / num[:, :1], self.dim // 2, 20).mT[:, :, None].expand(-1, -1, height, -1)
        place = torch.cat([down, across], 1) + self.level[level][:, None, None]
        middle = torch.stack(torch.meshgrid(columns + 0.5, rows + 0.5, indexing="xy")) * stride
        return place, middle / sizes[:, :, None, None], sizes / (stride * sizes.new_tensor([width, height]))


def _in_a_row(rows: Sequence[tuple[Tensor, ...]], inside: Sequence[Tensor]) -> Cells:
    tokens, places, centres, shares = zip(*rows, strict=True)
    shapes = [(int(x.shape[2]), int(x.shape[3])) for x in tokens]
    levels = [torch.full((h * w,), i, device=tokens[0].device) for i, (h, w) in enumerate(shapes)]
    tokens, places, centres = (torch.cat([x.flatten(2) for x in part], 2).mT for part in (tokens, places, centres))
    flat = torch.cat([x.flatten(1) for x in inside], 1)
    return Cells(tokens, places, flat, centres, torch.cat(levels), torch.stack(shares, 1), shapes)


class Encoder(nn.Module):
    """Layers in which each cell attends to a few points of every level."""

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DeformableDetrEncoderLayer(config) for _ in range(config.encoder_layers))
        _start(self)

    def forward(self, cells: Cells) -> Tensor:
        """Encodes cells to (B, S, D)."""
        x, where, layout = cells.tokens, cells.centres[:, :, None] * cells.shares[:, None], cells.layout
        for layer in self.layers:
            x = layer(x, cells.inside, cells.places, where, *layout)
        return x


class Decoder(nn.Module):
    """Layers in which queries attend to one another and to cells near their boxes, and refine the boxes.

    A layer's box is its correction of the previous box. The next layer takes that box without gradient as reference,
    but its output builds on it with gradient: a layer learns from its output and the next layer's (look forward twice).
    """

    def __init__(self, config: DeformableDetrConfig, num_classes: int) -> None:
        super().__init__()
        dim, num = config.d_model, config.decoder_layers
        self.layers = nn.ModuleList(DeformableDetrDecoderLayer(config) for _ in range(num))
        self.place = DeformableDetrMLPPredictionHead(2 * dim, dim, dim, num_layers=2)
        _start(self)
        self.norm = nn.LayerNorm(dim)
        self.class_heads = nn.ModuleList(class_head(dim, num_classes) for _ in range(num))
        self.box_heads = nn.ModuleList(box_head(dim) for _ in range(num))

    def forward(
        self, queries: Tensor, references: Tensor, memory: Tensor, cells: Cells, visible: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the outputs of each layer: logits (B, Q, C) and boxes (B, Q, 4) 0..1.

        Args:
            queries: (B, Q, D).
            references: (B, Q, 4) logits of the queries' starting boxes, without gradient.
            memory: (B, S, D) output of the encoder.
            cells: input of the encoder.
            visible: (B, 1, Q, Q) bool attention mask of a query (row); None = all.
        """
        logits, boxes, layout = [], [], cells.layout
        shares = cells.shares.repeat(1, 1, 2)[:, None]
        before = references = references.sigmoid()
        for layer, name, move in zip(self.layers, self.class_heads, self.box_heads, strict=True):
            # Not multiplied by the share of the map, as published: a box's encoding must not depend on the padding.
            place = self.place(sine(references, queries.shape[2] // 2, 10000).flatten(2))
            points = references[:, :, None] * shares
            queries = layer(queries, place, points, *layout, memory, cells.inside, attention_mask=visible)
            normed = self.norm(queries)
            logits.append(name(normed).float())
            boxes.append((move(normed) + inverse_sigmoid(before, _ANSWER_EPS)).sigmoid())
            before = (move(queries) + inverse_sigmoid(references)).sigmoid()
            references = before.detach()
        return logits, boxes


def _start(module: nn.Module) -> None:
    """Initialises the weights."""
    for weight in module.parameters():
        if weight.dim() > 1:
            nn.init.xavier_uniform_(weight)
    for layer in module.modules():
        if isinstance(layer, DeformableDetrMultiscaleDeformableAttention):
            start_attention(layer)
