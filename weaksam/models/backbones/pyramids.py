"""Backbones of detectors, which return feature maps of several strides.

A pyramid has `channels` and `strides` of its maps, fine to coarse, and returns a list of maps.
Axis legend: B images, H W pixels, D channels, h w cells of a map.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.ops import FrozenBatchNorm2d

from weaksam.core.cache import fetch
from weaksam.errors import WeightsError
from weaksam.models.backbones.frozen_sam import FrozenSam
from weaksam.models.backbones.lite0 import CHANNELS, MEAN, STD, STRIDES, Lite0
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
        self.load_imagenet(known.get_state_dict(check_hash=True), where=known.url)

    def load_imagenet(self, state: Mapping[str, Tensor], *, where: str) -> None:
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
        self.lite0.load_shipped()


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
        self.sam.load_shipped()


def load_from(pyramid: Pyramid, weights: str | None) -> None:
    """Loads starting weights from a URI, or the published weights of the backbone."""
    if weights is None:
        pyramid.load_pretrained()
    elif isinstance(pyramid, ResNet50):
        state = read_state(fetch(weights), wrappers=("model", "state_dict"))
        pyramid.load_imagenet(state, where=weights)
    else:
        raise WeightsError(f"{weights}: this backbone has weights of its own: leave `weights` out")
