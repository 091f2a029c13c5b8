"""A tiny DINO, images and targets for tests of detectors."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weaksam.models.backbones.pyramids import Pyramid
from weaksam.models.detectors.base import Detector, Targets
from weaksam.models.detectors.dino import Dino, DinoSize
from weaksam.ops.boxes import box_iou

CPU = torch.device("cpu")
SIZE = DinoSize(
    dim=32, heads=4, points=2, encoder_layers=1, decoder_layers=3, ffn=48, levels=4, queries=12, num_denoising=6,
    detections=20,
)  # fmt: skip
NOTHING = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
TWO = Targets(torch.tensor([[4.0, 4, 30, 30], [20, 20, 60, 50]]), torch.tensor([0, 2]))
ONE = Targets(torch.tensor([[30.0, 20, 46, 40]]), torch.tensor([1]))
COLOURS = torch.tensor([[230, 40, 40], [40, 220, 60], [60, 80, 240]])


class TinyPyramid(Pyramid):
    """Strides 4 to 16. Without biases padding stays zero, as it is beyond the edge."""

    channels, strides = (16, 24, 32), (4, 8, 16)

    def __init__(self, *, maps: int = 3) -> None:
        super().__init__()
        self.channels, self.strides = self.channels[:maps], self.strides[:maps]
        steps = [(3, 16, 4), (16, 24, 2), (24, 32, 2)][:maps]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, step + 1, step, step // 2, bias=False) for i, o, step in steps)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return list(itertools.accumulate(self.convs, lambda x, conv: F.relu(conv(x)), initial=pixels))[1:]


def make_image(height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def make_dino(size: DinoSize = SIZE, **options) -> Dino:
    """A small one in which everything matters: no weight is zero any more."""
    torch.manual_seed(0)
    net = Dino(TinyPyramid(), 3, size, **options)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn_like(p)
    return net


def draw_rectangles(num: int = 4, side: int = 64) -> tuple[list[Tensor], list[Targets]]:
    """Images with two or three coloured rectangles each that do not overlap; the colour is the class."""
    generator = torch.Generator().manual_seed(3)
    images, targets = [], []
    for _ in range(num):
        image = torch.randint(90, 130, (3, side, side), generator=generator, dtype=torch.uint8)
        boxes: list[list[int]] = []
        while len(boxes) < 2 + len(images) % 2:
            w, h = (int(torch.randint(12, 30, (), generator=generator)) for _ in range(2))
            x, y = (int(torch.randint(0, side - n, (), generator=generator)) for n in (w, h))
            box = torch.tensor([[x, y, x + w, y + h]]).float()
            if not boxes or box_iou(box, torch.tensor(boxes).float()).max() == 0:
                boxes.append([x, y, x + w, y + h])
        classes = torch.randint(3, (len(boxes),), generator=generator)
        for (x, y, right, bottom), label in zip(boxes, classes, strict=True):
            image[:, y:bottom, x:right] = COLOURS[label][:, None, None]
        images.append(image)
        targets.append(Targets(torch.tensor(boxes).float(), classes))
    return images, targets


def check_learnt(net: Detector, images: list[Tensor], targets: list[Targets]) -> None:
    """Every object is among the best detections, with its class."""
    for found, wanted in zip(net.detect(images), targets, strict=True):
        best = slice(len(wanted.classes))
        overlap = box_iou(wanted.boxes, found.boxes[best]) * (wanted.classes[:, None] == found.classes[best])
        assert overlap.amax(1).min() > 0.7
        assert found.scores[best].min() > 0.3
