"""Faster R-CNN. Recipe and test settings: those published for VOC07, which are the defaults of `train_detector`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weaksam.models.detectors.catalogue.kind import FROZEN_SAM_RECIPE, DetectorKind, DetectorSpec
from weaksam.models.detectors.rules import DetectionFilter, InferenceRules

if TYPE_CHECKING:
    from weaksam.models.detectors.base import Detector

# For efficientnet_lite0. Chosen by measurement on photographs, for two CPU cores.
LITE0_SIZE: dict[str, Any] = {
    "dim": 96,
    "hidden": 512,
    "anchors": (32, 72, 168, 384),
    "roi_samples": 64,
    "proposals": 300,
    "pre_nms": (600, 300),
}
# For few photographs on CPUs: images are cropped or padded to squares of one size, which is fastest.
_LITE0_RECIPE = {
    "frozen_stages": 3,
    "square": 448,
    "jitter": [0.7, 1.5],
    "steps": 300,
    "batch_size": 4,
    "optimizer": "adamw",
    "lr": 6e-4,
    "backbone_lr": 0.17,
    "weight_decay": 0.05,
    "warmup": 30,
    "milestones": None,
    "clip": 5.0,
    "ema": 0.98,
}
_FROZEN_SAM_RECIPE = FROZEN_SAM_RECIPE | {
    "steps": 700,
    "lr": 4e-3,
    "backbone_lr": 0.4,
    "weight_decay": 0.1,
    "warmup": 20,
    "clip": 5.0,
}
RECIPES_BY_BACKBONE = {"efficientnet_lite0": _LITE0_RECIPE, "frozen_sam": _FROZEN_SAM_RECIPE}


def size_for(backbone: str, strides: Sequence[int]) -> dict[str, Any]:
    """Returns the sizes of the network that differ from those of ResNet-50: anchors are 8 cells of each level."""
    if backbone == "efficientnet_lite0":
        return LITE0_SIZE
    return {"anchors": (*(8 * stride for stride in strides), 16 * strides[-1])}


def _build(spec: DetectorSpec, rules: DetectionFilter) -> Detector:
    from weaksam.models.backbones.catalogue import make_pyramid
    from weaksam.models.detectors.faster_rcnn import FasterRcnn, FasterRcnnSize
    from weaksam.models.detectors.small_rcnn import SmallRcnn, SmallRcnnSize

    pyramid = make_pyramid(spec.backbone, frozen_stages=spec.frozen_stages, finest=8)
    if spec.backbone == "frozen_sam":
        size = SmallRcnnSize(first_steps=spec.first_steps)
        return SmallRcnn(
            pyramid, spec.num_classes, size, box_loss=spec.box_loss, drop=spec.drop, detection_filter=rules
        )
    size = FasterRcnnSize(**size_for(spec.backbone, pyramid.strides))
    return FasterRcnn(pyramid, spec.num_classes, size, box_loss=spec.box_loss, drop=spec.drop, detection_filter=rules)


KIND = DetectorKind(
    "faster_rcnn",
    _build,
    backbones=None,
    recipes_by_backbone=RECIPES_BY_BACKBONE,
    inference=InferenceRules(
        score_threshold=0.05, nms_threshold=0.5, scales=(480, 576, 688, 864, 1000, 1200), max_side=2000, flip=True
    ),
    has_roi_drop=True,
    is_two_stage=True,
)
