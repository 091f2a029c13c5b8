"""Concrete DropBlock: drops the blocks of a box's pooled map that the detector relies on most.

A small network predicts the blocks and is trained to *raise* the detector's loss, so that no single part is enough.
Source: MIST (arXiv 2004.04725), section 3.3; DropBlock (arXiv 1810.12890); Gumbel-softmax (arXiv 1611.01144).
Differs from the published code: batch norm and the rescaling of kept cells use the boxes of one image, not of the
batch, so the number of workers changes nothing.

Axis legend: R boxes of a batch, D channels, S side of a pooled map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weaksam.models.noise import SampleNoise

_BLOCK = 3  # side of a dropped block, cells
_TEMPERATURE = 0.01
_MOST_DROPPED = 0.3  # share of the cells of a map that may be dropped
_EPS = 1e-10


class ConcreteDropBlock(nn.Module):
    """Sets blocks of (R, D, S, S) to 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = _PerImageNorm(channels)
        self.conv2 = nn.Conv2d(channels, 2, 3, padding=1, bias=False)
        self.norm2 = _PerImageNorm(2)
        self.shortcut = nn.Conv2d(channels, 2, 1, bias=False)
        for conv in (self.conv1, self.conv2, self.shortcut):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pooled: Tensor, noise: SampleNoise, *, learns: bool) -> Tensor:
        """Drops blocks; `learns` passes the gradient of the loss with the opposite sign."""
        keep = torch.cat(
            [self._scaled(image_keep) for image_keep in self.draw(pooled.detach(), noise).split(list(noise.sizes))]
        )
        keep = 2 * keep.detach() - keep if learns else keep.detach()  # the same value; slope -1 or none
        return pooled * keep.to(pooled.dtype)

    def draw(self, pooled: Tensor, noise: SampleNoise) -> Tensor:
        """Returns (R, 1, S, S) of 0 and 1, the kept cells, with the gradient of the soft version."""
        hidden = F.relu(self.norm1(self.conv1(pooled), noise.sizes))
        logits = self.norm2(self.conv2(hidden), noise.sizes) + self.shortcut(pooled)
        # Scales the probability of centres, so that blocks cover at most the intended share.
        probability = logits[:, 0].float().sigmoid() * (_MOST_DROPPED / _BLOCK**2)
        both = torch.stack([probability, 1 - probability], 1)
        uniform = noise.uniform(2, *probability.shape[1:]).clamp(_EPS, 1 - 1e-7)
        soft = ((torch.log(both + _EPS) - torch.log(-torch.log(uniform))) / _TEMPERATURE).softmax(1)[:, :1]
        centres = (soft > 0.5).to(soft.dtype) - soft.detach() + soft
        return 1 - F.max_pool2d(centres, _BLOCK, stride=1, padding=_BLOCK // 2)

    @staticmethod
    def _scaled(keep: Tensor) -> Tensor:
        return keep * keep.numel() / keep.sum().clamp(min=1)


class _PerImageNorm(nn.Module):
    """Batch norm with the statistics of one image's boxes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        normed = [self._norm(rows) if len(rows) else rows for rows in x.split(list(sizes))]
        return torch.cat(normed)

    def _norm(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)
