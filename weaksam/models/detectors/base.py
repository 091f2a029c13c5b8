"""The interface of detectors that learn from boxes, and the batching of images.

Axis legend: B images, H W pixels, G objects of an image, K detections of an image.
Boxes are xyxy, absolute pixels of the image, float32, right and bottom exclusive.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from weaksam.models.backbones.pyramids import Pyramid, load_from
from weaksam.models.detectors.targets import Targets, check_targets
from weaksam.models.noise import make_generators

__all__ = ["Batch", "Detections", "Detector", "Normaliser", "Targets"]


class Detections(NamedTuple):
    """Detections of an image, best first: boxes (K, 4) float32, classes (K,) int64, scores (K,) float32 in 0..1.

    And masks (K, H, W) bool, for detectors with masks.
    """

    boxes: Tensor
    classes: Tensor
    scores: Tensor
    masks: Tensor | None = None


class Batch(NamedTuple):
    """A batch of images: pixels (B, 3, H, W) float32, padded with zeros; sizes, (height, width) of each."""

    pixels: Tensor
    sizes: list[tuple[int, int]]

    @property
    def inside(self) -> Tensor:
        """Mask (B, H, W) bool of the pixels that are no padding."""
        height, width = self.pixels.shape[2:]
        rows, columns = (torch.arange(n, device=self.pixels.device) for n in (height, width))
        sizes = torch.tensor(self.sizes, device=self.pixels.device)
        return (rows[None, :, None] < sizes[:, 0, None, None]) & (columns[None, None, :] < sizes[:, 1, None, None])


class Detector(nn.Module):
    """Base of the detectors.

    The loss of an image depends on no other image of its batch, up to the order of floating-point sums: its random
    numbers come from its own generator, and its padding does not depend on the batch. So the losses of a batch are the
    sums of the losses of its parts, for any workers and micro-batches. Exceptions are documented at the detector.

    Attributes:
        num_classes: C.
        learns_masks: whether training needs a mask of every object.
        normaliser: normalises and batches images.
    """

    num_classes: int
    learns_masks = False
    normaliser: Normaliser

    def losses(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Targets],
        step: int,
        generators: Sequence[torch.Generator] | None = None,
    ) -> dict[str, Tensor]:
        """Returns losses summed over images, with gradients, and further values for the log.

        Names of losses start with `loss`; values of other names are only logged. Every trainable weight takes part in
        every call.

        Args:
            images: B of (3, H, W) uint8 RGB, of any sizes, on the detector's device.
            targets: B, on the same device.
            step: step of the training, from 0.
            generators: B, on the same device; the random numbers of an image come from its generator. None creates
                new generators, seeded by torch's default CPU generator.

        Raises:
            ValueError: a target is invalid, see `check_targets`.
        """
        check_targets(images, targets, self.num_classes, with_masks=self.learns_masks)
        if generators is None:
            generators = make_generators(torch.randint(2**62, (len(images),)).tolist(), images[0].device)
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault(self._padded_size(image), []).append(i)
        parts = [
            self._losses([images[i] for i in rows], [targets[i] for i in rows], step, [generators[i] for i in rows])
            for rows in by_size.values()
        ]
        return {key: torch.stack([part[key] for part in parts]).sum() for key in parts[0]}

    def _padded_size(self, image: Tensor) -> tuple[int, int]:
        """Returns height and width of an image with padding; images of the same padded size are computed together."""
        return self.normaliser.padded_size([image])

    def _losses(
        self, images: Sequence[Tensor], targets: Sequence[Targets], step: int, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """Implements `losses` for images of one `_padded_size` and checked targets."""
        raise NotImplementedError

    def detect(self, images: Sequence[Tensor], mask_sizes: Sequence[tuple[int, int]] | None = None) -> list[Detections]:
        """Returns detections of each of B images (3, H, W) RGB of 0..255, in the pixels of that image. In eval mode.

        Masks have `mask_sizes`, a (height, width) per image, or the size of the image. A resized image so gets masks at
        its original resolution.
        """
        raise NotImplementedError

    def load_pretrained(self, weights: str | None) -> None:
        """Loads the backbone from a file at a URI, or its published weights.

        Raises:
            WeightsError: the file lacks weights of the backbone, or they have other shapes.
        """
        for module in self.modules():
            if isinstance(module, Pyramid):
                load_from(module, weights)

    def early_parameters(self) -> tuple[list[nn.Parameter], int]:
        """Returns parameters trained only during the first N steps, before all others, and N; none by default."""
        return [], 0

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters of the backbone, which are pretrained on another task."""
        for module in self.modules():
            if isinstance(module, Pyramid):
                yield from module.parameters()


class Normaliser(nn.Module):
    """Batches images (3, H, W) uint8 RGB, normalised for a backbone.

    Args:
        pyramid: the backbone.
        multiple: both sides are padded to a multiple of this.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, pyramid: Pyramid, multiple: int = 32) -> None:
        super().__init__()
        self.multiple = multiple
        self.register_buffer("mean", torch.tensor(pyramid.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(pyramid.std).view(3, 1, 1), persistent=False)

    def padded_size(self, images: Sequence[Tensor]) -> tuple[int, int]:
        """Returns height and width of the batch."""
        sides = zip(*(image.shape[1:] for image in images), strict=True)
        height, width = (-(-max(side) // self.multiple) * self.multiple for side in sides)
        return height, width

    def forward(self, images: Sequence[Tensor]) -> Batch:
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
        height, width = self.padded_size(images)
        pixels = images[0].new_zeros((len(images), 3, height, width), dtype=torch.float32)
        for i, image in enumerate(images):
            pixels[i, :, : image.shape[1], : image.shape[2]] = (image.float() - self.mean) / self.std
        return Batch(pixels, sizes)
