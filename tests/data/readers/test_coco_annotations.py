"""Annotations of COCO json: boxes, segmentations, areas, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tests.data.readers.coco_files import image, note, write
from tests.data.readers.merged import rows
from weaksam.data.readers.coco import read_coco
from weaksam.data.remarks import BELOW_A_PIXEL
from weaksam.errors import DataError


def test_every_kind_of_segmentation_becomes_counts(tmp_path: Path) -> None:
    plain = {"size": [10, 20], "counts": [5, 10, 185]}
    packed = coco_mask.frPyObjects(plain, 10, 20)
    text = {"size": [10, 20], "counts": packed["counts"].decode()}
    square, other = [2, 2, 8, 2, 8, 6, 2, 6], [12, 2, 15, 2, 15, 6, 12, 6]
    kinds = [plain, text, [square], [square, other], [], None, [[1, 1, 2, 2]]]
    notes = [note(i, segmentation=kind) for i, kind in enumerate(kinds)]
    root = write(tmp_path, [image(1)], notes)
    masks = rows(read_coco(root, ["train"]))["1"]["masks"]
    assert masks[:2] == [packed["counts"]] * 2
    assert masks[4:] == [None, None, None]
    decoded = [coco_mask.decode({"size": [10, 20], "counts": counts}) for counts in masks[:4]]
    assert np.flatnonzero(decoded[0].T.ravel()).tolist() == list(range(5, 15))
    np.testing.assert_array_equal(np.argwhere(decoded[2]).min(0), [2, 2])
    assert decoded[2].sum() == 24
    assert decoded[3].sum() == 24 + 12
    assert rows(read_coco(root, ["train"], masks=False))["1"]["masks"] == [None] * 7


def test_boxes_without_area_or_beyond_the_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    boxes = [(0, 0, 20.5, 10), (5, 5, 0, 3), (5, 5, -2, 3), (15, 5, 100, 3), (30, 30, 4, 4)]
    root = write(tmp_path, [image(1)], [note(10 + i, category=90, box=box) for i, box in enumerate(boxes)])
    row = rows(read_coco(root, ["train"]))["1"]
    assert row["boxes"] == [[0, 0, 20, 10], [15, 5, 20, 8]]
    assert row["labels"] == [2]
    left_out = (
        "json: 3 boxes have no area inside their image and are left out: annotation 11, annotation 12, annotation 14"
    )
    assert left_out in caplog.text
    assert (
        "json: 1 boxes reach beyond their image and are cut at its border (is its size right?): annotation 13"
        in caplog.text
    )


def test_sizes_areas_and_crowds_may_be_text_or_decimals(tmp_path: Path) -> None:
    square = [[2, 2, 8, 2, 8, 6, 2, 6]]
    entry = image(1) | {"height": "10", "width": 20.0}
    notes = [note(1, iscrowd="0", area="24", segmentation=square), note(2, iscrowd=True, area=6.5)]
    row = rows(read_coco(write(tmp_path, [entry], notes), ["train"]))["1"]
    assert (row["height"], row["width"], row["areas"], row["crowd"]) == (10, 20, [24, 6.5], [False, True])
    assert row["masks"][0] is not None


@pytest.mark.parametrize(
    ("entry", "notes", "message"),
    [
        ({"width": "wide"}, [], "image 1: its width must be a whole number of pixels up to 1000000, got 'wide'"),
        ({}, [note(8, area="large")], "annotation 8: its area must be a number from 0, got 'large'"),
        ({}, [note(8, area=-1)], "annotation 8: its area must be a number from 0, got -1"),
        ({}, [note(8, iscrowd="no")], "annotation 8: its iscrowd must be 0 or 1, got 'no'"),
        ({}, [note(8, segmentation=[[2, 2, 8, 2, 8, 6, 2]])], "annotation 8: its polygon has 7 numbers, an odd count"),
        ({}, [note(8, segmentation=[[174522714, 1, 8, 2, 8, 6]])], "annotation 8: its polygon has the coordinate 1745"),
        ({}, [note(8, segmentation={"size": [10, 20], "counts": "b'T6d0'"})], "annotation 8: its RLE is the text of"),
    ],
)
def test_what_no_one_can_have_meant_is_named(tmp_path: Path, entry: dict, notes: list, message: str) -> None:
    root = write(tmp_path, [image(1) | entry], notes)
    with pytest.raises(DataError, match=rf"instances_train\.json: {message}"):
        read_coco(root, ["train"])


@pytest.mark.parametrize("masks", [True, False])
def test_an_annotation_without_a_box_has_that_around_its_segmentation_or_only_a_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, masks: bool
) -> None:
    rle = {"size": [10, 20], "counts": [5, 10, 185]}
    notes = [
        note(1, category=1, box=[], segmentation=[[4, 4, 14.5, 4, 14.5, 9, 4, 9]]),
        note(2, category=13, box=None, segmentation=[]),
        {"id": 3, "image_id": 1, "category_id": 90, "segmentation": rle},
    ]
    row = rows(read_coco(write(tmp_path, [image(1)], notes), ["train"], masks=masks))["1"]
    assert row["labels"] == [0, 1, 2]
    assert row["classes"] == [0, 2]
    assert row["boxes"] == [[4, 4, 14.5, 9], [0, 0, 2, 10]]  # runs go down columns of 10: 5 to 14
    assert [mask is not None for mask in row["masks"]] == [masks, masks]
    around = "json: 2 objects have no box: the box around their segmentation is taken: annotation 1, annotation 3"
    assert around in caplog.text
    assert "json: 1 objects have no box and no segmentation: only their label counts: annotation 2" in caplog.text


def test_an_annotation_that_is_there_twice_is_one_object(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notes = [note(1), note(2, box=(5, 5, 2, 2)), note(1), note(2, category=13)]
    row = rows(read_coco(write(tmp_path, [image(1)], notes), ["train"]))["1"]
    assert (row["boxes"], row["classes"]) == ([[1, 2, 4, 6], [5, 5, 7, 7], [1, 2, 4, 6]], [0, 0, 1])
    assert "1 annotations are there twice, all the same, and count once: annotation 1" in caplog.text
    assert "1 annotations have the id of another that differs, and count too" in caplog.text


@pytest.mark.parametrize("drawn", [{"size": [10, 20], "counts": [200]}, [[50, 50, 60, 50, 60, 60]]])
def test_a_mask_without_a_pixel_is_no_mask(tmp_path: Path, caplog: pytest.LogCaptureFixture, drawn: object) -> None:
    root = write(tmp_path, [image(1)], [note(4, segmentation=drawn), note(5)])
    row = rows(read_coco(root, ["train"]))["1"]
    assert (row["boxes"], row["masks"]) == ([[1, 2, 4, 6]] * 2, [None, None])
    assert "1 masks have no pixel inside their image and are left out: annotation 4" in caplog.text


def test_an_area_that_float32_cannot_hold_is_an_error(tmp_path: Path) -> None:
    root = write(tmp_path, [image(1)], [note(4, area=1e300)])
    with pytest.raises(DataError, match=r"annotation 4: its area must be a number from 0, got 1e\+300"):
        read_coco(root, ["train"])


def test_boxes_below_a_pixel_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write(tmp_path, [image(1)], [note(4, box=(0.1, 0.2, 0.5, 0.25)), note(5, box=(0, 0, 1, 1)), note(6)])
    assert len(rows(read_coco(root, ["train"]))["1"]["boxes"]) == 3
    assert f"json: 1 {BELOW_A_PIXEL}: annotation 4" in caplog.text
