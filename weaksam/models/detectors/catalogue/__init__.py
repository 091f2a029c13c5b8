"""The detectors that `train_detector` trains: each is a file of this folder, and a name in `KINDS`."""

from __future__ import annotations

from weaksam.models.detectors.catalogue import dino, faster_rcnn, mask2former, mask_rcnn, rt_detr_v2
from weaksam.models.detectors.catalogue.kind import DetectorKind

KINDS: tuple[DetectorKind, ...] = (
    faster_rcnn.KIND,
    dino.KIND,
    rt_detr_v2.KIND,
    mask_rcnn.KIND,
    mask2former.KIND,
)


def kind_of(model: str) -> DetectorKind:
    """The detector of a name.

    Raises:
        ValueError: there is none of that name.
    """
    for kind in KINDS:
        if kind.name == model:
            return kind
    raise ValueError(f"model must be one of {', '.join(repr(kind.name) for kind in KINDS)}, got {model!r}")
