"""Contrastive denoising: noisy copies of an image's objects as queries with known targets (DINO).

A group holds each object twice: with little noise, to be corrected, and with much noise, to be classified as
background. Groups do not attend to one another. An image's groups depend on no other image of its batch: the function
in transformers takes their number from the image with most objects and lets objects attend to padding.

Axis legend: B images, G objects of an image, N noisy queries of an image (padded to the maximum of the batch), Q other
queries. Boxes are normalised cxcywh.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from weaksam.models.detectors.base import Targets
from weaksam.models.detectors.normalized_boxes import inverse_sigmoid

FILLER = -1  # group of an empty slot
_OTHERS = -2  # group of the other queries


class Noised(NamedTuple):
    """Noisy queries.

    Attributes:
        classes: (B, N) int64, noisy class of the query.
        references: (B, N, 4) logits of the noisy box.
        objects: (B, N) int64, target object of the query, -1 = background.
        groups: (B, N) int64 from 0, or FILLER.
    """

    classes: Tensor
    references: Tensor
    objects: Tensor
    groups: Tensor

    @property
    def num_groups(self) -> Tensor:
        """Number of groups of each image, (B,) int64, at least 1."""
        return (self.groups.amax(1) + 1).clamp(min=1)

    def visible(self, others: int) -> Tensor:
        """Returns the attention mask (B, 1, Q + N, Q + N) bool of queries (rows); Q = `others` are in front.

        The others attend only to one another, as at test time; a noisy query attends to them and its group.
        """
        ids = torch.nn.functional.pad(self.groups, (others, 0), value=_OTHERS)
        return ((ids[:, None, :] == ids[:, :, None]) | (ids[:, None, :] == _OTHERS))[:, None]


def noise_objects(
    targets: Sequence[Targets],
    generators: Sequence[torch.Generator],
    num_classes: int,
    *,
    queries: int,
    label_noise: float,
    box_noise: float,
) -> Noised | None:
    """Returns noisy copies of the objects of B images; None if there are no objects.

    The noise of an image is drawn from its own generator, so it does not depend on the batch.

    Args:
        targets: B, with normalised cxcywh boxes.
        generators: B, on the device of the targets.
        queries: approximate number of noisy copies of one kind per image: as many groups as fit, at least one.
        label_noise: half of this share of the copies get a random class.
        box_noise: maximum shift of sides, in half sizes of the box: less than this, or once to twice this.
    """
    if not any(len(image_targets.classes) for image_targets in targets):
        return None
    rows = [
        _noise_image(image_targets, generator, num_classes, queries, label_noise, box_noise)
        for image_targets, generator in zip(targets, generators, strict=True)
    ]
    parts = zip(zip(*rows, strict=True), (0, 0, -1, FILLER), strict=True)
    return Noised(*(pad_sequence(list(part), True, padding_value=fill) for part, fill in parts))


def _noise_image(
    targets: Targets, generator: torch.Generator, num_classes: int, queries: int, label_noise: float, box_noise: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns classes (N,), references (N, 4), objects (N,) and groups (N,) of one image."""
    num, on = len(targets.classes), generator.device
    copies = 2 * max(queries // max(num, 1), 1)
    slots = torch.arange(num * copies, device=on)
    objects, copy = slots % max(num, 1), slots // max(num, 1)
    is_far = copy % 2
    classes, boxes = targets.classes[objects], targets.boxes.float()[objects]
    redrawn = torch.rand(len(slots), generator=generator, device=on) < label_noise / 2
    drawn = torch.randint(num_classes, (len(slots),), generator=generator, device=on)
    classes = torch.where(redrawn, drawn, classes)
    length = torch.rand(len(slots), 4, generator=generator, device=on) + is_far[:, None]
    shift = length * (torch.randint(2, (len(slots), 4), generator=generator, device=on) * 2 - 1)
    corners = box_convert(boxes, "cxcywh", "xyxy") + shift * box_noise * boxes[:, 2:].repeat(1, 2) / 2
    references = inverse_sigmoid(box_convert(corners.clamp(0, 1), "xyxy", "cxcywh"))
    return classes, references, torch.where(is_far == 1, -1, objects), copy // 2
