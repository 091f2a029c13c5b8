"""Mask R-CNN for few small images and no GPU: `SmallRcnn` with a mask of each detection.

The mask head, too, uses the frozen SAM's maps of a region's crop: from coarse to fine, as in a feature pyramid, since
outlines need fine maps and interiors need coarse maps.
Source: He et al. 2017, arXiv 1703.06870; Lin et al. 2017, arXiv 1612.03144.
Axis legend: N regions and G objects of an image, F regions with an object for the mask loss, K detections of an
image, m cells of a side of a mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from weaksam.models.backbones.pyramids import Pyramid
from weaksam.models.detectors.base import Detections, Targets
from weaksam.models.detectors.catalogue.kind import BoxLoss
from weaksam.models.detectors.faster_rcnn import PUBLISHED
from weaksam.models.detectors.mask_rcnn import mask_loss, paste_masks
from weaksam.models.detectors.rules import DetectionFilter
from weaksam.models.detectors.small_rcnn import SmallRcnn, SmallRcnnSize
from weaksam.ops.boxes import box_iou, enlarge_boxes
from weaksam.ops.roi_drop import NO_DROP, RoiDropRules

_OBJECT_IOU = 0.5  # the second stage's threshold between objects and background


@dataclass(frozen=True)
class SmallMaskRcnnSize(SmallRcnnSize):
    """Sizes of the network.

    Attributes:
        mask_dim: channels of the mask head.
        mask_samples: maximum F of an image; more regions of the same objects take time and teach little.
    """

    mask_dim: int = 64
    mask_samples: int = 8


class SmallMaskRcnn(SmallRcnn):
    """Detects boxes with classes and masks.

    Args:
        pyramid, num_classes, size, box_loss, drop, detection_filter: see `FasterRcnn`; the mask loss of a region is
            dropped when its class or box loss is dropped.
    """

    learns_masks = True

    def __init__(
        self,
        pyramid: Pyramid,
        num_classes: int,
        size: SmallMaskRcnnSize = SmallMaskRcnnSize(),
        *,
        box_loss: BoxLoss = "l1",
        drop: RoiDropRules = NO_DROP,
        detection_filter: DetectionFilter = PUBLISHED,
    ) -> None:
        super().__init__(pyramid, num_classes, size, box_loss=box_loss, drop=drop, detection_filter=detection_filter)
        self.mask_samples = size.mask_samples
        self.mask_head = _MaskHead(self.cut_outs.channels, size.mask_dim, num_classes + 1)

    def _result_keys(self) -> tuple[str, ...]:
        return *super()._result_keys(), "loss_mask", *(() if self.roi_heads.drop.gate == "off" else ("dropped_mask",))

    def _second_stage(
        self,
        cached: list[list[Tensor]],
        targets: Sequence[Targets],
        step: int,
        generators: Sequence[torch.Generator],
    ) -> dict[str, Tensor]:
        """Returns the losses of `SmallRcnn` and `loss_mask`."""
        heads: Any = self.roi_heads
        samples = self._sample(cached, targets)
        by_roi = self._roi_losses(cached, samples, step, generators)
        chosen = [row[2] for row in cached]
        # one by one: autocast refuses to join tensors of half precision where its own type is bf16
        maps = [torch.cat([part.float() for part in level]) for level in zip(*(row[3:] for row in cached), strict=True)]
        logits = self.mask_head(maps)
        parts = [
            project_masks_on_boxes(
                image_targets.known_masks(),
                enlarge_boxes(boxes, self.cut_outs.margin)[rows],
                places[rows],
                logits.shape[-1],
            )
            for image_targets, boxes, places, rows in zip(targets, samples.boxes, samples.places, chosen, strict=True)
        ]
        drops = (by_roi.drop_cls | by_roi.drop_reg).split([len(image_labels) for image_labels in samples.labels])
        labels, is_dropped = (
            [values[rows] for values, rows in zip(many, chosen, strict=True)] for many in (samples.labels, drops)
        )
        loss = mask_loss(logits, parts, labels, torch.cat(is_dropped))
        drop_counts = {} if heads.drop.gate == "off" else {"dropped_mask": torch.cat(drops).sum()}
        return by_roi.sums(heads.drop) | {"loss_mask": loss} | drop_counts

    def _keep(self, every: Tensor, boxes: Tensor, maps: list[Tensor]) -> list[Tensor]:
        """Returns `SmallRcnn`'s maps, the rows of `every` for the mask loss (F,) and their maps in half precision."""
        holds = (box_iou(every, boxes) >= _OBJECT_IOU).any(1).nonzero()[:, 0]
        chosen = holds[:: max(1, math.ceil(len(holds) / self.mask_samples))]
        return [maps[-1], chosen, *(level[chosen].half() for level in maps)]

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor], mask_sizes: Sequence[tuple[int, int]] | None = None) -> list[Detections]:
        drawn = mask_sizes or [(int(image.shape[1]), int(image.shape[2])) for image in images]
        return [self._detect_masks(image, hw) for image, hw in zip(images, drawn, strict=True)]

    def _detect_masks(self, image: Tensor, drawn_hw: tuple[int, int]) -> Detections:
        (detections,) = super().detect([image])
        logits = self.mask_head(self.cut_outs.pyramid([detections.boxes]))
        chances = logits[torch.arange(len(logits), device=logits.device), detections.classes + 1].sigmoid()[:, None]
        where = enlarge_boxes(detections.boxes, self.cut_outs.margin)
        return detections._replace(masks=paste_masks(chances, where, (image.shape[1], image.shape[2]), drawn_hw))


class _MaskHead(nn.Module):
    """Maps of a region, fine to coarse, to logits (F, 1 + C, m, m); m is twice the side of the finest map."""

    def __init__(self, channels: Sequence[int], dim: int, num_classes: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(depth, dim, 1) for depth in channels)
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in channels)
        self.up = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.logits = nn.Conv2d(dim, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = self.laterals[-1](maps[-1])
        for level in reversed(range(len(maps))):
            x = F.relu(self.convs[level](x))
            if level:
                finer = maps[level - 1]
                x = F.interpolate(x, finer.shape[2:], mode="nearest") + self.laterals[level - 1](finer)
        return self.logits(F.relu(self.up(x)))
