"""Training targets of a detector, and their check before every detector's losses.

A box without area, an invalid class or a mask of 0 and 255 raises no error in a loss: it makes weights NaN, counts as
background or makes a loss negative. So all targets pass this check before a loss.
Axis legend: B images, C classes, G objects of an image, N objects of all of them, H W pixels.
Boxes are xyxy, absolute pixels of the image, float32, right and bottom exclusive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from weaksam.ops.box_areas import LEAST_SIDE


class Targets(NamedTuple):
    """Objects of an image: boxes (G, 4) float32 and classes (G,) int64; masks (G, H, W) bool, where required.

    G may be 0.
    """

    boxes: Tensor
    classes: Tensor
    masks: Tensor | None = None

    def known_masks(self) -> Tensor:
        """Returns masks (G, H, W) bool of checked targets; (0, 1, 1) for an image without objects and masks."""
        if self.masks is not None:
            return self.masks
        return torch.zeros(0, 1, 1, dtype=torch.bool, device=self.boxes.device)


class TargetError(ValueError):
    """An invalid target; `image` is the index of its image in the call."""

    def __init__(self, image: int, fault: str) -> None:
        self.image, self.fault = image, fault
        super().__init__(image, fault)  # the original arguments, so that it survives pickling between processes

    def __str__(self) -> str:
        return f"targets of image {self.image}, {self.fault}"


def check_targets(
    images: Sequence[Tensor], targets: Sequence[Targets], num_classes: int, *, with_masks: bool = False
) -> None:
    """Raises TargetError, which names image and row, unless the targets are valid.

    Images are uint8: values in 0..1 would be nearly black. Boxes are finite, have an area and lie on their image,
    or at most an image's size beyond it; classes are 0 to C - 1, as many as boxes; masks are bool and as large as their
    image. Waits for the device once.

    Args:
        images: B of (3, H, W) uint8.
        targets: B.
        num_classes: C.
        with_masks: whether every object needs a mask.
    """
    if not len(images) or len(images) != len(targets):
        raise ValueError(f"losses need targets for each of at least one image: got {len(images)} and {len(targets)}")
    for i, (image, image_targets) in enumerate(zip(images, targets, strict=True)):
        _check_form(i, image, image_targets, with_masks=with_masks)
    sizes = [(image.shape[2], image.shape[1]) for image in images]
    counts = [len(image_targets.classes) for image_targets in targets]
    boxes = torch.cat([image_targets.boxes for image_targets in targets])
    classes = torch.cat([image_targets.classes for image_targets in targets])
    limits = torch.tensor([wh * 2 for wh, count in zip(sizes, counts, strict=True) for _ in range(count)])
    if not len(boxes):
        return
    limits = limits.to(boxes)
    faults = torch.stack(
        [
            ~boxes.isfinite().all(1),
            ~((boxes[:, 2:] - boxes[:, :2]) >= LEAST_SIDE).all(1),
            ~((boxes >= -limits) & (boxes <= 2 * limits)).all(1),
            (classes < 0) | (classes >= num_classes),
        ]
    )
    if faults.any():
        _raise_first(faults.cpu(), boxes.cpu(), classes.cpu(), sizes, counts, num_classes)


def _check_form(index: int, image: Tensor, targets: Targets, *, with_masks: bool) -> None:
    """Raises TargetError unless dtypes and shapes are right; reads no values."""
    boxes, classes, masks = targets
    fault = None
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel() or image.dtype != torch.uint8:
        fault = f"the image itself: must be (3, height, width) uint8, got {_describe(image)}"
    elif boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype != torch.float32:
        fault = f"boxes: must be (objects, 4) float32, got {_describe(boxes)}"
    elif classes.ndim != 1 or classes.dtype != torch.int64:
        fault = f"classes: must be (objects,) int64, got {_describe(classes)}"
    elif len(classes) != len(boxes):
        fault = f"{len(boxes)} boxes and {len(classes)} classes: each box has one class"
    elif masks is None and with_masks and len(boxes):
        fault = f"{len(boxes)} objects without masks: give `masks`"
    elif masks is not None and not _fit(masks, len(boxes), image):
        expected = (len(boxes), *image.shape[1:])
        fault = f"masks: must be bool, one an object, of the image's size, {expected}, got {_describe(masks)}"
    if fault is not None:
        raise TargetError(index, fault)


def _fit(masks: Tensor, count: int, image: Tensor) -> bool:
    has_size = masks.ndim == 3 and len(masks) == count and (not count or masks.shape[1:] == image.shape[1:])
    return has_size and masks.dtype == torch.bool


def _describe(values: Tensor) -> str:
    return f"{tuple(values.shape)} {str(values.dtype).removeprefix('torch.')}"


def _raise_first(
    faults: Tensor,
    boxes: Tensor,
    classes: Tensor,
    sizes: Sequence[tuple[int, int]],
    counts: Sequence[int],
    num_classes: int,
) -> None:
    """Raises ValueError for the first row with a fault; `faults` is (4, N) bool."""
    number = int(faults.any(0).nonzero()[0, 0])
    image = int(np.searchsorted(np.cumsum(counts), number, side="right"))
    row = number - sum(counts[:image])
    box = ", ".join(f"{value:.6g}" for value in boxes[number].tolist())
    width, height = sizes[image]
    reasons = (
        f"box ({box}) is not finite",
        f"box ({box}) has no area: left < right and top < bottom by {LEAST_SIDE:g} pixels at least",
        f"box ({box}) lies far beyond the image, which is {width} pixels wide and {height} high",
        f"class {int(classes[number])} is none of 0 to {num_classes - 1}",
    )
    fault = int(faults[:, number].nonzero()[0, 0])
    others = int(faults.any(0).sum()) - 1
    more = f", and {others} more rows are wrong" if others else ""
    raise TargetError(image, f"row {row}: {reasons[fault]}{more}")
