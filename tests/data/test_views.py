"""Views of an image keep boxes on what they were drawn around."""

from __future__ import annotations

import numpy as np

from weaksam.data.views import crop_view, flip_view, resize_view, view_size


def test_views_keep_boxes_on_their_objects() -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[10:20, 16:32] = 255
    box = np.array([[16, 10, 32, 20]], np.float32)
    resized, moved = resize_view(pixels, box, 80, 1000)
    assert resized.shape == (80, 160, 3)
    assert moved.tolist() == [[32, 20, 64, 40]]
    flipped, mirrored = flip_view(resized, moved)
    assert mirrored.tolist() == [[96, 20, 128, 40]]
    left, top, right, bottom = mirrored[0].astype(int)
    assert flipped[top + 2 : bottom - 2, left + 2 : right - 2].min() > 250
    assert view_size(40, 80, 80, 100) == (50, 100)


def test_a_cut_keeps_the_boxes_that_have_a_pixel_in_it() -> None:
    pixels = np.arange(40 * 80 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 80, 3)
    boxes = np.array([[10, 5, 30, 25], [0, 0, 12, 10], [60, 20, 80, 40], [19.5, 0, 20.4, 9]], np.float32)
    part, moved, stays = crop_view(pixels, boxes, 8, 20, 30, 50)
    assert np.array_equal(part, pixels[8:38, 20:70])
    assert stays.tolist() == [True, False, True, False]
    assert moved.tolist() == [[0, 0, 10, 17], [40, 12, 50, 30]]
