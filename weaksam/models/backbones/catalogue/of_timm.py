"""Backbones of the names of timm. Imports timm, and with it torch, only when called."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING

from weaksam.models.backbones.catalogue.kind import BackboneKind

if TYPE_CHECKING:
    from weaksam.models.backbones.pyramids import Pyramid
    from weaksam.models.backbones.timm_net import TimmCrops
    from weaksam.models.classifiers.cam_classifier import CamClassifier


def is_of_timm(name: str) -> bool:
    """Returns whether timm has a network of that name, with or without the tag of its weights."""
    if not isinstance(name, str) or not name:
        return False
    import timm

    return timm.is_model(name)


@lru_cache
def timm_kind(name: str) -> BackboneKind:
    """Returns the backbone of a name of timm.

    Raises:
        ConfigError: timm has no such network, or cannot return maps of it.
    """
    from weaksam.models.backbones.timm_net import timm_info

    info = timm_info(name)
    return BackboneKind(
        name,
        f"{name} (timm)",
        crops=partial(_crops, name),
        crops_key=name.replace(".", "_"),
        crop_multiple=max(info.strides),
        is_rounded=True,
        takes_weights=True,
        pyramid=partial(_pyramid, name),
        mean=info.mean,
        std=info.std,
        classifier=None if info.is_plain_vit else partial(_classifier, name),
    )


def _crops(name: str, side: int) -> TimmCrops:
    from weaksam.models.backbones.timm_net import TimmCrops

    return TimmCrops(name)


def _pyramid(name: str, frozen_stages: int, finest: int) -> Pyramid:
    from weaksam.models.backbones.pyramids import TimmPyramid

    return TimmPyramid(name, frozen_stages)


def _classifier(name: str, num_classes: int) -> CamClassifier:
    from weaksam.models.backbones.timm_net import TimmCrops
    from weaksam.models.classifiers.cam_classifier import CamClassifier

    return CamClassifier(num_classes, TimmCrops(name), key="timm")
