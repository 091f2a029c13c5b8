"""Backbones of detectors, which return feature maps of several strides.

A pyramid has `channels` and `strides` of its maps, fine to coarse, and returns a list of maps.
Axis legend: B images, H W pixels, D channels, h w cells of a map.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.ops import FrozenBatchNorm2d

from weaksam.core.cache import fetch
from weaksam.errors import WeightsError
from weaksam.models.backbones.frozen_sam import FrozenSam
from weaksam.models.backbones.lite0 import CHANNELS, MEAN, STD, STRIDES, Lite0
from weaksam.models.backbones.timm_net import TimmNet, timm_info
from weaksam.models.backbones.view_cache import ViewCache
from weaksam.sam.build import PIXEL_MEAN, PIXEL_STD
from weaksam.sam.checkpoints import read_state

_STAGES = ("layer1", "layer2", "layer3", "layer4")


class Pyramid(nn.Module):
    """Base of the backbones.

    Attributes:
        channels: D of each map, fine to coarse.
        strides: pixels of the image per cell of each map.
        mean, std: normalisation of images of 0..255.
    """

    channels: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    mean: tuple[float, ...] = tuple(PIXEL_MEAN)
    std: tuple[float, ...] = tuple(PIXEL_STD)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Returns maps (B, D, h, w) of normalised images (B, 3, H, W)."""
        raise NotImplementedError

    def load_pretrained(self) -> None:
        """Loads the published weights of the backbone."""
        raise NotImplementedError

    def load_weights(self, state: Mapping[str, Tensor], *, where: str) -> None:
        """Loads weights from a file of the whole network.

        Raises:
            WeightsError: a weight is missing or of another shape, or the backbone has weights of its own; `where` names
                the file.
        """
        raise WeightsError(f"{where}: this backbone has weights of its own: leave `weights` out")


class ResNet50(Pyramid):
    """The four stages of ResNet-50, strides 4 to 32. BatchNorm is frozen; keys are torchvision's.

    Args:
        frozen_stages: number of leading stages that are not trained; the first includes the stem. 0 = all are trained.
    """

    channels, strides = (256, 512, 1024, 2048), (4, 8, 16, 32)

    def __init__(self, frozen_stages: int = 1) -> None:
        super().__init__()
        network = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
        for name, module in network.named_children():
            if name not in ("avgpool", "fc"):
                self.add_module(name, module)
        for name in ("conv1", *_STAGES[:frozen_stages]) if frozen_stages else ():
            self.get_submodule(name).requires_grad_(False)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = self.get_submodule("maxpool")(self.relu(self.bn1(self.conv1(pixels))))  # pyright: ignore[reportCallIssue]
        maps = []
        for name in _STAGES:
            x = self.get_submodule(name)(x)
            maps.append(x)
        return maps

    def load_pretrained(self) -> None:
        known = ResNet50_Weights.IMAGENET1K_V1
        self.load_weights(known.get_state_dict(check_hash=True), where=known.url)

    def load_weights(self, state: Mapping[str, Tensor], *, where: str) -> None:
        """Loads the weights of an ImageNet classifier with torchvision's keys, without its last layer.

        Raises:
            WeightsError: a weight is missing or of another shape; `where` names the file.
        """
        own = self.state_dict()
        for key, value in own.items():
            if key not in state:
                raise WeightsError(f"{where}: has no {key}: give a ResNet-50 with torchvision's keys")
            if state[key].shape != value.shape:
                raise WeightsError(f"{where}: {key} is {tuple(state[key].shape)}, must be {tuple(value.shape)}")
        self.load_state_dict({key: state[key] for key in own})


class Lite0Pyramid(Pyramid):
    """The last three stages of EfficientNet-Lite0, strides 8 to 32, with ImageNet weights that need no download.

    Args:
        frozen_stages: number of leading stages, of strides 2, 4, 8, 16, 32, that are not trained.
    """

    channels, strides, mean, std = CHANNELS[2:], STRIDES[2:], MEAN, STD

    def __init__(self, frozen_stages: int = 3) -> None:
        super().__init__()
        self.lite0 = Lite0(frozen_stages)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return self.lite0(pixels)[2:]

    def load_pretrained(self) -> None:
        self.lite0.load_pretrained()


class SamPyramid(Pyramid):
    """Maps of the frozen small SAM: its patch embedding at strides 4 and 8, its features at stride 16.

    For few small images and no GPU. While training, the maps of a view are cached.

    Args:
        variant: variant of the SAM.
        finest: stride of the first map, 4, 8 or 16; layers trained on a map of stride 4 cost more than the SAM.
    """

    def __init__(self, variant: str = "vit_xs", *, finest: int = 4) -> None:
        super().__init__()
        self.sam = FrozenSam(variant)
        self.view_cache = ViewCache()
        first = (4, 8, 16).index(finest)
        self.channels, self.strides = (32, 64, 96)[first:], (4, 8, 16)[first:]

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> list[Tensor]:
        if not self.training:
            return self._sam_maps(pixels)
        views = [self.view_cache.recall([image], partial(self._sam_maps, image)) for image in pixels.split(1)]
        return [torch.cat(maps) for maps in zip(*views, strict=True)]

    def _sam_maps(self, pixels: Tensor) -> list[Tensor]:
        return self.sam.pyramid(pixels)[-len(self.channels) :]

    def load_pretrained(self) -> None:
        self.sam.load_pretrained()


class TimmPyramid(Pyramid):
    """Maps of a network of timm at strides 8 to 32, or those that it has; of a plain ViT three maps are made.

    The map of a plain ViT, of its patches, is enlarged by a trained transposed convolution and shrunk by pooling, as in
    ViTDet (arXiv 2203.16527).

    Args:
        name: timm's name of the network.
        frozen_stages: number of leading maps of the network whose layers are not trained; of a plain ViT, all layers
            or, with 0, none.
    """

    def __init__(self, name: str, frozen_stages: int = 1) -> None:
        super().__init__()
        info = timm_info(name)
        strides = [stride for stride in info.strides if stride >= 8]
        self.network = TimmNet(name, strides=strides, frozen_maps=frozen_stages)
        self.mean, self.std = info.mean, info.std
        self.channels, self.strides = self.network.channels, self.network.strides
        if info.is_plain_vit:
            (channels,), (stride,) = self.channels, self.strides
            self.finer = nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)
            self.channels, self.strides = (channels // 2, channels, channels), (stride // 2, stride, 2 * stride)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        maps = self.network(pixels)
        if not self.network.is_plain_vit:
            return maps
        return [self.finer(maps[0]), maps[0], F.max_pool2d(maps[0], 2, ceil_mode=True)]

    def load_pretrained(self) -> None:
        self.network.load_pretrained()

    def load_weights(self, state: Mapping[str, Tensor], *, where: str) -> None:
        """See `Pyramid.load_weights`; the file has timm's keys."""
        self.network.load_state(state, where=where)


def load_from(pyramid: Pyramid, weights: str | None) -> None:
    """Loads starting weights from a URI, or the published weights of the backbone."""
    if weights is None:
        pyramid.load_pretrained()
    else:
        pyramid.load_weights(read_state(fetch(weights), wrappers=("model", "state_dict")), where=weights)
