"""A classifier on the frozen features of EfficientNet-Lite0: class activation maps of its last two stages.

For photographs and no GPU: nothing but two small heads is trained, and the features of a picture are remembered.
Source: class activation maps, Zhou et al. 2016, arXiv 1512.04150.
Axis legend: B images, C classes, h w cells of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weaksam.models.lite0 import CHANNELS, MEAN, STD, Lite0
from weaksam.models.seen_views import SeenViews
from weaksam.models.weaktr import Logits, Maps

_HIDDEN = 128


class CamClassifier(nn.Module):
    """Which classes an image holds, and where: the maps of stride 32 are `coarse`, those of stride 16 `fine`.

    Args:
        num_classes: C.
    """

    mean, std = ([value / 255 for value in values] for values in (MEAN, STD))  # of pixels in [0, 1]
    patch = 32  # sides of views are a multiple of this
    depth = 0  # layers with attention: there are no cross maps

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.lite0 = Lite0()
        self.fine, self.coarse = (_Head(channels, num_classes) for channels in CHANNELS[3:])
        self.seen = SeenViews()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.coarse.classes.weight.device

    def load_pretrained(self) -> None:
        """Takes the weights that the frozen network is known with."""
        self.lite0.load_shipped()

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Logits:
        """Image-level logits: the mean over each map.

        Args:
            images: (B, 3, H, W) float, normalised by `mean` and `std`.
            keep: not used: there are no residual branches to leave out.
        """
        fine, coarse = self._read(self._features(images))
        return Logits(coarse.mean((2, 3)), fine.mean((2, 3)), None)

    @torch.inference_mode()
    def find_maps(self, images: Tensor, *, cross_layers: Sequence[int]) -> Maps:
        """Maps of every class, of strides 32 and 16, and no cross maps, whatever layers are asked for."""
        fine, coarse = self._read(self.lite0.crop_maps(images))
        cross = fine.new_zeros(len(fine), 0, *fine.shape[1:])
        return Maps(coarse.mean((2, 3)), coarse.relu(), fine.relu(), cross)

    def _read(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.fine(features[0]), self.coarse(features[1])

    def _features(self, images: Tensor) -> list[Tensor]:
        if not self.training:
            return self.lite0.crop_maps(images)
        rows = [self.seen.recall([one], lambda one=one: self._rounded(one)) for one in images]
        return [torch.stack(maps).float() for maps in zip(*rows, strict=True)]

    def _rounded(self, image: Tensor) -> list[Tensor]:
        """Of one image, in half precision: this is what is remembered."""
        return [maps[0].half() for maps in self.lite0.crop_maps(image[None])]


class _Head(nn.Module):
    """Features (B, D, h, w) to class maps (B, C, h, w), cell by cell."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm, self.hidden = nn.LayerNorm(channels), nn.Linear(channels, _HIDDEN)
        self.classes = nn.Linear(_HIDDEN, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        x = self.hidden(self.norm(features.permute(0, 2, 3, 1))).relu()
        return self.classes(x).permute(0, 3, 1, 2)
