"""A classifier on the frozen features of a convolutional network: class activation maps of its last two stages.

For photographs and no GPU: only two small heads are trained, and the features of a picture are cached.
The image-level logit of a class is a soft maximum over its map, so a map need not be high everywhere on an image that
holds the class: an object is small in most photographs.
Source: class activation maps, Zhou et al. 2016, arXiv 1512.04150; log-sum-exp pooling, Pinheiro and Collobert 2015,
arXiv 1411.6228.
Axis legend: B images, C classes, D channels, h w cells of a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weaksam.models.backbones.view_cache import ViewCache
from weaksam.models.classifiers.weaktr import Logits, Maps

_HIDDEN = 128
_SHARPNESS = 2.0  # of the soft maximum: 0 would be the mean


class CamClassifier(nn.Module):
    """Classifies an image and locates its classes by the last two maps of a frozen network.

    `coarse` maps use the last one, of stride 32 in most networks, `fine` maps use both at the stride of the first.

    Args:
        num_classes: C.
        network: the frozen network.
        key: its name in checkpoints.

    Attributes:
        mean, std: normalisation of pixels in [0, 1].
        patch: sides of views are a multiple of this.
        depth: number of layers with attention: there are none, and no cross maps.
    """

    depth = 0

    def __init__(self, num_classes: int, network: Any, *, key: str) -> None:
        super().__init__()
        self.add_module(key, network)
        self._key = key
        self.mean, self.std = ([value / 255 for value in values] for values in (network.mean, network.std))
        self.patch = max(network.crop_strides)
        fine, coarse = network.crop_channels
        self.coarse, self.fine = _Head(coarse, num_classes), _Head(fine + coarse, num_classes)
        self.view_cache = ViewCache()

    @property
    def network(self) -> Any:
        """The frozen network."""
        return self.get_submodule(self._key)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.coarse.classes.weight.device

    def load_pretrained(self) -> None:
        """Loads the published weights of the frozen network."""
        self.network.load_pretrained()

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Logits:
        """Returns image-level logits of the coarse maps (`cls`) and of the fine maps (`patch`).

        Args:
            images: (B, 3, H, W) float, normalised by `mean` and `std`.
            keep: unused: there are no residual branches to drop.
        """
        coarse, fine = self._class_maps(self._features(images))
        return Logits(soft_maximum(coarse), soft_maximum(fine), None)

    @torch.no_grad()
    def find_maps(self, images: Tensor, *, cross_layers: Sequence[int]) -> Maps:
        """Returns maps of every class, and no cross maps: `cross_layers` is ignored."""
        coarse, fine = self._class_maps(self.network.crop_maps(images))
        cross = fine.new_zeros(len(fine), 0, *fine.shape[1:])
        return Maps(soft_maximum(coarse), coarse, fine, cross)

    def _class_maps(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns coarse and fine class maps of the features, fine and coarse."""
        fine, coarse = features
        enlarged = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
        return self.coarse(coarse), self.fine(torch.cat([fine, enlarged], 1))

    def _features(self, images: Tensor) -> list[Tensor]:
        if not self.training:
            return self.network.crop_maps(images)
        rows = [self.view_cache.recall([image], lambda image=image: self._rounded(image)) for image in images]
        # one by one: autocast refuses to join tensors of half precision where its own type is bf16
        return [torch.stack([part.float() for part in maps]) for maps in zip(*rows, strict=True)]

    def _rounded(self, image: Tensor) -> list[Tensor]:
        """Returns the features of one image in half precision, for the cache."""
        return [maps[0].half() for maps in self.network.crop_maps(image[None])]


class _Head(nn.Module):
    """Features (B, D, h, w) to class maps (B, C, h, w), cell by cell."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.hidden, self.classes = nn.Linear(channels, _HIDDEN), nn.Linear(_HIDDEN, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.classes(self.hidden(features.permute(0, 2, 3, 1)).relu()).permute(0, 3, 1, 2)


def soft_maximum(maps: Tensor) -> Tensor:
    """Returns (B, C) of maps (B, C, h, w): a value between the mean and the maximum of each map."""
    cells = maps.shape[2] * maps.shape[3]
    return (torch.logsumexp(_SHARPNESS * maps.flatten(2).float(), 2) - math.log(cells)) / _SHARPNESS
