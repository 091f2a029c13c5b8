"""Views of an image keep boxes on what they were drawn around."""

from __future__ import annotations

import numpy as np

from weaksam.data.views import FILL, View, crop_view, fill_view, flip_view, resize_view, view_size


def test_views_keep_boxes_on_their_objects() -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[10:20, 16:32] = 255
    box = np.array([[16, 10, 32, 20]], np.float32)
    resized = resize_view(View(pixels, box, pixels[None, :, :, 0] > 0), *view_size(40, 80, 80, 1000))
    assert resized.size == (80, 160)
    assert resized.boxes.tolist() == [[32, 20, 64, 40]]
    flipped = flip_view(resized)
    assert flipped.boxes.tolist() == [[96, 20, 128, 40]]
    left, top, right, bottom = flipped.boxes[0].astype(int)
    assert flipped.pixels[top + 2 : bottom - 2, left + 2 : right - 2].min() > 250
    wanted = np.zeros((1, 80, 160), bool)
    wanted[0, top:bottom, left:right] = True
    assert flipped.masks is not None
    assert np.array_equal(flipped.masks, wanted)
    assert view_size(40, 80, 80, 100) == (50, 100)


def test_a_view_without_objects_has_none_at_any_size() -> None:
    view = View(np.zeros((40, 80, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros((0, 40, 80), bool))
    for changed in (resize_view(view, 20, 30), flip_view(view), crop_view(view, 0, 0, 10, 10)[0]):
        assert changed.masks is not None
        assert changed.masks.shape == (0, *changed.size)


def test_a_cut_keeps_the_boxes_that_have_a_pixel_in_it() -> None:
    pixels = np.arange(40 * 80 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 80, 3)
    boxes = np.array([[10, 5, 30, 25], [0, 0, 12, 10], [60, 20, 80, 40], [19.5, 0, 20.4, 9]], np.float32)
    part, stays = crop_view(View(pixels, boxes), 8, 20, 30, 50)
    assert np.array_equal(part.pixels, pixels[8:38, 20:70])
    assert stays.tolist() == [True, False, True, False]
    assert part.boxes.tolist() == [[0, 0, 10, 17], [40, 12, 50, 30]]


def test_a_cut_keeps_what_has_a_pixel_of_its_mask_in_it() -> None:
    masks = np.zeros((2, 40, 80), bool)
    masks[0, 5:25, 10:15] = masks[1, 20:40, 60:80] = True  # the first is in the left of its box alone
    view = View(np.zeros((40, 80, 3), np.uint8), np.array([[10, 5, 30, 25], [60, 20, 80, 40]], np.float32), masks)
    part, stays = crop_view(view, 8, 20, 30, 50)
    assert stays.tolist() == [False, True]
    assert part.masks is not None
    assert np.array_equal(part.masks, masks[1:, 8:38, 20:70])


def test_what_is_filled_up_is_grey_and_no_object() -> None:
    view = View(np.zeros((3, 4, 3), np.uint8), np.array([[0, 0, 4, 3]], np.float32), np.ones((1, 3, 4), bool))
    filled = fill_view(view, 5, 6)
    assert filled.masks is not None
    assert (filled.size, filled.masks.shape, filled.masks.sum()) == ((5, 6), (1, 5, 6), 12)
    assert (filled.pixels[3:] == FILL).all()
    assert (filled.pixels[:, 4:] == FILL).all()
    assert not filled.pixels[:3, :4].any()
