"""The check of targets: what every detector refuses and why, and that what it takes never makes a weight NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.detectors import (
    test_faster_rcnn,
    test_mask2former,
    test_mask_rcnn,
    test_rt_detr_v2,
    test_small_mask_rcnn,
    test_small_rcnn,
)
from tests.models.detectors.tiny_dino import make_dino, make_image
from tests.models.pictures import total
from weaksam.models.detectors.base import Detector, Targets
from weaksam.models.detectors.targets import TargetError, check_targets
from weaksam.ops.box_areas import has_area

SIDE = 64
BOX, CLASS, MASK = [4.0, 4.0, 30.0, 30.0], 1, torch.ones(1, SIDE, SIDE, dtype=torch.bool)
DETECTORS: dict[str, tuple[Callable[[], Detector], int]] = {
    "faster_rcnn": (test_faster_rcnn.tiny, 2),
    "mask_rcnn": (test_mask_rcnn.tiny, 2),
    "dino": (make_dino, 3),
    "rt_detr_v2": (test_rt_detr_v2.make_net, 3),
    "mask2former": (test_mask2former.tiny, 2),
    "small_rcnn": (test_small_rcnn.make, 2),
    "small_mask_rcnn": (test_small_mask_rcnn.make, 2),
}


@cache
def detector(name: str) -> Detector:
    return DETECTORS[name][0]().train()


def one(box: Any = BOX, label: int = CLASS, masks: Any = MASK, **kinds: torch.dtype) -> Targets:
    boxes = torch.tensor([box], dtype=kinds.get("boxes", torch.float32))
    return Targets(boxes, torch.tensor([label], dtype=kinds.get("classes", torch.int64)), masks)


FAULTS = [
    (one([4, 4, 4, 30]), r"row 0: box \(4, 4, 4, 30\) has no area"),
    (one([4, 4, 30, 4]), "row 0: .* has no area"),
    (one([30, 4, 4, 30]), "row 0: .* has no area"),
    (one([4, 4, 4 + 1e-6, 30]), "row 0: .* has no area"),
    (one([4, 4, math.nan, 30]), "row 0: .* is not finite"),
    (one([4, 4, math.inf, 30]), "row 0: .* is not finite"),
    (one([4, 4, 1e30, 30]), "row 0: .* lies far beyond the image, which is 64 pixels wide and 64 high"),
    (one(label=-1), "row 0: class -1 is none of 0 to 1"),
    (one(label=2), "row 0: class 2 is none of 0 to 1"),
    (one(boxes=torch.float64), r"boxes: must be \(objects, 4\) float32, got \(1, 4\) float64"),
    (one(classes=torch.int32), r"classes: must be \(objects,\) int64, got \(1,\) int32"),
    (Targets(torch.tensor([BOX]), torch.tensor([0, 1]), MASK), "1 boxes and 2 classes"),
    (Targets(torch.tensor(BOX), torch.tensor([0]), MASK), r"boxes: must be \(objects, 4\) float32, got \(4,\)"),
    (one(masks=MASK.byte() * 255), r"masks: must be bool, .* got \(1, 64, 64\) uint8"),
    (one(masks=MASK[:, :32]), r"masks: must be bool, one an object, of the image's size, \(1, 64, 64\), got \(1, 32"),
    (one(masks=MASK.repeat(2, 1, 1)), r"masks: .* got \(2, 64, 64\) bool"),
]


@pytest.mark.parametrize("name", DETECTORS)
def test_no_detector_learns_from_a_target_that_is_wrong(name: str) -> None:
    net, (_, num_classes) = detector(name), DETECTORS[name]
    for wrong, fault in FAULTS:
        wanted = fault.replace("0 to 1", f"0 to {num_classes - 1}")
        wrong = wrong._replace(classes=torch.where(wrong.classes == 2, num_classes, wrong.classes))
        with pytest.raises(
            ValueError, match="targets of image 1, " + wanted.replace("class 2", f"class {num_classes}")
        ):
            net.losses([make_image(), make_image(seed=1)], [one(), wrong], 0)


def test_masks_are_asked_for_where_they_are_learnt() -> None:
    with pytest.raises(TargetError, match="targets of image 0, 1 objects without masks: give `masks`"):
        detector("mask_rcnn").losses([make_image()], [one(masks=None)], 0)
    nothing = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    check_targets([make_image()], [nothing], 2, with_masks=True)
    check_targets([make_image()], [one(masks=None)], 2)


def test_the_first_row_that_is_wrong_is_named_and_the_others_are_counted() -> None:
    boxes = torch.tensor([BOX, [5.0, 5, 5, 9], BOX, [1.0, 9, 8, 9]])
    nothing = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    many = Targets(boxes, torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match=r"targets of image 2, row 1: .*, and 1 more rows are wrong") as caught:
        check_targets([make_image()] * 3, [one(masks=None), nothing, many], 2)
    assert caught.value.image == 2  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="got 2 and 1"):
        check_targets([make_image()] * 2, [nothing], 2)
    with pytest.raises(ValueError, match="at least one image"):
        check_targets([], [], 2)


@pytest.mark.parametrize("name", DETECTORS)
def test_images_are_bytes(name: str) -> None:
    image = make_image()
    for wrong, kind in ((image.float() / 255, "float32"), (image.half(), "float16"), (image.int(), "int32")):
        fault = rf"targets of image 1, the image itself: must be \(3, height, width\) uint8, got \(3, 64, 64\) {kind}"
        with pytest.raises(TargetError, match=fault):
            detector(name).losses([image, wrong], [one(), one()], 0)


def test_boxes_have_an_area_or_not() -> None:
    boxes = [BOX, [4, 4, 4, 9], [9, 4, 4, 9], [0, 0, math.nan, 9], [0, 0, math.inf, 9], [0, 0, 1e-6, 9], [0, 0, 1, 1]]
    assert has_area(np.array(boxes)).tolist() == [True, False, False, False, False, False, True]
    assert has_area(np.zeros((0, 4))).tolist() == []


# Near and beyond the image, with the values that arithmetic is broken by.
NUMBERS = st.one_of(
    st.floats(-2 * SIDE, 3 * SIDE, width=32),
    st.sampled_from([0.0, 1e-38, 1e-4, 64.0, 63.9999, -1e-38, 3e38, -3e38, math.inf, -math.inf, math.nan]),
)
INSIDE = st.tuples(*[st.floats(0, SIDE - 1, width=32)] * 2, *[st.floats(2**-9, SIDE, width=32)] * 2).map(
    lambda b: [b[0], b[1], min(b[0] + b[2], SIDE), min(b[1] + b[3], SIDE)]
)
BOXES = st.one_of(*[INSIDE] * 6, st.lists(NUMBERS, min_size=4, max_size=4))
OBJECTS = st.lists(st.tuples(BOXES, st.sampled_from([0, 1] * 6 + [-1, 2, 3])), max_size=4)


@given(st.sampled_from(sorted(DETECTORS)), st.lists(OBJECTS, min_size=2, max_size=2), st.integers(0, 2**16))
@settings(max_examples=60)
def test_a_target_is_refused_or_leaves_every_weight_finite(name: str, objects: list[list], seed: int) -> None:
    net, targets = detector(name), []
    torch.manual_seed(seed)
    for rows in objects:
        boxes = torch.tensor([box for box, _ in rows]).float().reshape(-1, 4)
        masks = torch.rand(len(rows), SIDE, SIDE) < torch.rand(len(rows), 1, 1)
        targets.append(Targets(boxes, torch.tensor([label for _, label in rows], dtype=torch.int64), masks))
    try:
        losses = net.losses([make_image(seed=seed), make_image(seed=seed + 1)], targets, 0)
    except ValueError as error:
        assert "targets of image" in str(error), "an error that is not of the check"  # noqa: PT017
        return
    loss = total(losses)
    assert loss.isfinite()
    assert loss >= 0
    net.zero_grad()
    loss.backward()
    for key, weight in net.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, key
            assert weight.grad.isfinite().all(), key
