"""The image encoder of a SAM as the backbone of another network, for images of any size.

Axis legend: B images, H W pixels, h w patches, D output channels, E channels of the encoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from weaksam.ops.boxes import enlarge_boxes
from weaksam.sam.build import PIXEL_MEAN, PIXEL_STD, ConvStem, build_sam
from weaksam.sam.checkpoints import load_sam
from weaksam.sam.variants import VARIANTS


class FrozenSam(nn.Module):
    """(B, 3, H, W) to (B, E, h, w): features of a SAM, which is not trained further.

    A SAM segments objects without class labels, so a network on top of it learns classes from few images. Sides are cut
    to whole patches.

    Args:
        variant: variant of the SAM.
        side: side of all images, pixels, if they are squares of one size. Attention windows are then no larger than the
            image. SAM fills up larger windows with zeros, which cost as much as pixels and are attended to.
        depth: number of the encoder's blocks to run; their output replaces the encoder's features.
    """

    mean, std = PIXEL_MEAN, PIXEL_STD

    def __init__(self, variant: str, side: int | None = None, *, depth: int | None = None) -> None:
        super().__init__()
        self.variant, self.side, self.depth = variant, side, depth
        size = VARIANTS[variant]
        self.patch, self.channels = size.patch_size, size.prompt_dim if depth is None else size.encoder_dim
        self.encoder: Any = self._fitted(build_sam(variant).image_encoder).requires_grad_(False)

    def load_pretrained(self) -> None:
        """Loads the shipped weights of this variant."""
        self.encoder.load_state_dict(self._fitted(load_sam(self.variant).image_encoder).state_dict())

    def _fitted(self, encoder: Any) -> Any:
        if self.depth is not None:
            encoder.blocks, encoder.neck = encoder.blocks[: self.depth], nn.Identity()
        tokens = self.side // self.patch if self.side else math.inf
        for block in encoder.blocks:
            if block.window_size > tokens:
                # the table of relative positions, -w < offset < w, becomes its middle
                cut = slice(block.window_size - tokens, block.window_size + tokens - 1)
                block.attn.rel_pos_h = nn.Parameter(block.attn.rel_pos_h[cut].detach().clone())
                block.attn.rel_pos_w = nn.Parameter(block.attn.rel_pos_w[cut].detach().clone())
                block.window_size = tokens
        return encoder

    def train(self, mode: bool = True) -> FrozenSam:
        """Sets the mode; the encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @property
    def crop_channels(self) -> tuple[int, ...]:
        """Channels E of the single map of a crop."""
        return (self.channels,)

    @property
    def crop_strides(self) -> tuple[int, ...]:
        """Stride of that map, pixels."""
        return (self.patch,)

    def at_once(self, device: torch.device) -> int:
        """Returns the fastest batch size of crops."""
        return 64 if device.type == "cpu" else 1024

    def crop_maps(self, crops: Tensor) -> list[Tensor]:
        """Returns the single map of (B, 3, side, side) normalised crops."""
        return [self(crops)]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Returns features (B, E, h, w) of images normalised for SAM."""
        height, width = (side // self.patch * self.patch for side in images.shape[2:])
        return self._after_stem(self.encoder.patch_embed(images[:, :, :height, :width]))

    def _after_stem(self, x: Tensor) -> Tensor:
        """Returns (B, E, h, w) of embedded patches (B, h, w, width of the encoder)."""
        x = x + _resize(self.encoder.pos_embed, x.shape[1:3])
        for block in self.encoder.blocks:
            x = block(x)
        return self.encoder.neck(x.permute(0, 3, 1, 2))

    @torch.no_grad()
    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Returns the maps of the patch embedding, which must be a `ConvStem`, and the features, fine to coarse."""
        stem: ConvStem = self.encoder.patch_embed
        *finer, embedded = stem.steps(images)
        return [*finer, self._after_stem(embedded.permute(0, 2, 3, 1))]

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


class SamStem(FrozenSam):
    """(B, 3, H, W) to (B, h, w, D): the patch embedding of a transformer, frozen features and a trained projection."""

    def __init__(self, variant: str, dim: int) -> None:
        super().__init__(variant)
        self.proj = nn.Linear(self.channels, dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(self.features(images).permute(0, 2, 3, 1))


def cut_out(images: Tensor, boxes: Sequence[Tensor], side: int, margin: float) -> Tensor:
    """Cuts boxes out of images, (N of all, 3, side, side), with a margin for the outline and zeros beyond the image.

    Args:
        images: (B, 3, H, W), normalised.
        boxes: B of (N of the image, 4) float32, xyxy, pixels.
        side: side of a crop, pixels.
        margin: enlargement of a box on each side, as a share of its size.
    """
    enlarged = [enlarge_boxes(part, margin) for part in boxes]
    if images.is_cuda:
        return roi_align(images, enlarged, (side, side), aligned=True)
    crops = [_crop(image, box, side) for image, part in zip(images, enlarged, strict=True) for box in part.tolist()]
    return torch.stack(crops) if crops else images.new_zeros((0, images.shape[1], side, side))


def _crop(image: Tensor, box: Sequence[float], side: int) -> Tensor:
    """(C, side, side): `roi_align` of one box, xyxy, on an image (C, H, W).

    Its samples form a grid, so that it is a product with a matrix for each axis. torchvision's CPU kernel takes every
    sample for itself, on one thread.
    """
    rows, row_weights = _axis_weights(box[1], box[3], side, image.shape[1])
    columns, column_weights = _axis_weights(box[0], box[2], side, image.shape[2])
    part = image[:, rows, columns] @ column_weights.T.to(image.dtype)  # (C, rows, side)
    crop = row_weights.to(image.dtype) @ part.transpose(0, 1).flatten(1)  # (side, C * side)
    return crop.unflatten(1, (image.shape[0], side)).transpose(0, 1)


def _axis_weights(start: float, end: float, side: int, length: int) -> tuple[slice, Tensor]:
    """How the cells of a crop are made of pixels along one axis.

    Args:
        start, end: of the box, pixels.
        side: cells of the crop.
        length: pixels of the image.

    Returns:
        the pixels that count, and (side, pixels) float32, the weight of each pixel in each cell.
    """
    size = end - start
    per_cell = math.ceil(size / side)  # samples, evenly spread
    positions = start - 0.5 + (np.arange(side * max(per_cell, 0)) + 0.5) * (size / (side * max(per_cell, 1)))
    inside = (positions >= -1) & (positions <= length)  # other samples are zero
    if not inside.any():
        return slice(0, 1), torch.zeros(side, 1)
    cells, positions = np.repeat(np.arange(side), per_cell)[inside], positions[inside].clip(0, length - 1)
    low = np.floor(positions).astype(int)
    high = np.minimum(low + 1, length - 1)
    first, count = int(low[0]), int(high[-1]) + 1 - int(low[0])
    parts = (positions - low) / per_cell
    weights = np.bincount(cells * count + low - first, 1 / per_cell - parts, side * count)
    weights += np.bincount(cells * count + high - first, parts, side * count)
    return slice(first, first + count), torch.from_numpy(weights.reshape(side, count).astype(np.float32))


def _resize(positions: Tensor, hw: torch.Size) -> Tensor:
    """Resizes a position embedding (1, S, S, D) to (h, w) patches."""
    if positions.shape[1:3] == hw:
        return positions
    grid = F.interpolate(positions.permute(0, 3, 1, 2), tuple(hw), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1)
