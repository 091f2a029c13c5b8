"""Vectors of boxes from crops of each box, through frozen networks.

Axis legend: N boxes, H W pixels, S side of a pooled map, D channels.
Boxes are xyxy, absolute pixels of the image, right and bottom exclusive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weaksam.errors import ConfigError, WeightsError
from weaksam.models.backbones.catalogue import backbone_kind
from weaksam.models.backbones.catalogue.kind import CropFeatures
from weaksam.models.backbones.frozen_sam import cut_out
from weaksam.models.backbones.lite0 import normalise
from weaksam.models.backbones.roi_net import RoiNet
from weaksam.models.backbones.timm_net import TimmCrops
from weaksam.models.backbones.view_cache import ViewCache
from weaksam.models.noise import SampleNoise, dropout


class CropNet(RoiNet):
    """Cuts every box out at one small size; two trained layers follow the frozen features of the crop.

    For a few hundred images and no GPU: an object's appearance does not depend on its size, and frozen features already
    separate objects, so little data suffices. While training, the features of a view are cached. D counts the channels
    of all maps; maps of stride 32 are enlarged to the cells of stride 16.

    Args:
        features: backbones with `crops` in the catalogue, whose maps are concatenated, e.g. `efficientnet_lite0`,
            trained on ImageNet's photographs, and `frozen_sam`, the small SAM, trained on drawn scenes.
        dim: width of the two layers.
        crop: side of a crop, pixels; a multiple of each stride.
        margin: enlargement of a box on each side, as a share of its size.
        drop: dropout rate after each trained layer.
    """

    def __init__(
        self,
        features: Sequence[str] = ("frozen_sam",),
        dim: int = 256,
        *,
        crop: int = 64,
        margin: float = 0.15,
        drop: float = 0.2,
    ) -> None:
        super().__init__()
        kinds = [backbone_kind(name) for name in features]
        # Half precision fits a few hundred photographs in memory; the small SAM's features are small.
        self._is_rounded = any(kind.is_rounded for kind in kinds)
        self._names = [kind.crops_key for kind in kinds]
        for kind in kinds:
            if kind.crops is None:
                raise ValueError(f"backbone {kind.name} has no features of crops")
            self.add_module(kind.crops_key, kind.crops(crop))
        strides = [stride for network in self.frozen for stride in network.crop_strides]
        if any(stride % min(strides) for stride in strides):
            raise ConfigError(f"backbones {', '.join(features)}: strides {strides} do not go together: use one alone")
        self._channels = [channels for network in self.frozen for channels in network.crop_channels]
        self.stride, self.pooled_channels, self.pooled_size = 1, sum(self._channels), crop // min(strides)
        self._shrink = [stride // min(strides) for stride in strides]
        inputs = sum(c * (crop // stride) ** 2 for c, stride in zip(self._channels, strides, strict=True))
        self.dim, self.crop, self.margin, self.drop = dim, crop, margin, drop
        self.first = nn.Linear(inputs, dim)
        self.norm, self.second = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.view_cache = ViewCache()

    @property
    def frozen(self) -> list[CropFeatures]:
        """The frozen networks on the crops."""
        return [getattr(self, name) for name in self._names]

    def load_pretrained(self) -> None:
        """Loads the published weights of the frozen networks."""
        for network in self.frozen:
            network.load_pretrained()

    def load_weights(self, state: Mapping[str, Tensor], *, where: str) -> None:
        """Loads a file of the whole network into the only frozen network that takes one.

        Raises:
            WeightsError: it does not fit, or it is not clear for which network it is; `where` names it.
        """
        networks = [network for network in self.frozen if isinstance(network, TimmCrops)]
        if len(networks) != 1:
            raise WeightsError(f"{where}: {len(networks)} of the backbones take weights of a file: leave `weights` out")
        for network in self.frozen:
            if network is not networks[0]:
                network.load_pretrained()
        networks[0].load_state(state, where=where)

    @torch.no_grad()
    def pool(self, image: Tensor, boxes: Tensor) -> Tensor:
        if not self.training:
            return self._join(self._crop_maps(image, boxes))
        return self._join(self.view_cache.recall([image, boxes], lambda: self._rounded(self._crop_maps(image, boxes))))

    def _crop_maps(self, image: Tensor, boxes: Tensor) -> list[Tensor]:
        """Returns the maps of all frozen networks, fine and coarse."""
        maps = []
        for network in self.frozen:
            crops = self.cut_out(image, boxes, network)
            parts = [network.crop_maps(part) for part in crops.split(network.at_once(crops.device))]
            maps += [torch.cat(levels) for levels in zip(*parts, strict=True)]
        return maps

    def _rounded(self, maps: list[Tensor]) -> list[Tensor]:
        return [level.half() for level in maps] if self._is_rounded else maps

    def _join(self, maps: list[Tensor]) -> Tensor:
        """Joins maps of several strides to (N, D, S, S) float32."""
        return torch.cat([_enlarge(level.float(), self.pooled_size) for level in maps], 1)

    def cut_out(self, image: Tensor, boxes: Tensor, network: CropFeatures) -> Tensor:
        """Cuts boxes (N, 4) out of an image (3, H, W) uint8: (N, 3, crop, crop), normalised, zeros beyond the image."""
        pixels = normalise(image, network.mean, network.std)[None]
        return cut_out(pixels, [boxes], self.crop, self.margin)

    def neck(self, pooled: Tensor, noise: SampleNoise | None = None) -> Tensor:
        parts = zip(pooled.split(self._channels, 1), self._shrink, strict=True)
        cells = torch.cat([F.avg_pool2d(part, factor).flatten(1) for part, factor in parts], 1)
        x = dropout(F.relu(self.norm(self.first(cells))), noise, rate=self.drop)
        return dropout(F.relu(self.second(x)), noise, rate=self.drop)


def _enlarge(maps: Tensor, side: int) -> Tensor:
    return maps if maps.shape[-1] == side else F.interpolate(maps, size=(side, side), mode="nearest")
