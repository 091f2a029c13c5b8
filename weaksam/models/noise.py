"""Randomness inside a network that depends on the sample alone, not on which others share its batch or worker.

Axis legend: B images, R RoIs of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleNoise:
    """Random numbers for the RoIs of a batch, from one seed per image.

    Attributes:
        seeds: (B,) of the images.
        sizes: (B,) RoIs of each.
        device: where the numbers are wanted.
    """

    seeds: Sequence[int]
    sizes: Sequence[int]
    device: torch.device

    @cached_property
    def _generators(self) -> list[torch.Generator]:
        return [torch.Generator(self.device).manual_seed(int(seed)) for seed in self.seeds]

    def uniform(self, *shape: int) -> Tensor:
        """(R, *shape) float32 in [0, 1); each call gives new ones."""
        drawn = [
            torch.rand(size, *shape, generator=generator, device=self.device)
            for size, generator in zip(self.sizes, self._generators, strict=True)
        ]
        return torch.cat(drawn)


def dropout(x: Tensor, noise: SampleNoise | None, *, rate: float = 0.5) -> Tensor:
    """Zeroes a share `rate` of `x` (R, D) and scales the rest up; nothing without noise, as at test time."""
    if noise is None or rate == 0:
        return x
    return x * (noise.uniform(*x.shape[1:]) >= rate).to(x.dtype) / (1 - rate)
