"""Networks that turn an image and boxes on it into one feature vector per box, from maps of the whole image.

Each network has two halves, between which a detector may drop blocks: `pool(image, boxes)` returns a small map per box,
`neck(pooled, noise)` a vector. Images are uint8 RGB; the input format of a network (channel order, mean, standard
deviation) belongs to its weights and is stored with it.

Axis legend: N boxes, H W pixels, S side of a pooled map, D channels.
Boxes are xyxy, absolute pixels of the image, right and bottom exclusive.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50, vgg16
from torchvision.ops import FrozenBatchNorm2d, roi_pool

from weaksam.models.noise import SampleNoise, dropout
from weaksam.ops.boxes import to_inclusive
from weaksam.sam.build import PIXEL_MEAN, PIXEL_STD

Pixels = Literal["torchvision", "caffe"]

_CAFFE_MEAN = (122.7717, 115.9465, 102.9801)  # RGB, of 0..255


class RoiNet(nn.Module):
    """Base of the networks: how pixels are normalised, and how boxes are pooled.

    Attributes:
        stride: pixels of the image per cell of its feature map.
        pooled_channels, pooled_size: D and S of a pooled map.
        dim: length of a box's vector.
    """

    stride = 16
    pooled_channels, pooled_size, dim = 0, 7, 0

    def __init__(self, pixels: Pixels = "torchvision") -> None:
        super().__init__()
        self.is_bgr = pixels == "caffe"
        mean, std = (_CAFFE_MEAN, (1.0, 1.0, 1.0)) if pixels == "caffe" else (PIXEL_MEAN, PIXEL_STD)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def normalise(self, image: Tensor) -> Tensor:
        """Normalises an image (3, H, W) uint8 RGB to (1, 3, H, W) float."""
        values = (image - self.pixel_mean) / self.pixel_std  # pyright: ignore[reportOperatorIssue]
        return (values.flip(0) if self.is_bgr else values)[None]

    def features(self, image: Tensor) -> Tensor:
        """Returns the feature map (1, D, h, w) of a normalised image (1, 3, H, W)."""
        raise NotImplementedError

    def pool(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Pools boxes (N, 4) on an image (3, H, W) uint8 to (N, D, S, S).

        RoIPool, as in all of this literature: RoIAlign is reported to work worse (ppengtang/oicr, issue 14). RoIPool
        counts right and bottom as inside.
        """
        maps = self.features(self.normalise(image))
        rois = [to_inclusive(boxes).to(maps.dtype)]
        return roi_pool(maps, rois, (self.pooled_size, self.pooled_size), 1 / self.stride)

    def neck(self, pooled: Tensor, noise: SampleNoise | None = None) -> Tensor:
        """Returns (N, dim) of pooled maps (N, D, S, S); applies dropout when there is noise."""
        raise NotImplementedError


class DilatedVgg16(RoiNet):
    """VGG16 without its fourth pooling, conv5 dilated instead: stride 8 (OICR, arXiv 1704.00138).

    Keys are torchvision's.

    Args:
        pixels: pixel format the weights were trained on.
        last_relu: whether a ReLU follows conv5_3 before pooling; MIST's code leaves it out.
        frozen_stages: number of leading groups of convolutions that are not trained.
    """

    stride, pooled_channels, dim = 8, 512, 4096

    def __init__(self, pixels: Pixels = "torchvision", *, last_relu: bool = True, frozen_stages: int = 2) -> None:
        super().__init__(pixels)
        network = vgg16(weights=None)
        layers = list(network.features.children())[:-1]
        layers[23] = nn.Identity()  # pool4; keeps the indices, so the keys, of later layers
        for place in (24, 26, 28):
            layers[place] = nn.Conv2d(512, 512, 3, padding=2, dilation=2)
        if not last_relu:
            layers[29] = nn.Identity()
        self.body = nn.Sequential(OrderedDict(features=nn.Sequential(*layers)))
        self.classifier = nn.Sequential(*list(network.classifier.children())[:-1])
        firsts = (0, 5, 10, 17, 24, 30)
        for layer in layers[: firsts[frozen_stages]]:
            layer.requires_grad_(False)

    def features(self, image: Tensor) -> Tensor:
        return self.body(image)

    def neck(self, pooled: Tensor, noise: SampleNoise | None = None) -> Tensor:
        x = dropout(F.relu(self.classifier[0](pooled.flatten(1))), noise)
        return dropout(F.relu(self.classifier[3](x)), noise)


class ResNet50C5(RoiNet):
    """ResNet-50: the first three stages per image, at stride 8, the fourth per box. BatchNorm is frozen."""

    stride, pooled_channels, dim = 8, 1024, 2048

    def __init__(self, pixels: Pixels = "torchvision", *, frozen_stages: int = 2) -> None:
        super().__init__(pixels)
        network = resnet50(
            weights=None, norm_layer=FrozenBatchNorm2d, replace_stride_with_dilation=[False, True, False]
        )
        stem = nn.Sequential(
            OrderedDict(conv1=network.conv1, bn1=network.bn1, relu=network.relu, maxpool=network.maxpool)
        )
        self.body = nn.Sequential(
            OrderedDict(stem=stem, layer1=network.layer1, layer2=network.layer2, layer3=network.layer3)
        )
        self.layer4 = network.layer4
        for stage in list(self.body)[:frozen_stages]:
            stage.requires_grad_(False)

    def features(self, image: Tensor) -> Tensor:
        return self.body(image)

    def neck(self, pooled: Tensor, noise: SampleNoise | None = None) -> Tensor:
        return self.layer4(pooled).mean((2, 3))


def load_imagenet(network: RoiNet, state: Mapping[str, Tensor]) -> list[str]:
    """Loads an ImageNet classifier into `network`; keys are matched by their ends.

    torchvision's files number fc6 and fc7 classifier.0 and .3, files from Caffe (Johnson's) .1 and .4.

    Returns:
        keys of the network that `state` lacks.

    Raises:
        ValueError: a key's shape does not fit.
    """
    renamed = dict(state)
    if "classifier.1.weight" in renamed and "classifier.0.weight" not in renamed:
        moves = {f"classifier.{a}.{kind}": f"classifier.{b}.{kind}" for a, b in ((1, 0), (4, 3)) for kind in _KINDS}
        renamed = {moves.get(key, key): value for key, value in renamed.items()}
    for key in list(renamed):
        renamed[_STEM.get(key.split(".")[0], "") + key] = renamed[key]
    own = network.state_dict()
    matches = {key: renamed[name] for key in own if (name := key.removeprefix("body.")) in renamed}
    for key, value in matches.items():
        if own[key].shape != value.shape:
            raise ValueError(f"{key} must be {tuple(own[key].shape)}, the file has {tuple(value.shape)}")
    network.load_state_dict(matches, strict=False)
    return sorted(own.keys() - matches.keys())


_KINDS = ("weight", "bias")
_STEM = {"conv1": "stem.", "bn1": "stem."}
