"""The encoder of the small SAM that comes with weaksam, for drawn scenes: its features are not trained further."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from weaksam.core import storage
from weaksam.models.backbones.catalogue.kind import FROZEN_WSOD_RECIPE, BackboneKind
from weaksam.sam.shipped import SHIPPED

if TYPE_CHECKING:
    from weaksam.models.backbones.frozen_sam import FrozenSam
    from weaksam.models.backbones.pyramids import Pyramid
    from weaksam.models.classifiers.weaktr import WeakTrSize

_VARIANT = "vit_xs"
_WSOD_RECIPE = FROZEN_WSOD_RECIPE | {
    "scales": [256],
    "min_side": 8,
    "rating_power": 4,
    "steps": 600,
    "batch_size": 16,
    "lr": 5e-3,
}
# The layers on the frozen encoder are initialised at random: Muon needs a fraction of the steps of AdamW.
_CLASSIFIER_RECIPE = {
    "image_size": 192,
    "epochs": 12,
    "batch_size": 32,
    "optimizer": "muon",
    "lr": 6e-3,
    "final_lr": 0.0,
    "warmup_epochs": 1,
    "drop_path": 0.0,
    "min_scale": 0.6,
    "rand_augment": 0.0,
    "erase": 0.0,
    "ema": 0.98,
}


def _crops(side: int) -> FrozenSam:
    from weaksam.models.backbones.frozen_sam import FrozenSam

    return FrozenSam(_VARIANT, side)


def _pyramid(frozen_stages: int, finest: int) -> Pyramid:
    from weaksam.models.backbones.pyramids import SamPyramid

    return SamPyramid(_VARIANT, finest=finest)


def _weaktr_size() -> WeakTrSize:
    from weaksam.models.classifiers.weaktr import WeakTrSize

    return WeakTrSize(128, 4, 4, grid=16, sam=_VARIANT)


def _shipped() -> Mapping[str, str]:
    return {f"sam.{_VARIANT}": storage.identity(str(SHIPPED[_VARIANT]))}


KIND = BackboneKind(
    "frozen_sam",
    "the small SAM (drawn scenes)",
    crops=_crops,
    crops_key="sam",
    pyramid=_pyramid,
    is_pyramid_frozen=True,
    weaktr_size=_weaktr_size,
    shipped=_shipped,
    wsod_recipe=_WSOD_RECIPE,
    classifier_recipe=_CLASSIFIER_RECIPE,
)
