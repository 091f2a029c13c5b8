"""RT-DETRv2. Recipe: that of DINO with a higher learning rate; test settings: the published side of 640 pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weaksam.models.detectors.catalogue.dino import FROZEN_SAM, RECIPE
from weaksam.models.detectors.catalogue.kind import DetectorKind, DetectorSpec
from weaksam.models.detectors.rules import DetectionFilter, InferenceRules

if TYPE_CHECKING:
    from weaksam.models.detectors.base import Detector

_SMALL = {"image": 256, "dim": 128, "decoder_layers": 3, "queries": 100, "num_denoising": 50, "detections": 100}


def _build(spec: DetectorSpec, rules: DetectionFilter) -> Detector:
    from weaksam.models.backbones.catalogue import make_pyramid
    from weaksam.models.detectors.rt_detr_v2 import RtDetrV2, RtDetrV2Size

    pyramid = make_pyramid(spec.backbone, frozen_stages=spec.frozen_stages, finest=8)
    size = RtDetrV2Size(**(_SMALL if spec.backbone == "frozen_sam" else {}))
    return RtDetrV2(pyramid, spec.num_classes, size, boxes_per_image=spec.boxes_per_image)


KIND = DetectorKind(
    "rt_detr_v2",
    _build,
    recipe=RECIPE | {"lr": 1e-4},
    recipes_by_backbone={"frozen_sam": FROZEN_SAM},
    inference=InferenceRules(
        score_threshold=0.0, nms_threshold=0.6, max_detections=300, scales=(640,), max_side=1333, flip=False
    ),
)
