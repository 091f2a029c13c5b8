"""Per-sample random numbers inside a network, independent of the sample's batch and worker.

Every sample of a step has its own generator, seeded by (seed of the training, round, sample). A round visits every
sample once, so the step determines it. All random numbers of a sample come from its generator. Generators are on the
computing device: a GPU draws other numbers than a CPU.

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
    """Returns (B,) int64 seeds of the generators inside the network, independent of the augmentation's numbers.

    Args:
        seeds: (B, 3) int64 seeds of the samples, see `weaksam.training.state.draw_batch`.
    """
    return torch.tensor([int(np.random.default_rng([*seed, 1]).integers(2**62)) for seed in seeds], dtype=torch.int64)


def make_generators(seeds: Sequence[int], device: torch.device) -> list[torch.Generator]:
    """Returns a generator on `device` for each of B samples; `seeds` are from `noise_seeds`."""
    return [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]


@contextmanager
def drawn_from(generator: torch.Generator) -> Iterator[None]:
    """Context manager that replaces torch's default generator of a device by `generator`.

    For library code that takes no generator. On exit the default generator is restored.
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
        generators: (B,) generators of the images.
        sizes: (B,) number of RoIs of each image.
    """

    generators: Sequence[torch.Generator]
    sizes: Sequence[int]

    def uniform(self, *shape: int) -> Tensor:
        """Draws (R, *shape) float32 in [0, 1); each call returns new numbers."""
        drawn = [
            torch.rand(size, *shape, generator=generator, device=generator.device)
            for size, generator in zip(self.sizes, self.generators, strict=True)
        ]
        return torch.cat(drawn)


def dropout(x: Tensor, noise: SampleNoise | None, *, rate: float = 0.5) -> Tensor:
    """Zeroes a share `rate` of `x` (R, D) and scales the rest up; returns `x` without noise, as at test time."""
    if noise is None or rate == 0:
        return x
    return x * (noise.uniform(*x.shape[1:]) >= rate).to(x.dtype) / (1 - rate)
