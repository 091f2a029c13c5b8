"""Mask2Former. Recipe and test settings: those published for VOC12."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weaksam.models.detectors.catalogue.kind import FROZEN_SAM_RECIPE, DetectorKind, DetectorSpec
from weaksam.models.detectors.rules import DetectionFilter, InferenceRules

if TYPE_CHECKING:
    from weaksam.models.detectors.base import Detector

_SMALL = {
    "dim": 64,
    "heads": 4,
    "encoder_layers": 2,
    "encoder_ffn": 128,
    "decoder_layers": 3,
    "decoder_ffn": 256,
    "queries": 40,
    "points": 1024,
    "detections": 40,
}


def _build(spec: DetectorSpec, rules: DetectionFilter) -> Detector:
    from weaksam.models.backbones.catalogue import make_pyramid
    from weaksam.models.detectors.mask2former import Mask2Former, Mask2FormerSize

    pyramid = make_pyramid(spec.backbone, frozen_stages=spec.frozen_stages, finest=4)
    size = Mask2FormerSize(**(_SMALL if spec.backbone == "frozen_sam" else {}))
    return Mask2Former(pyramid, spec.num_classes, size, masks_per_image=spec.boxes_per_image)


KIND = DetectorKind(
    "mask2former",
    _build,
    recipe={
        "square": 1024,
        "steps": 33_069,  # 50 rounds of 10,582 images
        "milestones": [29_395, 31_844],
        "warmup": 0,
        "optimizer": "adamw",
        "lr": 1e-4,
        "backbone_lr": 0.1,
        "weight_decay": 0.05,
        "clip": 0.01,
        "frozen_stages": 0,
        "precision": "bf16",
    },
    recipes_by_backbone={
        "frozen_sam": FROZEN_SAM_RECIPE
        | {
            "square": None,
            "steps": 800,
            "lr": 2e-3,
            "weight_decay": 0.05,
            "warmup": 40,
            "clip": 1.0,
            "precision": "fp32",
        }
    },
    inference=InferenceRules(score_threshold=0.0, nms_threshold=0.6, scales=(800,), max_side=1333, flip=False),
    learns_masks=True,
)
