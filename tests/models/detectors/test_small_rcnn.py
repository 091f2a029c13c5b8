"""Faster R-CNN that sees its regions cut out: what a region is seen as, no region at all, and what it can learn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models.pictures import best_box_overlap, learn_in_stages, squares_and_discs, total
from weaksam.models.backbones.crop_net import CropNet
from weaksam.models.backbones.pyramids import SamPyramid
from weaksam.models.detectors.base import Targets
from weaksam.models.detectors.small_rcnn import SmallRcnn, SmallRcnnSize
from weaksam.ops.boxes import mirror_boxes

SIZE = SmallRcnnSize(
    dim=16, hidden=32, anchors=(16, 32, 48), proposals=20, pre_nms=(50, 50), first_steps=100, patches=2
)


def make(**changes: Any) -> SmallRcnn:
    torch.manual_seed(0)
    net = SmallRcnn(SamPyramid(finest=8), 2, replace(SIZE, **changes))
    net.load_pretrained(None)
    return net


def test_sees_a_region_as_the_weakly_supervised_detector_does() -> None:
    images, targets = squares_and_discs(2, side=64)
    net, other = make(depth=None), CropNet(dim=8, crop=32)
    other.sam.load_pretrained()
    net._backbone_maps(images)
    seen = net.roi_heads.box_roi_pool({}, [one.boxes for one in targets], [(64, 64)] * 2)
    wanted = torch.cat([other.pool(image, one.boxes) for image, one in zip(images, targets, strict=True)])
    assert torch.allclose(seen, wanted, atol=1e-4)


def test_without_regions_nothing_is_found() -> None:
    images, _ = squares_and_discs(1, side=64)
    net = make().eval()
    net.rpn.score_thresh = 2.0
    (found,) = net.detect(images)
    assert found.boxes.shape == (0, 4)


def test_the_sam_is_not_trained() -> None:
    net = make().train()
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert not any("sam." in name for name in trained)
    assert not net.cut_outs.sam.encoder.training


@pytest.mark.parametrize("step", [99, 100])
def test_the_stages_learn_one_after_the_other_and_every_weight_takes_part(step: int) -> None:
    images, targets = squares_and_discs(2, side=64)
    targets[0] = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    net = make().train()
    total(net.losses(images, targets, step)).backward()
    early = {id(p) for p in net.early_parameters()[0]}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            learns = bool(parameter.grad.any())
            if (id(parameter) in early) != (step < 100):
                assert not learns, name
    assert {name for name, p in net.named_parameters() if id(p) in early} == {
        name for name, p in net.named_parameters() if p.requires_grad and not name.startswith("roi_heads")
    }


def test_what_a_region_looks_like_is_seen_once() -> None:
    images, targets = squares_and_discs(2, side=64)
    net = make().train()
    torch.manual_seed(1)
    first = net.losses(images, targets, 100)
    net.cut_outs.forward = None  # type: ignore[assignment]  (fails when called)
    torch.manual_seed(1)
    again = net.losses(images, targets, 101)
    assert {key: value.item() for key, value in first.items()} == {key: value.item() for key, value in again.items()}
    assert net.rpn.training


def test_a_mirrored_image_has_mirrored_regions_whichever_is_seen_first() -> None:
    (image, *_), (target, *_) = squares_and_discs(1, side=64)
    mirrored, boxes = image.flip(2), mirror_boxes(target.boxes, 64)
    one, other = make().train(), make().train()
    first, second = one._region_maps(image, target.boxes), one._region_maps(mirrored, boxes)
    turned, again = other._region_maps(mirrored, boxes), other._region_maps(image, target.boxes)
    for a, b in zip([*first, *second], [*again, *turned], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(mirror_boxes(first[0], 64), second[0])
    assert not torch.allclose(first[1], second[1])  # what is in them is seen mirrored
    assert len(one.region_cache.views) == 1


@pytest.mark.slow
def test_learns_three_pictures_by_heart() -> None:
    images, targets = squares_and_discs(3, side=64)
    net = make().train()
    mirrored = [target._replace(boxes=mirror_boxes(target.boxes, 64)) for target in targets]
    learn_in_stages(net, images + [image.flip(2) for image in images], targets + mirrored, steps=300)
    for found, target in zip(net.eval().detect(images), targets, strict=True):
        assert best_box_overlap(found, target) > 0.7
