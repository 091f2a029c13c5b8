"""What becomes of masks that are not about their box."""

from __future__ import annotations

import numpy as np
import pytest

from weaksam.ops.pseudo_masks import EMPTY, EXPLODING, FITS, MaskRules, box_mask, choose_masks, tight_boxes
from weaksam.ops.rle import decode_rle, encode_rle

HW = (20, 30)
BOX = np.array([4, 2, 14, 12], np.float32)


def drawn(top: int, bottom: int, left: int, right: int) -> bytes:
    mask = np.zeros(HW, bool)
    mask[top:bottom, left:right] = True
    return encode_rle(mask)


FITTING = drawn(3, 11, 5, 13)
HALF_OUT, MORE_OUT = drawn(2, 12, 9, 19), drawn(2, 12, 10, 20)  # shares outside: 0.5, which is not too much, and 0.6
NOTHING = drawn(0, 0, 0, 0)


def test_states_are_told_of_every_mask() -> None:
    masks = [FITTING, NOTHING, HALF_OUT, MORE_OUT]
    chosen = choose_masks(masks, np.stack([BOX] * 4), HW, MaskRules())
    assert chosen.states.tolist() == [FITS, EMPTY, FITS, EXPLODING]
    assert chosen.kept.tolist() == [0, 1, 2, 3]
    assert [chosen.masks[i] for i in (0, 2, 3)] == [FITTING, HALF_OUT, MORE_OUT]  # an exploding one stays, if not asked
    assert chosen.masks[1] == drawn(2, 12, 4, 14)


def test_what_does_not_fit_is_replaced_or_left_out() -> None:
    masks, boxes = [FITTING, NOTHING, MORE_OUT], np.stack([BOX] * 3)
    replaced = choose_masks(masks, boxes, HW, MaskRules(exploding="box"))
    assert replaced.masks == [FITTING, drawn(2, 12, 4, 14), drawn(2, 12, 4, 14)]
    left = choose_masks(masks, boxes, HW, MaskRules(empty="drop", exploding="drop"))
    assert (left.kept.tolist(), left.masks, left.states.tolist()) == ([0], [FITTING], [FITS, EMPTY, EXPLODING])
    strict = choose_masks(masks, boxes, HW, MaskRules(max_outside=1.0))
    assert strict.states.tolist() == [FITS, EMPTY, FITS]


def test_an_image_without_boxes_has_no_masks() -> None:
    chosen = choose_masks([], np.zeros((0, 4), np.float32), HW, MaskRules())
    assert (len(chosen.kept), chosen.masks, len(chosen.states)) == (0, [], 0)
    assert tight_boxes([], HW).shape == (0, 4)


@pytest.mark.parametrize("seed", range(5))
def test_a_box_is_the_pixels_whose_centres_it_holds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, 1, (2, 2)), axis=0) * [HW[1], HW[0]]
    box = (corners.flatten() + np.array([0, 0, 1, 1])).astype(np.float32)
    rows, columns = np.mgrid[0.5 : HW[0], 0.5 : HW[1]]
    wanted = (columns >= box[0]) & (columns < box[2]) & (rows >= box[1]) & (rows < box[3])
    assert np.array_equal(decode_rle(box_mask(box, HW), *HW), wanted)


@pytest.mark.parametrize("box", [[5.6, 5.6, 5.9, 5.9], [-9, -9, -2, -2], [40, 40, 50, 50], [29.9, 0, 30, 20]])
def test_no_box_is_so_small_or_so_far_out_that_its_mask_is_empty(box: list[float]) -> None:
    assert decode_rle(box_mask(np.array(box, np.float32), HW), *HW).any()


def test_tight_boxes_are_around_the_pixels() -> None:
    assert tight_boxes([FITTING, MORE_OUT], HW).tolist() == [[5, 3, 13, 11], [10, 2, 20, 12]]
