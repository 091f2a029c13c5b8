"""Faster R-CNN with a feature pyramid, and RoI drop in its second stage.

The parts, their defaults and the keys of a checkpoint are torchvision's (`fasterrcnn_resnet50_fpn`); the losses are our
own: RoI drop needs them region by region, and every image has the same weight in any batch.
Source: Ren et al. 2015, arXiv 1506.01497; Lin et al. 2017, arXiv 1612.03144; RoI drop: WeakSAM, arXiv 2402.14812.
Axis legend: B images, R sampled RoIs of all of them, A sampled anchors, C classes, H W pixels.
Boxes are xyxy, absolute pixels, float32, right and bottom exclusive. Class 0 is background inside, not outside.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from weaksam.models.backbones.pyramids import Pyramid
from weaksam.models.detectors.base import Detections, Detector, Normaliser, Targets
from weaksam.models.detectors.catalogue.kind import BoxLoss
from weaksam.models.detectors.rcnn_parts import BoxPredictor, ImageSampler, RoiAlign, RpnHead
from weaksam.models.detectors.rules import DetectionFilter
from weaksam.ops.roi_drop import NO_DROP, RoiDropRules, select_drops

_BETA = {"l1": 0.0, "smooth_l1": 1 / 9}  # where smooth L1 changes from quadratic to linear


@dataclass(frozen=True)
class FasterRcnnSize:
    """Sizes of the network. The defaults are detectron2's R50-FPN, as published, except the losses.

    Attributes:
        dim: channels of the feature pyramid.
        hidden: width of the two layers of the box head.
        anchors: side of the anchors of each level, pixels; one more level than the backbone has.
        rpn_samples, roi_samples: anchors and RoIs of an image that are sampled for the losses.
        proposals: RoIs of the first stage per image.
        pre_nms: candidates of a level before NMS, in training and at test time.
        nms: IoU threshold of the first stage's NMS within a level.
        pooled: side of a pooled RoI.
    """

    dim: int = 256
    hidden: int = 1024
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)
    rpn_samples: int = 256
    roi_samples: int = 512
    proposals: int = 1000
    pre_nms: tuple[int, int] = (2000, 1000)
    nms: float = 0.7
    pooled: int = 7


PUBLISHED = DetectionFilter()


class FasterRcnn(Detector):
    """Detects boxes with classes.

    Args:
        pyramid: the backbone.
        num_classes: C.
        size: sizes of the layers above the backbone.
        box_loss: box loss of both stages: `l1` as published, which RoI drop's threshold assumes; `smooth_l1` is
            torchvision's.
        drop: RoI drop of the second stage.
        detection_filter: which boxes `detect` returns.
    """

    def __init__(
        self,
        pyramid: Pyramid,
        num_classes: int,
        size: FasterRcnnSize = FasterRcnnSize(),
        *,
        box_loss: BoxLoss = "l1",
        drop: RoiDropRules = NO_DROP,
        detection_filter: DetectionFilter = PUBLISHED,
    ) -> None:
        super().__init__()
        if box_loss not in _BETA:
            raise ValueError(f"box_loss must be one of {', '.join(_BETA)}, got {box_loss!r}")
        if len(size.anchors) != len(pyramid.channels) + 1:
            raise ValueError(f"anchors must be {len(pyramid.channels) + 1} sides, a level each, got {size.anchors}")
        self.num_classes = num_classes
        self.normaliser = Normaliser(pyramid)
        self.backbone = _BackboneWithFpn(pyramid, size.dim)
        ratios = ((0.5, 1.0, 2.0),) * len(size.anchors)
        generator = AnchorGenerator(tuple((side,) for side in size.anchors), ratios)
        self.rpn = _Rpn(
            generator,
            RpnHead(size.dim, generator.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=size.rpn_samples,
            positive_fraction=0.5,
            pre_nms_top_n=dict(zip(("training", "testing"), size.pre_nms, strict=True)),
            post_nms_top_n={"training": size.proposals, "testing": size.proposals},
            nms_thresh=size.nms,
        )
        self.roi_heads = _RoiHeads(
            RoiAlign(pyramid.strides, size.pooled),
            TwoMLPHead(size.dim * size.pooled**2, size.hidden),
            BoxPredictor(size.hidden, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=size.roi_samples,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=detection_filter.score_threshold,
            nms_thresh=detection_filter.nms_threshold,
            detections_per_img=detection_filter.max_detections,
        )
        self.rpn.beta = self.roi_heads.beta = _BETA[box_loss]
        self.roi_heads.drop = drop
        self.samplers = [ImageSampler.like(part.fg_bg_sampler) for part in (self.rpn, self.roi_heads)]
        self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler = self.samplers

    def _start_step(self, step: int, generators: Sequence[torch.Generator]) -> None:
        """Sets attributes that torchvision's parts do not take as arguments."""
        self.roi_heads.step = step
        for sampler in self.samplers:
            sampler.generators = generators

    def _losses(
        self, images: Sequence[Tensor], targets: Sequence[Targets], step: int, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        self._start_step(step, generators)
        listed = [{"boxes": image_targets.boxes, "labels": image_targets.classes + 1} for image_targets in targets]
        batch, maps = self._backbone_maps(images)
        proposals, first = self.rpn(batch, maps, listed)
        _, second = self.roi_heads(maps, proposals, batch.image_sizes, listed)
        return {**first, **second}

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor], mask_sizes: Sequence[tuple[int, int]] | None = None) -> list[Detections]:
        batch, maps = self._backbone_maps(images)
        proposals, _ = self.rpn(batch, maps)
        results, _ = self.roi_heads(maps, proposals, batch.image_sizes)
        return [Detections(result["boxes"], result["labels"] - 1, result["scores"]) for result in results]

    def _backbone_maps(self, images: Sequence[Tensor]) -> tuple[ImageList, dict[str, Tensor]]:
        batch = self.normaliser(images)
        return ImageList(batch.pixels, batch.sizes), self.backbone(batch.pixels)


