"""Rules of inference: which boxes are detections, and on which views of an image; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le, MinLen

from weaksam.ops.choices import check_rules


@dataclass(frozen=True)
class DetectionFilter:
    """Which boxes of an image are detections.

    Attributes:
        score_threshold: detections with a score at or below this are dropped.
        nms_threshold: of two boxes of a class that overlap by more than this IoU, the box with the lower score is
            dropped; not applied to DETR-style detectors on a single view.
        max_detections: most detections of an image, the highest-scored.
    """

    score_threshold: Annotated[float, Ge(0), Le(1)] = 0.05
    nms_threshold: Annotated[float, Gt(0), Le(1)] = 0.5
    max_detections: Annotated[int, Ge(1)] = 100

    def __post_init__(self) -> None:
        check_rules(self)


@dataclass(frozen=True)
class InferenceRules(DetectionFilter):
    """Views, and which boxes of them are detections. The defaults are those of MIST.

    Attributes:
        scales: lengths of the shorter side of the views, pixels.
        max_side: maximum length of the longer side of a view, pixels.
        flip: whether to add the mirror image of each view.
    """

    score_threshold: Annotated[float, Ge(0), Le(1)] = 0.0
    nms_threshold: Annotated[float, Gt(0), Le(1)] = 0.3
    scales: Annotated[tuple[int, ...], MinLen(1)] = (800, 480, 576, 688, 864, 1000, 1200)
    max_side: Annotated[int, Ge(32)] = 2000
    flip: bool = True
