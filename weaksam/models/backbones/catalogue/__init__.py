"""The backbones of trainings: each is a file of this folder, and a line of `_FILES`.

A detector of OICR or MIST pools RoIs from the maps of one trained backbone, or takes crops through frozen ones, whose
names are joined by +.
"""

from __future__ import annotations

from importlib import import_module
from itertools import combinations
from typing import TYPE_CHECKING

from weaksam.models.backbones.catalogue.kind import BackboneKind

if TYPE_CHECKING:
    from weaksam.models.backbones.pyramids import Pyramid

# The files of this folder that hold a backbone, each with its `KIND`.
_FILES = (
    "vgg16",
    "resnet50",
    "frozen_sam",
    "efficientnet_lite0",
)
BACKBONES: tuple[BackboneKind, ...] = tuple(import_module(f"{__name__}.{name}").KIND for name in _FILES)


def find_backbone(name: str) -> BackboneKind | None:
    """Returns the backbone of a name, or None."""
    return next((kind for kind in BACKBONES if kind.name == name), None)


def backbone_kind(name: str) -> BackboneKind:
    """Returns the backbone of a name.

    Raises:
        ValueError: no backbone has that name.
    """
    if (kind := find_backbone(name)) is None:
        raise ValueError(f"backbone must be one of {', '.join(repr(kind.name) for kind in BACKBONES)}, got {name!r}")
    return kind


def kinds_in(names: str) -> list[BackboneKind]:
    """Returns the backbones of names joined by +, without those that are not in the catalogue."""
    return [kind for name in names.split("+") if (kind := find_backbone(name)) is not None]


def wsod_backbones() -> tuple[str, ...]:
    """Returns the backbones of OICR and MIST, also two frozen ones joined."""
    frozen = [kind.name for kind in BACKBONES if kind.crops is not None]
    pairs = ["+".join(pair) for pair in combinations(sorted(frozen), 2)]
    return *(kind.name for kind in BACKBONES if kind.roi_net is not None), *frozen, *pairs


def pyramid_backbones() -> tuple[str, ...]:
    """Returns the backbones that have maps for detectors."""
    return tuple(kind.name for kind in BACKBONES if kind.pyramid is not None)


def make_pyramid(backbone: str, *, frozen_stages: int, finest: int) -> Pyramid:
    """Returns the maps of a backbone for detectors, with random weights.

    Args:
        backbone: its name.
        frozen_stages: number of leading stages that are not trained, where any are.
        finest: stride of the finest map of `frozen_sam`, pixels.

    Raises:
        ValueError: no backbone has that name, or it has no maps for detectors.
    """
    kind = backbone_kind(backbone)
    if kind.pyramid is None:
        raise ValueError(f"backbone must be one of {', '.join(map(repr, pyramid_backbones()))}, got {backbone!r}")
    return kind.pyramid(frozen_stages, finest)
