"""Rules of inference: which boxes are detections, and on which views of an image; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from weaksam.ops.checks import check_whole


@dataclass(frozen=True)
class DetectionFilter:
    """Which boxes of an image are detections.

    Attributes:
        score_threshold: detections score more than this.
        nms_threshold: of two boxes of a class that overlap by more than this IoU, the lower-scored is dropped.
        max_detections: most detections of an image, the highest-scored.
    """

    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100

    def __post_init__(self) -> None:
        check_whole("max_detections", self.max_detections, least=1, or_none=False)


@dataclass(frozen=True)
class InferenceRules(DetectionFilter):
    """Views, and which boxes of them are detections. The defaults are those of MIST.

    Attributes:
        scales: lengths of the shorter side of the views, pixels.
        max_side: the longer side is at most this, pixels.
        flip: whether every view is also mirrored.
    """

    score_threshold: float = 0.0
    nms_threshold: float = 0.3
    scales: tuple[int, ...] = (800, 480, 576, 688, 864, 1000, 1200)
    max_side: int = 2000
    flip: bool = True
