"""Small pictures with known boxes and masks for the tests of detectors, and how these learn them by heart."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from weaksam.models.detectors.base import Detections, Detector, Targets
from weaksam.ops.boxes import box_iou


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


def masked_pictures(count: int, *, side: int) -> tuple[list[Tensor], list[Targets]]:
    """`squares_and_discs` with masks, each of the whole object, whatever hides it."""
    images, targets = squares_and_discs(count, side=side)
    rows, columns = torch.arange(side)[:, None] + 0.5, torch.arange(side)[None] + 0.5
    with_masks = []
    for one in targets:
        (left, top, right, bottom), disc = one.boxes.tolist()
        square = (columns > left) & (columns < right) & (rows > top) & (rows < bottom)
        x, y, radius = (disc[0] + disc[2]) / 2, (disc[1] + disc[3]) / 2, (disc[2] - disc[0]) / 2
        round_one = (columns - x) ** 2 + (rows - y) ** 2 <= radius**2
        with_masks.append(one._replace(masks=torch.stack([square, round_one])))
    return images, with_masks


def best_overlap(found: Detections, target: Targets) -> float:
    """Of the objects of an image, the least IoU of masks with its best detection of its class that scores over 0.5."""
    assert found.masks is not None
    assert target.masks is not None
    overlaps = []
    for label, mask in zip(target.classes, target.masks, strict=True):
        own = found.masks[(found.scores > 0.5) & (found.classes == label)]
        ious = (own & mask).sum((1, 2)) / (own | mask).sum((1, 2))
        overlaps.append(max(ious.tolist(), default=0.0))
    return min(overlaps)


def best_box_overlap(found: Detections, target: Targets) -> float:
    """Of the objects of an image, the least IoU of boxes with its best detection of its class that scores over 0.5."""
    overlaps = []
    for label, box in zip(target.classes, target.boxes, strict=True):
        own = found.boxes[(found.scores > 0.5) & (found.classes == label)]
        overlaps.append(max(box_iou(own, box[None]).flatten().tolist(), default=0.0))
    return min(overlaps)


def total(losses: dict[str, Tensor]) -> Tensor:
    """The sum of what is learnt from."""
    return torch.stack([value for name, value in losses.items() if name.startswith("loss")]).sum()


def learn(net: Detector, images: list[Tensor], targets: list[Targets], *, steps: int, lr: float) -> None:
    """Trains on all images at once; ends in eval mode."""
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        (total(net.losses(images, targets, step)) / len(images)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    net.eval()


def learn_in_stages(net: Detector, images: list[Tensor], targets: list[Targets], *, steps: int) -> None:
    """Trains the weights that learn early, then the others, on all images at once."""
    torch.manual_seed(0)  # the detector draws its generators from it
    early, last = net.early_parameters()
    others = [p for p in net.parameters() if p.requires_grad and id(p) not in set(map(id, early))]
    for parameters, some in ((early, range(last)), (others, range(last, steps))):
        optimizer = torch.optim.AdamW(parameters, lr=3e-3)
        for step in some:
            (total(net.losses(images, targets, step)) / len(images)).backward()
            optimizer.step()
            net.zero_grad()


def assert_same(found: Detections, other: Detections) -> None:
    """Two answers with masks are equal to the bit."""
    for one, two in zip(found, other, strict=True):
        assert one is not None
        assert two is not None
        assert torch.equal(one, two)
