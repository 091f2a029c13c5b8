"""Mask R-CNN: Faster R-CNN with a small mask of each class in every RoI that holds an object.

The parts, their defaults and the keys of a checkpoint are torchvision's (`maskrcnn_resnet50_fpn`); the losses are our
own, as in `faster_rcnn`. Target masks are bitmaps, so they may have holes and several pieces.
Source: He et al. 2017, arXiv 1703.06870; RoI drop: WeakSAM, arXiv 2402.14812, which has none for masks.
Axis legend: B images, R sampled RoIs of all of them, F those of them with an object, G objects of an image, C classes,
H W pixels, m cells of a side of a RoI's mask.
Boxes are xyxy, absolute pixels, float32, right and bottom exclusive. Class 0 is background inside, not outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes

from weaksam.models.backbones.pyramids import Pyramid
from weaksam.models.detectors.base import Detections, Targets
from weaksam.models.detectors.catalogue.kind import BoxLoss
from weaksam.models.detectors.faster_rcnn import PUBLISHED, FasterRcnn, FasterRcnnSize
from weaksam.models.detectors.rcnn_parts import RoiAlign
from weaksam.models.detectors.rules import DetectionFilter
from weaksam.ops.roi_drop import NO_DROP, RoiDropRules

_THRESHOLD = 0.5  # a pixel is the object's from this probability on


@dataclass(frozen=True)
class MaskRcnnSize(FasterRcnnSize):
    """Sizes of the network. The defaults are the published values.

    Attributes:
        mask_dim: channels of the mask head.
        mask_layers: layers of the mask head.
        mask_pooled: side of a pooled RoI; its mask has twice as many cells.
    """

    mask_dim: int = 256
    mask_layers: int = 4
    mask_pooled: int = 14


class MaskRcnn(FasterRcnn):
    """Detects boxes with classes and masks.

    Args:
        pyramid: the backbone.
        num_classes: C.
        size: sizes of the layers above the backbone.
        box_loss: see `FasterRcnn`.
        drop: RoI drop of the second stage. The mask loss of a RoI is dropped, too, when its class or box loss is
            dropped, since its label is assumed to be wrong.
        detection_filter: which boxes and masks `detect` returns.
    """

    learns_masks = True

    def __init__(
        self,
        pyramid: Pyramid,
        num_classes: int,
        size: MaskRcnnSize = MaskRcnnSize(),
        *,
        box_loss: BoxLoss = "l1",
        drop: RoiDropRules = NO_DROP,
        detection_filter: DetectionFilter = PUBLISHED,
    ) -> None:
        super().__init__(pyramid, num_classes, size, box_loss=box_loss, drop=drop, detection_filter=detection_filter)
        dims = [size.mask_dim] * size.mask_layers
        self.roi_heads.mask_roi_pool = RoiAlign(pyramid.strides, size.mask_pooled)
        self.roi_heads.mask_head = MaskRCNNHeads(size.dim, dims, dilation=1)
        self.roi_heads.mask_predictor = MaskRCNNPredictor(size.mask_dim, size.mask_dim, num_classes + 1)

    def _losses(
        self, images: Sequence[Tensor], targets: Sequence[Targets], step: int, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """See `Detector.losses`.

        Returns:
            losses of `FasterRcnn` and `loss_mask`; with RoI drop also `dropped_mask`, the number of dropped RoIs.
        """
        self._start_step(step, generators)
        listed = [{"boxes": t.boxes, "labels": t.classes + 1, "masks": t.known_masks()} for t in targets]
        batch, maps = self._backbone_maps(images)
        proposals, first = self.rpn(batch, maps, listed)
        heads: Any = self.roi_heads
        sizes = batch.image_sizes
        rois, places, labels, regression_targets = heads.select_training_samples(proposals, listed)
        by_roi = heads.box_losses(maps, rois, labels, regression_targets, sizes)

        rois, places = ([v[c > 0] for v, c in zip(values, labels, strict=True)] for values in (rois, places))
        masks: Tensor = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, rois, sizes)))
        cells = masks.shape[-1]
        parts = [
            project_masks_on_boxes(image_targets["masks"], boxes, matched, cells)
            for image_targets, boxes, matched in zip(listed, rois, places, strict=True)
        ]
        drops = (by_roi.drop_cls | by_roi.drop_reg)[torch.cat(labels) > 0]  # background has no mask
        loss = mask_loss(masks, parts, [image_labels[image_labels > 0] for image_labels in labels], drops)
        drop_counts = {} if heads.drop.gate == "off" else {"dropped_mask": drops.sum()}
        return {**first, **by_roi.sums(heads.drop), "loss_mask": loss, **drop_counts}

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor], mask_sizes: Sequence[tuple[int, int]] | None = None) -> list[Detections]:
        batch, maps = self._backbone_maps(images)
        proposals, _ = self.rpn(batch, maps)
        results, _ = self.roi_heads(maps, proposals, batch.image_sizes)
        return [
            Detections(
                result["boxes"],
                result["labels"] - 1,
                result["scores"],
                paste_masks(result["masks"], result["boxes"], hw, drawn_hw),
            )
            for result, hw, drawn_hw in zip(results, batch.image_sizes, mask_sizes or batch.image_sizes, strict=True)
        ]


def mask_loss(logits: Tensor, target_masks: Sequence[Tensor], labels: Sequence[Tensor], is_dropped: Tensor) -> Tensor:
    """Returns the sum over images of the mean over an image's RoIs with an object; the divisor counts dropped RoIs.

    Args:
        logits: (F, 1 + C, m, m), per class.
        target_masks: B of (F of the image, m, m) float in 0..1.
        labels: B of (F of the image,) int64, 1..C.
        is_dropped: (F,) bool.
    """
    shares = torch.cat(
        [
            image_labels.new_full(image_labels.shape, 1 / max(len(image_labels), 1), dtype=torch.float32)
            for image_labels in labels
        ]
    )
    classes = torch.cat(list(labels))
    own = logits[torch.arange(len(classes), device=classes.device), classes].float()
    by_roi = F.binary_cross_entropy_with_logits(own, torch.cat(list(target_masks)), reduction="none").flatten(1).mean(1)
    return (by_roi * shares).masked_fill(is_dropped, 0).sum()


def paste_masks(masks: Tensor, boxes: Tensor, hw: tuple[int, int], drawn_hw: tuple[int, int]) -> Tensor:
    """Pastes probabilities inside boxes to (K, *drawn_hw) bool; one by one, since float masks need much memory.

    Args:
        masks: (K, 1, m, m).
        boxes: (K, 4) on an image of size `hw`.
        hw: height and width.
        drawn_hw: height and width of the masks; boxes are scaled to it.
    """
    pasted = torch.zeros(len(boxes), *drawn_hw, dtype=torch.bool, device=boxes.device)
    boxes = boxes * boxes.new_tensor([drawn_hw[1] / hw[1], drawn_hw[0] / hw[0]] * 2)
    for i in range(len(boxes)):
        pasted[i] = paste_masks_in_image(masks[i : i + 1], boxes[i : i + 1], drawn_hw)[0, 0] >= _THRESHOLD
    return pasted
