"""The catalogue of backbones: its names, their order, and what each can build."""

from __future__ import annotations

import subprocess
import sys

import pytest

from weaksam.models.backbones.catalogue import (
    BACKBONES,
    are_of_timm,
    backbone_kind,
    find_backbone,
    kinds_in,
    make_pyramid,
    pyramid_backbones,
    wsod_backbones,
)
from weaksam.models.backbones.catalogue.kind import BackboneKind
from weaksam.models.backbones.crop_net import CropNet


def test_backbones_keep_their_order_and_frozen_features_are_joined() -> None:
    names = ("vgg16", "resnet50", "frozen_sam", "efficientnet_lite0")
    assert tuple(kind.name for kind in BACKBONES) == names
    assert wsod_backbones() == (*names, "efficientnet_lite0+frozen_sam")
    assert pyramid_backbones() == names[1:]
    assert [kind.name for kind in kinds_in("efficientnet_lite0+frozen_sam")] == ["efficientnet_lite0", "frozen_sam"]


def test_an_unknown_name_lists_the_known_names() -> None:
    known = (
        "backbone must be one of 'vgg16', 'resnet50', 'frozen_sam', 'efficientnet_lite0', or a network of timm, got "
    )
    with pytest.raises(ValueError, match=f"{known}'resnet5'"):
        backbone_kind("resnet5")
    assert find_backbone("resnet5") is None
    assert not are_of_timm("resnet5")
    assert not are_of_timm("convnext_tiny+vgg16")
    assert not are_of_timm("convnext_tiny+convnext_tiny")
    assert are_of_timm("convnext_tiny+frozen_sam")


def test_a_backbone_that_cannot_build_a_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of 'resnet50', 'frozen_sam', 'efficientnet_lite0', .*got 'vgg16'"):
        make_pyramid("vgg16", frozen_stages=1, finest=8)
    with pytest.raises(ValueError, match="backbone vgg16 has no features of crops"):
        CropNet(["frozen_sam", "vgg16"])


@pytest.mark.parametrize("kind", BACKBONES, ids=lambda kind: kind.name)
def test_what_a_kind_says_of_its_maps_is_so(kind: BackboneKind) -> None:
    if kind.pyramid is not None:
        pyramid = make_pyramid(kind.name, frozen_stages=1, finest=8)
        assert kind.is_pyramid_frozen == (not any(p.requires_grad for p in pyramid.parameters()))
    if kind.crops is not None:
        assert max(kind.crops(64).crop_strides) == kind.crop_multiple


def test_identities_of_weights_need_no_torch() -> None:
    code = (
        "from weaksam.models.backbones.catalogue import BACKBONES; import sys; "
        "print(*(name for kind in BACKBONES for name in kind.shipped()), 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["sam.vit_xs", "efficientnet_lite0", "False"]
