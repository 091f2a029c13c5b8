"""The detectors of `train_detector`: each is a file of this folder, and an entry of `KINDS`."""

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
    """Returns the detector of a name.

    Raises:
        ValueError: no detector has that name.
    """
    for kind in KINDS:
        if kind.name == model:
            return kind
    raise ValueError(f"model must be one of {', '.join(repr(kind.name) for kind in KINDS)}, got {model!r}")
