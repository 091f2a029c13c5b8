"""EfficientNet-Lite0, whose ImageNet weights come with a package that weaksam depends on, for photographs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weaksam.models.backbones.catalogue.kind import PHOTOGRAPHS_CLASSIFIER_RECIPE, PHOTOGRAPHS_WSOD_RECIPE, BackboneKind
from weaksam.models.backbones.lite0_package import MEAN, SHA256, STD

if TYPE_CHECKING:
    from weaksam.models.backbones.lite0 import Lite0
    from weaksam.models.backbones.pyramids import Pyramid
    from weaksam.models.classifiers.cam_classifier import CamClassifier


def _crops(side: int) -> Lite0:
    from weaksam.models.backbones.lite0 import Lite0

    return Lite0()


def _pyramid(frozen_stages: int, finest: int) -> Pyramid:
    from weaksam.models.backbones.pyramids import Lite0Pyramid

    return Lite0Pyramid(frozen_stages)


def _classifier(num_classes: int) -> CamClassifier:
    from weaksam.models.backbones.lite0 import Lite0
    from weaksam.models.classifiers.cam_classifier import CamClassifier

    return CamClassifier(num_classes, Lite0(), key="lite0")


KIND = BackboneKind(
    "efficientnet_lite0",
    "EfficientNet-Lite0 (ImageNet)",
    crops=_crops,
    crops_key="lite0",
    crop_multiple=32,
    is_rounded=True,
    pyramid=_pyramid,
    classifier=_classifier,
    mean=MEAN,
    std=STD,
    shipped=lambda: {"efficientnet_lite0": SHA256},
    wsod_recipe=PHOTOGRAPHS_WSOD_RECIPE,
    classifier_recipe=PHOTOGRAPHS_CLASSIFIER_RECIPE,
)
