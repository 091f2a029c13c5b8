"""The detectors of `train_detector`: each is a file of this folder, and a line of `_FILES`."""

from __future__ import annotations

from importlib import import_module

from weaksam.models.detectors.catalogue.kind import DetectorKind

# The files of this folder that hold a detector, each with its `KIND`.
_FILES = (
    "faster_rcnn",
    "dino",
    "rt_detr_v2",
    "mask_rcnn",
    "mask2former",
)
KINDS: tuple[DetectorKind, ...] = tuple(import_module(f"{__name__}.{name}").KIND for name in _FILES)


def kind_of(model: str) -> DetectorKind:
    """Returns the detector of a name.

    Raises:
        ValueError: no detector has that name.
    """
    for kind in KINDS:
        if kind.name == model:
            return kind
    raise ValueError(f"model must be one of {', '.join(repr(kind.name) for kind in KINDS)}, got {model!r}")
