"""DINO. Recipe and test settings: those published for VOC07."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weaksam.models.detectors.catalogue.kind import FROZEN_SAM_RECIPE, DetectorKind, DetectorSpec
from weaksam.models.detectors.rules import DetectionFilter, InferenceRules

if TYPE_CHECKING:
    from weaksam.models.detectors.base import Detector

_SMALL = {
    "dim": 128,
    "heads": 4,
    "points": 4,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "ffn": 256,
    "queries": 100,
    "num_denoising": 50,
    "detections": 100,
    "levels": 2,
}
RECIPE = {
    "scales": list(range(480, 801, 32)),
    "max_side": 1333,
    "crop_chance": 0.5,
    "steps": 13_160,  # 14 rounds of three times 5,011 images
    "milestones": [7_520, 9_400, 11_280],
    "warmup": 0,
    "optimizer": "adamw",
    "lr": 9e-5,
    "backbone_lr": 0.1,
    "clip": 0.1,
}
FROZEN_SAM = FROZEN_SAM_RECIPE | {
    "crop_chance": 0.0,
    "steps": 1000,
    "lr": 2e-3,
    "weight_decay": 0.05,
    "warmup": 40,
    "clip": 1.0,
}


def _build(spec: DetectorSpec, rules: DetectionFilter) -> Detector:
    from weaksam.models.backbones.catalogue import make_pyramid
    from weaksam.models.detectors.dino import Dino, DinoSize

    pyramid = make_pyramid(spec.backbone, frozen_stages=spec.frozen_stages, finest=16)
    size = DinoSize(**(_SMALL if spec.backbone == "frozen_sam" else {}))
    return Dino(pyramid, spec.num_classes, size, boxes_per_image=spec.boxes_per_image, drop=spec.drop)


KIND = DetectorKind(
    "dino",
    _build,
    recipe=RECIPE,
    recipes_by_backbone={"frozen_sam": FROZEN_SAM},
    inference=InferenceRules(
        score_threshold=0.0, nms_threshold=0.6, max_detections=300, scales=(800,), max_side=1333, flip=False
    ),
    has_roi_drop=True,
)
