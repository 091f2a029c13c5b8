"""Small weakly supervised detectors for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from weaksam.models.backbones.crop_net import CropNet
from weaksam.models.noise import SampleNoise, make_generators
from weaksam.models.wsod.network import METHODS, WsodNet

CPU = torch.device("cpu")
BOXES = torch.tensor([[4.0, 4, 30, 30], [10, 12, 50, 40], [0, 0, 64, 48], [33, 3, 60, 20], [20, 20, 44, 44]])


def make_image(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, 48, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def make_noise(seeds: list[int], sizes: list[int]) -> SampleNoise:
    return SampleNoise(make_generators(seeds, CPU), sizes)


def make_net(method: str = "mist", *, dropblock: bool = False, classes: int = 3) -> WsodNet:
    torch.manual_seed(0)
    network = CropNet(dim=64)
    network.sam.load_pretrained()
    return WsodNet(network, classes, METHODS[method], dropblock=dropblock)
