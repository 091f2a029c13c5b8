"""Mask R-CNN that sees its regions cut out: masks of the image's size, what is remembered, and what it can learn."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from tests.models.detectors.test_small_rcnn import SIZE as SMALL
from tests.models.pictures import best_overlap, learn_in_stages, masked_pictures, squares_and_discs, total
from weaksam.models.backbones.pyramids import SamPyramid
from weaksam.models.detectors.base import Targets
from weaksam.models.detectors.small_mask_rcnn import SmallMaskRcnn, SmallMaskRcnnSize
from weaksam.ops.roi_drop import RoiDropRules

SIZE = SmallMaskRcnnSize(**asdict(replace(SMALL, patches=4)), mask_dim=16)


def make(**more: Any) -> SmallMaskRcnn:
    torch.manual_seed(0)
    net = SmallMaskRcnn(SamPyramid(finest=8), 2, SIZE, **more)
    net.load_pretrained(None)
    return net


def test_masks_have_the_size_asked_for_and_boxes_stay_the_images() -> None:
    images, _ = squares_and_discs(1, side=64)
    net = make().eval()
    (own,), (larger,) = net.detect(images), net.detect(images, [(100, 150)])
    assert own.masks is not None
    assert larger.masks is not None
    assert own.masks.shape == (len(own.boxes), 64, 64)
    assert larger.masks.shape == (len(own.boxes), 100, 150)
    assert torch.equal(own.boxes, larger.boxes)
    assert len(own.boxes) > 0
    net.rpn.score_thresh = 2.0
    (none,) = net.detect(images)
    assert none.masks is not None
    assert none.masks.shape == (0, 64, 64)


def test_a_mask_is_learnt_in_its_region_and_dropped_with_it() -> None:
    images, targets = masked_pictures(2, side=64)
    targets[1] = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    net = make(drop=RoiDropRules("cls", cls_threshold=1e-6, start=101)).train()
    before, learning, dropping = (net.losses(images, targets, step) for step in (99, 100, 101))
    assert before["loss_mask"] == 0 < before["loss_objectness"]
    assert learning["loss_mask"] > 0 == learning["dropped_mask"]
    assert dropping["loss_mask"] == 0 < dropping["dropped_mask"]
    assert before.keys() == learning.keys() == dropping.keys()
    for losses in (before, learning):
        net.zero_grad()
        total(losses).backward()
        assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    assert all(p.grad is not None and p.grad.any() for p in net.mask_head.parameters())


def test_what_masks_are_made_of_is_seen_once() -> None:
    images, targets = masked_pictures(2, side=64)
    net = make().train()
    torch.manual_seed(1)
    first = net.losses(images, targets, 100)
    net.cut_outs.pyramid = None  # type: ignore[assignment]  (fails when called)
    torch.manual_seed(1)
    again = net.losses(images, targets, 100)
    assert {key: value.item() for key, value in first.items()} == {key: value.item() for key, value in again.items()}


def test_objects_must_have_masks() -> None:
    images, targets = squares_and_discs(1, side=64)
    with pytest.raises(ValueError, match="2 objects without masks: give `masks`"):
        make().train().losses(images, targets, 100)


@pytest.mark.slow
def test_learns_three_pictures_by_heart() -> None:
    images, targets = masked_pictures(3, side=64)
    net = make().train()
    learn_in_stages(net, images, targets, steps=300)
    for found, target in zip(net.eval().detect(images), targets, strict=True):
        assert best_overlap(found, target) > 0.7
