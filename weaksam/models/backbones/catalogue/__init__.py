"""The backbones of trainings: each is a file of this folder, and a line of `_FILES`; or it is a network of timm.

A detector of OICR or MIST pools RoIs from the maps of one trained backbone, or takes crops through frozen ones, whose
names are joined by +.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

from weaksam.core.catalogues import member, members
from weaksam.models.backbones.catalogue.kind import BackboneKind
from weaksam.models.backbones.catalogue.of_timm import is_of_timm, timm_kind

if TYPE_CHECKING:
    from weaksam.models.backbones.pyramids import Pyramid

# The files of this folder that hold a backbone, each with its `KIND`.
_FILES = (
    "vgg16",
    "resnet50",
    "frozen_sam",
    "efficientnet_lite0",
)
BACKBONES: tuple[BackboneKind, ...] = members(__name__, _FILES, "KIND")


def find_backbone(name: str) -> BackboneKind | None:
    """Returns the backbone of a name, of the catalogue or of timm, or None. Other names import timm."""
    if (listed := next((kind for kind in BACKBONES if kind.name == name), None)) is not None:
        return listed
    return timm_kind(name) if is_of_timm(name) else None


def backbone_kind(name: str) -> BackboneKind:
    """Returns the backbone of a name.

    Raises:
        ValueError: no backbone has that name.
        ConfigError: timm cannot return maps of this network.
    """
    if (kind := find_backbone(name)) is not None:
        return kind
    return member(BACKBONES, name, setting="backbone", others=", or a network of timm")


def listed_in(names: str) -> list[BackboneKind]:
    """Returns the backbones of the catalogue among names joined by +, without asking timm."""
    return [kind for kind in BACKBONES if kind.name in names.split("+")]


def has_own_classifier(name: str) -> bool:
    """Returns whether a backbone has a classifier that is not WeakTr.

    timm's names of plain ViTs begin with `deit_` or `vit_`: for them timm need not be imported.
    """
    if name.startswith(("deit_", "vit_")):
        return False
    kind = find_backbone(name)
    return kind is not None and kind.classifier is not None


def kinds_in(names: str) -> list[BackboneKind]:
    """Returns the backbones of names joined by +, without those that do not exist."""
    return [kind for name in names.split("+") if (kind := find_backbone(name)) is not None]


def are_of_timm(names: str) -> bool:
    """Returns whether each of names joined by + is a frozen backbone, and at least one is a network of timm."""
    if not isinstance(names, str):
        return False
    parts = names.split("+")
    listed = {kind.name: kind.crops is not None for kind in BACKBONES}
    others = [name for name in parts if name not in listed]
    if not others or len(set(parts)) < len(parts) or not all(listed.get(name, True) for name in parts):
        return False
    return all(map(is_of_timm, others))


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
        known = ", ".join(map(repr, pyramid_backbones()))
        raise ValueError(f"backbone must be one of {known}, or a network of timm, got {backbone!r}")
    return kind.pyramid(frozen_stages, finest)
