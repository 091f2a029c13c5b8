"""VGG16 with a dilated last stage, for OICR and MIST as published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from weaksam.models.backbones.catalogue.kind import BackboneKind

if TYPE_CHECKING:
    from torch import Tensor

    from weaksam.models.backbones.roi_net import Pixels, RoiNet


def _roi_net(pixels: Pixels, last_relu: bool, frozen_stages: int) -> RoiNet:
    from weaksam.models.backbones.roi_net import DilatedVgg16

    return DilatedVgg16(pixels, last_relu=last_relu, frozen_stages=frozen_stages)


def _imagenet() -> tuple[Mapping[str, Tensor], str]:
    from torchvision.models import VGG16_Weights

    known = VGG16_Weights.IMAGENET1K_V1
    return known.get_state_dict(check_hash=True), known.url


KIND = BackboneKind("vgg16", "VGG16 (ImageNet)", roi_net=_roi_net, imagenet=_imagenet, takes_weights=True)
