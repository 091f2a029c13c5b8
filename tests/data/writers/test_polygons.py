"""Polygons of masks: outlines, holes, tolerance."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from tests.data.writers.export_images import blob, encode, make_image
from weaksam.data.writers.common import ExportImage
from weaksam.data.writers.polygons import draw_polygons, join_polygons, outlines, signed_area, simplify, to_polygons


def test_an_outline_follows_the_sides_of_pixels() -> None:
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:4] = True
    [ring] = outlines(mask)
    assert sorted(map(tuple, ring.tolist())) == [(1, 1), (1, 3), (4, 1), (4, 3)]
    assert signed_area(ring) == 6
    assert outlines(np.zeros((3, 3), bool)) == []


def test_holes_run_the_other_way_and_pixels_at_a_corner_are_apart() -> None:
    mask = np.ones((5, 5), bool)
    mask[2, 2] = False
    assert sorted(signed_area(ring) for ring in outlines(mask)) == [-1, 25]
    assert [signed_area(ring) for ring in outlines(np.eye(3, dtype=bool))] == [1, 1, 1]


@pytest.mark.parametrize("seed", range(20))
def test_polygons_are_the_mask_with_its_holes_filled(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = make_image("a", rng, num=0)
    mask = blob(rng, image.height, image.width)
    mask[2:9, 2:9] = True
    mask[3:8, 3:8] = False
    mask[5, 5] = True  # a part in a hole
    parts, holes = to_polygons(image, encode(mask))
    # Pixels are neighbours by their sides, those around by their corners too.
    filled = ndimage.binary_fill_holes(mask, np.ones((3, 3)))
    assert len(parts) == ndimage.label(filled)[1]
    assert holes == ndimage.label(~np.pad(mask, 1), np.ones((3, 3)))[1] - 1 >= 1
    assert signed_area(parts[0]) == max(signed_area(part) for part in parts)
    for polygons in (parts, [join_polygons(parts)]):
        assert (image.decode(draw_polygons(image, polygons)) == filled).all()


def test_a_tolerance_leaves_corners_out_and_little_else() -> None:
    picture = Image.new("1", (120, 100))
    ImageDraw.Draw(picture).ellipse((10, 10, 105, 80), fill=1)
    image = make_image("a", np.random.default_rng(0), num=0)
    image = ExportImage("a", image.place, 100, 120, image.boxes, image.classes, image.scores, [])
    counts = encode(np.array(picture))
    [exact], [rough] = to_polygons(image, counts)[0], to_polygons(image, counts, 1.0)[0]
    assert len(rough) < len(exact) / 4
    one, other = image.decode(counts), image.decode(draw_polygons(image, [rough]))
    assert (one & other).sum() / (one | other).sum() > 0.97
    assert len(simplify(np.array([[0, 0], [1, 0], [1, 1], [0, 1]]), 5.0)) == 4  # it would lose its area
