"""Randomness inside a network that depends on the sample alone, not on which others share its batch or worker.

Every sample of a step has a generator of its own, made from (seed of the training, round of the samples, sample). A
round visits every sample once, so the step decides it. What a network draws for a sample comes from that generator.
Generators are on the device that computes: a GPU draws other numbers than a processor.

Axis legend: B images, R RoIs of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def noise_seeds(seeds: np.ndarray) -> Tensor:
    """(B,) int64, what the generators inside the network start from; apart from what augmentation draws.

    Args:
        seeds: (B, 3) int64, of the samples, see `weaksam.training.state.draw_batch`.
    """
    return torch.tensor([int(np.random.default_rng([*seed, 1]).integers(2**62)) for seed in seeds], dtype=torch.int64)


def make_generators(seeds: Sequence[int], device: torch.device) -> list[torch.Generator]:
    """The generator of each of B samples, which numbers on `device` are drawn from; `seeds` are of `noise_seeds`."""
    return [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]


@contextmanager
def drawn_from(generator: torch.Generator) -> Iterator[None]:
    """Within it, what draws from torch's own generator of that device draws from `generator`.

    For code of libraries that takes no generator. Afterwards torch's own is as it was before.
    """
    device = generator.device
    own = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    before = own.get_state()
    own.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(own.get_state())
        own.set_state(before)


@dataclass(frozen=True)
class SampleNoise:
    """Random numbers for the RoIs of a batch, image by image.

    Attributes:
        generators: (B,) of the images.
        sizes: (B,) RoIs of each.
    """

    generators: Sequence[torch.Generator]
    sizes: Sequence[int]

    def uniform(self, *shape: int) -> Tensor:
        """(R, *shape) float32 in [0, 1); each call gives new ones."""
        drawn = [
            torch.rand(size, *shape, generator=generator, device=generator.device)
            for size, generator in zip(self.sizes, self.generators, strict=True)
        ]
        return torch.cat(drawn)


def dropout(x: Tensor, noise: SampleNoise | None, *, rate: float = 0.5) -> Tensor:
    """Zeroes a share `rate` of `x` (R, D) and scales the rest up; nothing without noise, as at test time."""
    if noise is None or rate == 0:
        return x
    return x * (noise.uniform(*x.shape[1:]) >= rate).to(x.dtype) / (1 - rate)
