"""Parts of torchvision's Faster R-CNN whose results for an image depend on no other image.

Axis legend: A anchors or RoIs of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from weaksam.models.noise import drawn_from


class ImageSampler(BalancedPositiveNegativeSampler):
    """Samples anchors or RoIs for the losses, with each image's own generator.

    Attributes:
        generators: generators of the images of the next call.
    """

    generators: Sequence[torch.Generator] = ()

    @classmethod
    def like(cls, other: BalancedPositiveNegativeSampler) -> ImageSampler:
        """Returns a sampler with the sizes of another."""
        return cls(other.batch_size_per_image, other.positive_fraction)

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the sampled objects and the sampled background of each image, masks (A,) uint8.

        Args:
            matched_idxs: (A,) per image, -1 = neither, 0 = background, above = an object.
        """
        positive, negative = [], []
        for matched, generator in zip(matched_idxs, self.generators, strict=True):
            with drawn_from(generator):
                (own_positive,), (own_negative,) = super().__call__([matched])
            positive.append(own_positive)
            negative.append(own_negative)
        return positive, negative


class RpnHead(RPNHead):
    """torchvision's, with float32 results under autocast: boxes are decoded in the dtype of their deltas.

    In bf16, the step between two coordinates over 512 pixels is 4 pixels.
    """

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class BoxPredictor(FastRCNNPredictor):
    """torchvision's, with float32 results under autocast, as `RpnHead`."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class RoiAlign(MultiScaleRoIAlign):
    """RoIAlign on levels of known strides.

    torchvision infers the strides from the first image and keeps them; padding makes it infer wrong ones from an image
    that is lower than 76 pixels.

    Args:
        strides: strides of the levels, fine to coarse.
        output_size: side of a pooled RoI.
    """

    def __init__(self, strides: Sequence[int], output_size: int) -> None:
        super().__init__([str(level) for level in range(len(strides))], output_size, sampling_ratio=2)
        self.scales = [1 / stride for stride in strides]
        first, last = (int(math.log2(stride)) for stride in (strides[0], strides[-1]))
        self.map_levels = initLevelMapper(
            first, last, canonical_scale=self.canonical_scale, canonical_level=self.canonical_level
        )
