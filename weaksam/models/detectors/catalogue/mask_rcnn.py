"""Mask R-CNN. Recipe and test settings: those published for VOC12."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weaksam.models.detectors.catalogue.faster_rcnn import RECIPES_BY_BACKBONE, size_for
from weaksam.models.detectors.catalogue.kind import DetectorKind, DetectorSpec
from weaksam.models.detectors.rules import DetectionFilter, InferenceRules

if TYPE_CHECKING:
    from weaksam.models.detectors.base import Detector


def _build(spec: DetectorSpec, rules: DetectionFilter) -> Detector:
    from weaksam.models.backbones.catalogue import make_pyramid
    from weaksam.models.detectors.mask_rcnn import MaskRcnn, MaskRcnnSize
    from weaksam.models.detectors.small_mask_rcnn import SmallMaskRcnn, SmallMaskRcnnSize

    pyramid = make_pyramid(spec.backbone, frozen_stages=spec.frozen_stages, finest=8)
    if spec.backbone == "frozen_sam":
        size = SmallMaskRcnnSize(first_steps=spec.first_steps)
        return SmallMaskRcnn(
            pyramid, spec.num_classes, size, box_loss=spec.box_loss, drop=spec.drop, detection_filter=rules
        )
    masks: dict[str, Any] = {"mask_dim": 64, "mask_layers": 2} if spec.backbone == "efficientnet_lite0" else {}
    size = MaskRcnnSize(**size_for(spec.backbone, pyramid.strides) | masks)
    return MaskRcnn(pyramid, spec.num_classes, size, box_loss=spec.box_loss, drop=spec.drop, detection_filter=rules)


KIND = DetectorKind(
    "mask_rcnn",
    _build,
    backbones=None,
    recipe={"scales": list(range(640, 801, 32)), "max_side": 1333},
    recipes_by_backbone=RECIPES_BY_BACKBONE,
    inference=InferenceRules(score_threshold=0.05, nms_threshold=0.5, scales=(800,), max_side=1333, flip=False),
    learns_masks=True,
    has_roi_drop=True,
    is_two_stage=True,
    starts_from=("faster_rcnn",),
)