class _BackboneWithFpn(nn.Module):
    """Maps by level, with torchvision's keys; the last map subsamples the previous map, only for the first stage."""

    def __init__(self, pyramid: Pyramid, dim: int) -> None:
        super().__init__()
        self.body = pyramid
        self.fpn = FeaturePyramidNetwork(list(pyramid.channels), dim, LastLevelMaxPool())

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(level), maps) for level, maps in enumerate(self.body(pixels))))


class _Rpn(RegionProposalNetwork):
    beta = 0.0

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> Any:
        """Returns sums over images of an image's loss, divided by the image's number of samples."""
        positive, negative = (torch.stack(masks).bool() for masks in self.fg_bg_sampler(labels))
        chosen = positive | negative
        shares = (chosen / chosen.sum(1, keepdim=True).clamp(min=1)).flatten()
        chosen, positive = chosen.flatten(), positive.flatten()
        targets, flat_labels = torch.cat(regression_targets), torch.cat(labels)
        by_anchor = F.binary_cross_entropy_with_logits(
            objectness.flatten()[chosen], flat_labels[chosen], reduction="none"
        )
        moved = _box_losses(pred_bbox_deltas[positive], targets[positive], self.beta)
        return (by_anchor * shares[chosen]).sum(), (moved * shares[positive]).sum()


class _RoiHeads(RoIHeads):
    beta = 0.0
    drop = NO_DROP
    step = 0

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Same as torchvision's, with our losses."""
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        rois, _, labels, regression_targets = self.select_training_samples(proposals, targets)
        return [], self.box_losses(features, rois, labels, regression_targets, image_shapes).sums(self.drop)

    def box_losses(
        self,
        features: dict[str, Tensor],
        rois: list[Tensor],
        labels: list[Tensor],
        regression_targets: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> RoiLosses:
        """Returns the losses of sampled RoIs."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, rois, image_shapes)))
        return roi_losses(logits, deltas, labels, regression_targets, self.beta, self.drop, self.step)


class RoiLosses(NamedTuple):
    """Losses of each sampled RoI, and which of them are dropped.

    Attributes:
        cls, reg: (R,) cross-entropy, and smooth L1 summed over the four deltas, 0 of background.
        drop_cls, drop_reg: (R,) bool.
        shares: (R,) weight of each RoI: one over the number of RoIs of its image.
    """

    cls: Tensor
    reg: Tensor
    drop_cls: Tensor
    drop_reg: Tensor
    shares: Tensor

    def sums(self, drop: RoiDropRules) -> dict[str, Tensor]:
        """Returns sums over images; dropped losses are 0, the divisor still counts their RoIs.

        Returns:
            `loss_classifier`, `loss_box_reg`; with RoI drop `dropped_cls`, `dropped_reg`, numbers of dropped losses.
        """
        losses = {
            "loss_classifier": (self.cls * self.shares).masked_fill(self.drop_cls, 0).sum(),
            "loss_box_reg": (self.reg * self.shares).masked_fill(self.drop_reg, 0).sum(),
        }
        drop_counts = {"dropped_cls": self.drop_cls.sum(), "dropped_reg": self.drop_reg.sum()}
        return losses | (drop_counts if drop.gate != "off" else {})


def roi_losses(
    logits: Tensor,
    deltas: Tensor,
    labels: Sequence[Tensor],
    regression_targets: Sequence[Tensor],
    beta: float,
    drop: RoiDropRules,
    step: int,
) -> RoiLosses:
    """Returns the losses of the second stage.

    Args:
        logits: (R, 1 + C), background first.
        deltas: (R, 4 + 4 C), per class.
        labels: B of (R of the image,) int64, 0 = background.
        regression_targets: B of (R of the image, 4).
        beta: of smooth L1; 0 = L1.
        drop: RoI drop.
        step: of the training.
    """
    shares = torch.cat(
        [
            image_labels.new_full(image_labels.shape, 1 / max(len(image_labels), 1), dtype=torch.float32)
            for image_labels in labels
        ]
    )
    classes, flat_targets = torch.cat(list(labels)), torch.cat(list(regression_targets))
    own = deltas.view(len(deltas), -1, 4)[torch.arange(len(classes), device=classes.device), classes]
    cls = F.cross_entropy(logits.float(), classes, reduction="none")
    reg = torch.where(classes > 0, _box_losses(own, flat_targets, beta), 0.0)
    return RoiLosses(cls, reg, *select_drops(cls.detach(), reg.detach(), classes > 0, drop, step), shares)


def _box_losses(deltas: Tensor, targets: Tensor, beta: float) -> Tensor:
    """Returns (N,) smooth L1 of each box, summed over its four deltas."""
    return F.smooth_l1_loss(deltas.float(), targets, beta=beta, reduction="none").sum(1)
