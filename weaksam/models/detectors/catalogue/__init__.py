"""The detectors of `train_detector`: each is a file of this folder, and a line of `_FILES`."""

from __future__ import annotations

from weaksam.core.catalogues import member, members
from weaksam.models.detectors.catalogue.kind import DetectorKind

# The files of this folder that hold a detector, each with its `KIND`.
_FILES = (
    "faster_rcnn",
    "dino",
    "rt_detr_v2",
    "mask_rcnn",
    "mask2former",
)
KINDS: tuple[DetectorKind, ...] = members(__name__, _FILES, "KIND")


def kind_of(model: str) -> DetectorKind:
    """Returns the detector of a name.

    Raises:
        ValueError: no detector has that name.
    """
    return member(KINDS, model, setting="model")
