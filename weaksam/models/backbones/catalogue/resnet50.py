"""ResNet-50: RoI features for OICR and MIST, and the four maps of detectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from weaksam.models.backbones.catalogue.kind import BackboneKind

if TYPE_CHECKING:
    from torch import Tensor

    from weaksam.models.backbones.pyramids import Pyramid
    from weaksam.models.backbones.roi_net import Pixels, RoiNet


def _roi_net(pixels: Pixels, last_relu: bool, frozen_stages: int) -> RoiNet:
    from weaksam.models.backbones.roi_net import ResNet50C5

    return ResNet50C5(pixels, frozen_stages=frozen_stages)


def _imagenet() -> tuple[Mapping[str, Tensor], str]:
    from torchvision.models import ResNet50_Weights

    known = ResNet50_Weights.IMAGENET1K_V1
    return known.get_state_dict(check_hash=True), known.url


def _pyramid(frozen_stages: int, finest: int) -> Pyramid:
    from weaksam.models.backbones.pyramids import ResNet50

    return ResNet50(frozen_stages)


KIND = BackboneKind(
    "resnet50",
    "ResNet-50 (ImageNet)",
    roi_net=_roi_net,
    imagenet=_imagenet,
    pyramid=_pyramid,
    takes_weights=True,
)
