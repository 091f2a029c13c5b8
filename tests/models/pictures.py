"""Small pictures with known boxes for the tests of detectors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from weaksam.models.detector import Targets


def squares_and_discs(count: int, *, side: int) -> tuple[list[Tensor], list[Targets]]:
    """`count` noisy pictures (3, side, side) uint8, each with a bright square (class 0) and a dark disc (class 1)."""
    images, targets = [], []
    for index in range(count):
        rng = np.random.default_rng(index)
        pixels = rng.normal(128, 10, (side, side, 3))
        radius = int(rng.integers(side // 8, side // 5))
        x, y = (int(v) for v in rng.integers(radius, side - radius, 2))
        left = 2 if x > side // 2 else side // 2
        top, size = int(rng.integers(2, side // 2)), int(rng.integers(side // 5, side // 3))
        rows, columns = np.mgrid[:side, :side]
        pixels[(rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2 <= radius**2] -= 90
        pixels[top : top + size, left : left + size] += 90
        boxes = [[left, top, left + size, top + size], [x - radius, y - radius, x + radius, y + radius]]
        images.append(torch.from_numpy(pixels.clip(0, 255).astype(np.uint8).transpose(2, 0, 1).copy()))
        targets.append(Targets(torch.tensor(boxes, dtype=torch.float32), torch.tensor([0, 1])))
    return images, targets
