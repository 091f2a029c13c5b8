"""Peaks against objects: cases by hand, and which objects and peaks count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from weaksam.ops.peak_metrics import PeakRecords, concat_records, locate_peaks, peak_metrics
from weaksam.ops.rle import decode_rle, encode_rle

HW = (6, 8)
COARSE, FINE, CROSS = 1, 2, 3  # indices into SOURCES
CAT, DOG, POOLED = 0, 1, -1


def truth(*objects: tuple[list, int, str], masks: list[bytes | None] | None = None) -> dict[str, Any]:
    """Objects are (box, class, flag), flag being `difficult`, `crowd` or empty."""
    return {
        "boxes": [box for box, _, _ in objects],
        "classes": [label for _, label, _ in objects],
        "difficult": [flag == "difficult" for _, _, flag in objects],
        "crowd": [flag == "crowd" for _, _, flag in objects],
        "masks": masks,
    }


def found(*points: tuple[float, float, int, int]) -> dict[str, Any]:
    """Points are (x, y, label, kind)."""
    listed = [dict(zip(("x", "y", "label", "kind"), point, strict=True)) for point in points]
    return {"status": "ok", "height": HW[0], "width": HW[1], "points": listed}


def inside(annotated: dict[str, Any], *points: tuple[float, float, int, int]) -> list[bool]:
    return locate_peaks(annotated, found(*points)).inside.tolist()


@pytest.mark.parametrize(
    "row", [found(), {**found(), "points": None}, {"status": "crash", "height": None, "width": None, "points": None}]
)
@pytest.mark.parametrize("annotated", [truth(), truth(([0, 0, 4, 4], CAT, ""), masks=[encode_rle(np.ones(HW))])])
def test_an_image_without_peaks_has_no_figures(row: dict[str, Any], annotated: dict[str, Any]) -> None:
    records = locate_peaks(annotated, row)
    assert [len(part) for part in (records.kinds, records.inside, records.in_box, records.counts)] == [0, 0, 0, 0]
    assert records.num_images == 1
    assert peak_metrics(records) == {}


def test_no_record_is_refused() -> None:
    with pytest.raises(ValueError, match="records must hold at least one record, got none"):
        concat_records([])


def test_a_peak_in_an_image_without_objects_lies_outside() -> None:
    records = locate_peaks(truth(), found((1, 1, CAT, FINE), (1, 1, POOLED, FINE)))
    assert records.inside.tolist() == records.in_box.tolist() == [False, False]
    assert records.counts.all()


def test_pixel_centres_are_integers_and_boxes_end_before_their_right_edge() -> None:
    annotated = truth(([2, 1, 5, 4], CAT, ""))  # pixels 2, 3, 4 of a row, 1, 2, 3 of a column
    assert inside(annotated, (2, 1, CAT, FINE), (4, 3, CAT, FINE)) == [True, True]
    assert inside(annotated, (1, 1, CAT, FINE), (5, 3, CAT, FINE), (4, 4, CAT, FINE)) == [False] * 3
    # pixel 2 reaches from 1.5 to 2.5, pixel 4 from 3.5 to 4.5
    assert inside(annotated, (1.5, 1, CAT, FINE), (1.4, 1, CAT, FINE)) == [True, False]
    assert inside(annotated, (4.4, 1, CAT, FINE), (4.5, 1, CAT, FINE)) == [True, False]


def test_a_peak_belongs_to_its_class_and_a_pooled_one_to_any() -> None:
    annotated = truth(([0, 0, 3, 3], CAT, ""), ([4, 0, 8, 3], DOG, ""))
    cat, dog, between = (1, 1), (5, 1), (3, 1)
    assert inside(annotated, (*cat, CAT, FINE), (*cat, DOG, FINE), (*cat, POOLED, FINE)) == [True, False, True]
    assert inside(annotated, (*dog, CAT, FINE), (*dog, DOG, FINE), (*dog, POOLED, FINE)) == [False, True, True]
    assert inside(annotated, (*between, CAT, FINE), (*between, POOLED, FINE)) == [False, False]
    assert inside(annotated, (*cat, 7, FINE)) == [False]  # a label that was predicted wrongly


def test_a_mask_decides_and_a_box_stands_in_where_there_is_none() -> None:
    upper = np.zeros(HW, bool)
    upper[:2, :4] = True  # of a box that is four pixels high
    objects = ([0, 0, 4, 4], CAT, ""), ([4, 0, 8, 4], CAT, "")
    records = locate_peaks(
        truth(*objects, masks=[encode_rle(upper), None]),
        found((1, 1, CAT, FINE), (1, 3, CAT, FINE), (5, 3, CAT, FINE), (1, 5, CAT, FINE)),
    )
    assert records.inside.tolist() == [True, False, True, False]
    assert records.in_box.tolist() == [True, True, True, False]


def test_every_pixel_of_a_mask_is_as_it_decodes() -> None:
    mask = encode_rle(np.random.default_rng(0).random(HW) < 0.4)
    pixels = [(x, y) for y in range(HW[0]) for x in range(HW[1])]
    hits = inside(truth(([0, 0, 0, 0], CAT, ""), masks=[mask]), *((x, y, CAT, FINE) for x, y in pixels))
    assert (np.array(hits).reshape(HW) == decode_rle(mask, *HW)).all()


def test_a_peak_outside_of_the_image_lies_in_no_mask() -> None:
    full = truth(([0, 0, 8, 6], CAT, ""), masks=[encode_rle(np.ones(HW))])
    assert inside(full, (-1, 2, CAT, FINE), (8, 2, CAT, FINE), (3, -1, CAT, FINE), (3, 6, CAT, FINE)) == [False] * 4


def test_a_mask_of_another_size_is_refused() -> None:
    annotated = truth(([0, 0, 4, 4], CAT, ""), masks=[encode_rle(np.ones((5, 5)))])
    with pytest.raises(ValueError, match=r"a mask must cover height \* width = 6 \* 8 pixels, got 25"):
        locate_peaks(annotated, found((1, 1, CAT, FINE)))


def test_difficult_objects_and_crowds_are_hit_like_others_but_difficult_ones_alone_leave_their_class_out() -> None:
    annotated = truth(
        ([0, 0, 2, 2], CAT, ""), ([2, 0, 4, 2], CAT, "difficult"), ([4, 0, 6, 2], CAT, "crowd"),
        ([6, 0, 8, 2], DOG, "difficult"),
    )  # fmt: skip
    cats = locate_peaks(annotated, found((0, 0, CAT, FINE), (3, 0, CAT, FINE), (5, 0, CAT, FINE), (7, 0, CAT, FINE)))
    assert cats.inside.tolist() == [True, True, True, False]
    assert cats.counts.all()
    others = locate_peaks(annotated, found((7, 0, DOG, FINE), (0, 0, DOG, FINE), (7, 0, POOLED, FINE)))
    assert others.counts.tolist() == [False, False, True]


def test_shares_are_of_peaks_by_kind_and_counts_are_per_image() -> None:
    annotated = truth(([0, 0, 4, 4], CAT, ""), masks=[encode_rle(np.pad(np.ones((2, 4)), ((0, 4), (0, 4))))])
    first = locate_peaks(
        annotated, found((1, 1, CAT, COARSE), (1, 3, CAT, COARSE), (7, 5, CAT, COARSE), (1, 0, CAT, CROSS))
    )
    second = locate_peaks(truth(([0, 0, 4, 4], DOG, "difficult")), found((1, 1, DOG, FINE), (7, 5, CAT, CROSS)))
    third = locate_peaks(truth(), found())
    assert peak_metrics(concat_records([first, second, third])) == {
        "peaks_inside": pytest.approx(2 / 5),  # the fine peak is left out: its class is there as a difficult object
        "peaks_in_box": pytest.approx(3 / 5),
        "peaks_per_image": pytest.approx(6 / 3),
        "peaks_coarse_inside": pytest.approx(1 / 3),
        "peaks_coarse_in_box": pytest.approx(2 / 3),
        "peaks_coarse_per_image": pytest.approx(3 / 3),
        "peaks_fine_per_image": pytest.approx(1 / 3),
        "peaks_cross_inside": pytest.approx(1 / 2),
        "peaks_cross_in_box": pytest.approx(1 / 2),
        "peaks_cross_per_image": pytest.approx(2 / 3),
    }


def test_records_hold_their_peaks_in_order() -> None:
    parts = [locate_peaks(truth(), found((0, 0, CAT, kind))) for kind in (CROSS, COARSE)]
    joined = concat_records(parts)
    assert isinstance(joined, PeakRecords)
    assert (joined.kinds.tolist(), joined.num_images) == ([CROSS, COARSE], 2)
