"""EfficientNet-Lite0, whose ImageNet weights come with a package that weaksam depends on, for photographs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weaksam.models.backbones.catalogue.kind import FROZEN_WSOD_RECIPE, BackboneKind
from weaksam.models.backbones.lite0_package import SHA256

if TYPE_CHECKING:
    from weaksam.models.backbones.lite0 import Lite0
    from weaksam.models.backbones.pyramids import Pyramid
    from weaksam.models.classifiers.cam_classifier import CamClassifier

_WSOD_RECIPE = FROZEN_WSOD_RECIPE | {
    "scales": [384],
    "min_side": 16,
    "rating_power": 8,
    "steps": 300,
    "crop": 96,
    "lr": 1e-3,
}
# The only augmentation is the mirror image, so that the features of an image can be cached.
_CLASSIFIER_RECIPE = {
    "image_size": 320,
    "epochs": 15,
    "batch_size": 8,
    "lr": 3e-3,
    "final_lr": 0.0,
    "warmup_epochs": 1,
    "weight_decay": 0.05,
    "drop_path": 0.0,
    "min_scale": 1.0,
    "rand_augment": 0.0,
    "erase": 0.0,
}


def _crops(side: int) -> Lite0:
    from weaksam.models.backbones.lite0 import Lite0

    return Lite0()


def _pyramid(frozen_stages: int, finest: int) -> Pyramid:
    from weaksam.models.backbones.pyramids import Lite0Pyramid

    return Lite0Pyramid(frozen_stages)


def _classifier(num_classes: int) -> CamClassifier:
    from weaksam.models.classifiers.cam_classifier import CamClassifier

    return CamClassifier(num_classes)


KIND = BackboneKind(
    "efficientnet_lite0",
    "EfficientNet-Lite0 (ImageNet)",
    crops=_crops,
    crops_key="lite0",
    crop_multiple=32,
    is_rounded=True,
    pyramid=_pyramid,
    classifier=_classifier,
    shipped=lambda: {"efficientnet_lite0": SHA256},
    wsod_recipe=_WSOD_RECIPE,
    classifier_recipe=_CLASSIFIER_RECIPE,
)
