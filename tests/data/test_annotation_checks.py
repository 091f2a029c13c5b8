"""What comes from outside becomes boxes with area inside the image and whole masks, or a DataError that names it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from weaksam.data.annotation_checks import (
    MAX_SIDE,
    fit_boxes,
    has_area,
    read_polygons,
    read_rle,
    read_segmentation,
    read_size,
    read_xywh,
)
from weaksam.data.readers.coco_annotations import read_objects
from weaksam.data.remarks import FEW_CORNERS, NO_AREA, NO_BOX, OUTSIDE, Remarks
from weaksam.errors import DataError
from weaksam.ops.rle import encode_rle, rle_to_runs

SIZE = (48, 64)


def segmentation(value: Any, size: tuple[int, int] | None = SIZE) -> tuple[Any, Any, Any]:
    return read_segmentation(value, size, "f.json: annotation 7", Remarks("f.json"), "annotation 7")


def packed(runs: list[int], size: tuple[int, int] = SIZE) -> str:
    rle: Any = coco_mask.frPyObjects({"size": list(size), "counts": runs}, *size)
    return rle["counts"].decode()


# --- sizes and boxes


@pytest.mark.parametrize(
    ("height", "width", "found"),
    [(48, 64, SIZE), ("48", 64.0, SIZE), (0, 64, None), (None, 64, None), ("", "", None), (-1, -1, None)],
)
def test_sizes_may_be_text_and_may_be_missing(height: object, width: object, found: object) -> None:
    assert read_size(height, width, "f.json: image 1") == found


@pytest.mark.parametrize("width", [48.5, "wide", math.nan, [4], True, 10**400, MAX_SIDE + 1])
def test_a_size_that_is_none_is_named(width: object) -> None:
    with pytest.raises(DataError, match=r"f\.json: image 1: its width must be a whole number of pixels up to 1000000"):
        read_size(48, width, "f.json: image 1")


@pytest.mark.parametrize(
    "box", [None, [1, 2, 3], [1, 2, 3, None], [1, 2, 3, "4"], [1, 2, math.nan, 4], [1, 2, 3, True]]
)
def test_a_box_that_is_none_is_named(box: object) -> None:
    with pytest.raises(DataError, match=r"f\.json: entry 3: its bbox must be 4 finite numbers \(x, y, width, height\)"):
        read_xywh(box, "f.json: entry 3")


def test_boxes_are_finite_whatever_is_known_of_the_image() -> None:
    boxes = np.array([[-1e308, 0, np.inf, 5], [1, 1, 1, 5], [1, 1, 1 + 1e-30, 5], [3e6, 0, 4e6, 5], [5, 5, 2, 9]])
    for size in (SIZE, None):
        cut, keep, outside = fit_boxes(boxes, size)
        assert keep.tolist() == [True, False, False, False, False]
        assert outside.tolist() == [True, False, False, True, False]
        assert cut[0].tolist() == [0, 0, size[1] if size else MAX_SIDE, 5]
        assert np.isfinite(cut).all()
    with pytest.raises(ValueError, match="boxes must not have NaN"):
        fit_boxes(np.array([[0, 0, np.nan, 1]]), SIZE)


def test_an_area_that_float32_cannot_tell_from_none_is_none() -> None:
    boxes = np.array([[0, 0, 1e-30, 1e-30], [0, 0, 1e-3, 1e-3], [0, 0, np.nan, 1], [0, 0, np.inf, 1]], np.float32)
    assert has_area(boxes).tolist() == [False, True, False, False]


def test_a_warning_a_kind_counts_and_names_the_first_ten(caplog: pytest.LogCaptureFixture) -> None:
    remarks = Remarks("f.json")
    boxes = np.array([[0, 0, 0, 5], [0, 0, 5, 5]])
    remarks.add_boxes(["entry 1", "entry 2"], boxes, np.array([False, True]), np.array([True, True]))
    for index in range(12):
        remarks.add(NO_BOX, f"entry {index}")
    remarks.log()
    assert caplog.messages[0] == f"f.json: 1 {NO_AREA}: entry 1"
    assert caplog.messages[1] == f"f.json: 1 {OUTSIDE}: entry 2"
    assert caplog.messages[2].endswith("entry 8, entry 9 and 2 more")


# --- RLE


@pytest.mark.parametrize("runs", [[100, 20, 2952], [0, 3072], [3072], [100, 0, 20, 0, 5, 20, 0, 2927], [0, 1, 3071, 0]])
def test_run_lengths_of_either_kind_are_the_same_mask(runs: list[int]) -> None:
    flat = np.repeat(np.arange(len(runs)) % 2, runs)
    expected = encode_rle(flat.reshape(SIZE[1], SIZE[0]).T)  # the bytes of pycocotools, which has no empty runs
    for counts in (runs, [float(run) for run in runs], packed(runs), packed(runs).encode()):
        assert read_rle({"size": list(SIZE), "counts": counts}, SIZE, "w") == (expected, SIZE)


def test_the_box_around_run_lengths() -> None:
    box, mask, size = segmentation({"size": list(SIZE), "counts": [100, 20, 2952]}, None)
    assert (box, size) == ([2, 4, 3, 24], SIZE)  # pixels 100 to 119 of columns of 48
    assert mask == packed([100, 20, 2952]).encode()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"counts": "b'T6d0l0000000lk1'"}, r"is the text of a Python bytes object .* write counts\.decode\(\)"),
        ({"counts": "T6d0l0000000lk"}, "its RLE is damaged, these are no compressed counts"),  # ends in a number
        ({"counts": "T6 d0"}, "its RLE is damaged, these are no compressed counts"),
        ({"counts": "T6é"}, "its RLE is damaged, these are no compressed counts"),
        ({"counts": "\ud800"}, "its RLE is damaged, these are no compressed counts"),
        ({"counts": "o" * 40 + "0"}, "its RLE is damaged, these are no compressed counts"),  # a number of 205 bits
        ({"counts": "O"}, "its RLE is damaged, it has a run of -1 pixels"),
        ({"counts": "T6d0"}, r"its RLE covers \d+ pixels, its image has 3072"),
        ({"counts": ""}, "its RLE covers 0 pixels, its image has 3072"),
        ({"counts": []}, "its RLE covers 0 pixels, its image has 3072"),
        ({"counts": [3000, 71]}, "its RLE covers 3071 pixels, its image has 3072"),
        ({"counts": [4000, -928]}, "its RLE is damaged, it has a run of -928 pixels"),
        ({"counts": [3071.5, 0.5]}, "its RLE has runs that are no whole numbers of pixels"),
        ({"counts": [math.nan, 3072]}, "its RLE has runs that are no whole numbers of pixels"),
        ({"counts": [10**400]}, "its RLE has runs that are no whole numbers of pixels"),
        ({"counts": ["3072"]}, "its RLE has runs that are no whole numbers of pixels"),
        ({"counts": [[3072]]}, "its RLE has runs that are no whole numbers of pixels"),
        ({"counts": [3072], "size": [64, 48]}, r"its RLE is of size \[64, 48\], its image of \[48, 64\]"),
        ({"counts": [0], "size": [0, 64]}, r"its RLE is of size \[0, 64\]"),
        ({"counts": [0], "size": [10**30, 64]}, "RLE: its height must be a whole number of pixels"),
        ({"counts": [0], "size": 5}, "its segmentation is neither polygons nor RLE"),
        ({"counts": None}, "its segmentation is neither polygons nor RLE"),
    ],
)
def test_damaged_run_lengths_are_named(value: dict, message: str) -> None:
    with pytest.raises(DataError, match=rf"f\.json: annotation 7: .*{message}"):
        segmentation({"size": list(SIZE)} | value)


def test_a_mask_has_no_more_pixels_than_pycocotools_can_count() -> None:
    with pytest.raises(DataError, match=r"more than a mask can have \(4294967295\)"):
        read_rle({"size": [70_000, 70_000], "counts": [2_450_000_000, 2_450_000_000]}, None, "w")


# --- polygons


def test_polygons_become_one_mask_and_the_box_around_them() -> None:
    remarks = Remarks("f.json")
    parts = [[4, 4, 24, 4, 24, 24, 4, 24], [30, 30, 32.5, 30, 32, 33], [1, 1, 2, 2], []]
    box, mask, size = read_segmentation(parts, SIZE, "w", remarks, "annotation 7")
    assert (box, size) == ([4, 4, 32.5, 33], SIZE)
    merged: Any = coco_mask.merge(coco_mask.frPyObjects(parts[:2], *SIZE))  # type: ignore[arg-type]
    assert mask == merged["counts"]
    assert remarks.entries == {FEW_CORNERS: ["annotation 7"] * 2}
    assert segmentation(parts[2:]) == segmentation([]) == segmentation(None) == (None, None, None)
    assert segmentation(parts[:1], None) == ([4, 4, 24, 24], None, None)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[4, 4, 24, 4, 24, 24, 4]], "its polygon has 7 numbers, an odd count: one is missing"),
        ([[174522714, 10, 14, 3, 14, 9]], r"its polygon has the coordinate 174522714, its image is 48 x 64"),
        ([[4, 4, 24, 4, 24, -300]], r"its polygon has the coordinate -300, its image is 48 x 64"),
        ([[0, 0, 64, 48] * 500], r"its polygon of 1000 corners is \d+ pixels long, its image is 48 x 64"),
        ([[1, 2, 3, 4, 5, math.inf]], "its segmentation is neither polygons nor RLE"),
        ([[1, 2, 3, 4, 5, 10**400]], "its segmentation is neither polygons nor RLE"),
        ([["a"] * 6], "its segmentation is neither polygons nor RLE"),
        ([[[1, 2], [3, 4], [5]]], "its segmentation is neither polygons nor RLE"),
        ([1, 2, 3, 4, 5, 6], "its segmentation is neither polygons nor RLE"),
        ("1 2 3", "its segmentation is neither polygons nor RLE"),
    ],
)
def test_polygons_that_are_none_are_named(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"f\.json: annotation 7: {message}"):
        segmentation(value)


def test_without_a_size_polygons_have_a_bound_too() -> None:
    assert len(read_polygons([[0, 0, 9, 9, 500, 4]], None, "w")) == 1
    with pytest.raises(DataError, match="its polygon has the coordinate 174522714"):
        read_polygons([[174522714, 10, 14, 3, 14, 9]], None, "w")


# --- anything at all

_anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-10, 100),
    st.sampled_from([10**9, -(10**9), 10**400, 2**63, math.nan, math.inf, 1e308, -1e308, 1e-300, -0.0]),
    st.floats(-10, 100),
    st.text(max_size=3),
)
_number = st.one_of(st.integers(-5, 70), st.floats(-5, 70), _anything)
_box = st.one_of(_anything, st.lists(_number, max_size=5), st.lists(st.integers(-5, 70), min_size=4, max_size=4))
_counts = st.one_of(
    st.lists(_number, max_size=4),
    st.text("0123456789:;OPQo_`hijklmn", max_size=8),
    st.lists(st.integers(0, 300), max_size=4).map(lambda runs: [*runs, 3072 - sum(runs)]),
    _anything,
)
_rle = st.fixed_dictionaries({"size": st.one_of(st.just([48, 64]), st.lists(_number, max_size=3)), "counts": _counts})
_segmentation = st.one_of(_anything, _rle, st.lists(st.lists(_number, max_size=9), max_size=3))
_annotation = st.fixed_dictionaries(
    {"image_id": st.just(1), "category_id": st.just(1)},
    optional={
        "bbox": _box,
        "segmentation": _segmentation,
        "area": _anything,
        "iscrowd": st.one_of(st.sampled_from([0, 1]), _anything),
    },
)
_size = st.one_of(st.tuples(_number, _number), st.just(SIZE))


@given(annotations=st.lists(_annotation, max_size=3), sides=_size)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_annotation_is_an_object_in_its_image_or_an_error_that_names_it(
    annotations: list[dict], sides: tuple
) -> None:
    named = [{"id": 100 + i} | annotation for i, annotation in enumerate(annotations)]
    try:
        size = read_size(*sides, where="f.json: image 1")
        objects = read_objects(named, {1: "cat"}, size, "f.json", True, Remarks("f.json"))
    except DataError as error:
        message = str(error)
    else:
        message = ""
        height, width = size or (MAX_SIDE, MAX_SIDE)
        assert has_area(objects.boxes).all()
        assert ((objects.boxes >= 0) & (objects.boxes <= [width, height, width, height])).all()
        assert len(objects.boxes) == len(objects.names) == len(objects.masks) <= len(named)
        assert all(mask is None or rle_to_runs(mask).sum() == height * width for mask in objects.masks)
    assert not message or message.startswith(("f.json: annotation 10", "f.json: image 1"))
