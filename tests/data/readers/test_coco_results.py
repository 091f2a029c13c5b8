"""Results of other programs: by the dataset's own category ids, boxes inside their images, every fault by its entry."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weaksam.data.readers.coco_results import read_results
from weaksam.data.remarks import BELOW_A_PIXEL, NO_AREA, OUTSIDE
from weaksam.errors import DataError
from weaksam.ops.rle import decode_rle

SIZES = {"a": (48, 64), "b": None}


def entry(image_id: object = "a", category: object = 1, box: object = (4, 4, 20, 20), **more: Any) -> dict[str, Any]:
    box = list(box) if isinstance(box, tuple) else box
    return {"image_id": image_id, "category_id": category, "bbox": box, "score": 0.9} | more


def read(folder: Path, entries: object, ids: list[int] | None = None, **more: Any) -> dict[str, dict]:
    path = folder / "results.json"
    path.write_text(json.dumps(entries))
    table = read_results(str(path), ["a", "b"], ["head", "helmet"], category_ids=ids, sizes=SIZES, **more)
    return {row["image_id"]: row for row in table.to_pylist()}


def test_category_ids_are_the_datasets_own(tmp_path: Path) -> None:
    entries = [entry(category=0), entry(category=7.0, score=0.5)]
    assert read(tmp_path, entries, [0, 7])["a"]["classes"] == [0, 1]
    assert read(tmp_path, entries, [7, 0])["a"]["classes"] == [1, 0]
    assert read(tmp_path, [entry(category=1), entry(category=2, score=0.5)])["a"]["classes"] == [0, 1]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            [entry(category=7), entry(category=1), entry(category=2)],
            r"json: entry 1: its category_id 1 is none of the dataset's: the results have 1, 2, 7, the dataset has "
            r"0 head, 7 helmet: give results with the dataset's own category ids",
        ),
        ([entry("z", 3), entry(category=0)], "entry 0: its category_id 3 is none of the dataset's"),
        ([entry(category="7")], "entry 0: its category_id '7' is none of the dataset's: the results have '7', the"),
        ([entry(category=[7])], r"entry 0: its category_id \[7\] is none of the dataset's"),
    ],
)
def test_ids_that_the_dataset_does_not_have_are_an_error_that_names_both(
    tmp_path: Path, entries: list, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, entries, [0, 7])


def test_boxes_are_cut_at_the_border_or_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    boxes = [(500, 500, 20, 20), (30, 30, -20, -20), (20, 20, 0, 0), (-5, 40, 30, 30), (1, 2, 3, 4)]
    entries = [entry(box=box, score=0.9 - index / 10) for index, box in enumerate(boxes)]
    found = read(tmp_path, [*entries, entry("b", box=(500, -3, 20, 20)), entry("z")])
    assert found["a"]["boxes"] == [[0, 40, 25, 48], [1, 2, 4, 6]]
    assert np.allclose(found["a"]["scores"], [0.6, 0.5])
    assert (found["a"]["height"], found["a"]["width"]) == (48, 64)
    assert found["b"]["boxes"] == [[500, 0, 520, 17]]  # of an image of unknown size only two borders are known
    assert f"json: 3 {NO_AREA}: entry 0, entry 1, entry 2" in caplog.text
    assert f"json: 2 {OUTSIDE}: entry 3, entry 5" in caplog.text
    assert "json: 1 results are of images that are not asked for and are left out: entry 6 (z)" in caplog.text


def test_run_lengths_of_either_kind_are_read_with_and_without_a_box(tmp_path: Path) -> None:
    rle = {"size": [48, 64], "counts": [100, 20, 2952]}
    plain = {key: value for key, value in entry(segmentation=rle).items() if key != "bbox"}
    found = read(tmp_path, [plain, entry("b", box=None, segmentation=rle), entry(score=0.1)])
    assert found["a"]["boxes"] == [[2, 4, 3, 24], [4, 4, 24, 24]]
    first, second = found["a"]["masks"]
    assert second is None
    mask = decode_rle(first, 48, 64)
    assert (mask.sum(), mask[4:24, 2].all()) == (20, True)
    assert (found["b"]["masks"], found["b"]["height"], found["b"]["width"]) == ([first], 48, 64)
    polygons = read(tmp_path, [entry(segmentation=[[2, 4, 3, 4, 3, 24, 2, 24]])])["a"]
    assert polygons["masks"] == [first]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [math.nan, 4, 20, 20]}, "entry 1: its bbox must be 4 finite numbers"),
        ({"bbox": [1, 2, 3]}, "entry 1: its bbox must be 4 finite numbers"),
        ({"score": math.nan}, "entry 1: its score must be a finite number, got nan"),
        ({"score": "0.5"}, "entry 1: its score must be a finite number, got '0.5'"),
        ({"score": None}, r"entry 1 is no detection \(it has no score\)"),
        ({"bbox": []}, r"entry 1 is no detection \(it has no bbox or segmentation\)"),
        ({"segmentation": {"size": [48, 64], "counts": "T6d0l0"}}, "entry 1: its RLE covers .* pixels, its image has"),
        ({"segmentation": {"size": [64, 48], "counts": [3072]}}, "entry 1: its RLE is of size .* its image of"),
        ({"segmentation": [[1e9, 4, 3, 4, 3, 24]]}, "entry 1: its polygon has the coordinate 1000000000"),
        ({"segmentation": [[1, 4, 3, 4, 3]]}, "entry 1: its polygon has 5 numbers, an odd count"),
        ({"image_id": "b", "segmentation": [[1, 4, 3, 4, 3, 24]]}, "entry 1: .* polygons need an image of known size"),
    ],
)
def test_faults_are_named_by_their_entry(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=rf"results\.json: {message}"):
        read(tmp_path, [entry(), entry() | changes])


def test_masks_of_one_image_have_one_size(tmp_path: Path) -> None:
    masks = [{"size": size, "counts": [size[0] * size[1]]} for size in ([48, 64], [50, 64])]
    with pytest.raises(DataError, match=r"entry 1: its RLE is of size \[50, 64\], that of another entry of image b of"):
        read(tmp_path, [entry("b", segmentation=mask) for mask in masks])


@pytest.mark.parametrize("content", ['{"images": []}', "[", "[" * 100_000, "[1" + "0" * 5000 + "]", "[7]"])
def test_files_that_are_no_results_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(
        DataError, match=r"results\.json: (cannot be read as|a COCO results json is a list|entry 0 is no)"
    ):
        read_results(str(tmp_path / "results.json"), ["a"], ["cat"], category_ids=None)


@pytest.mark.parametrize(
    "drawn", [[[1, 1, 5, 5]], [[]], {"size": [48, 64], "counts": [48 * 64]}, [[90, 1, 99, 1, 99, 9]]]
)
def test_a_segmentation_without_a_pixel_leaves_the_box(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, drawn: object
) -> None:
    without = {key: value for key, value in entry(segmentation=drawn).items() if key != "bbox"}
    row = read(tmp_path, [entry(segmentation=drawn), without])["a"]
    assert (row["boxes"], row["masks"]) == ([[4, 4, 24, 24]], None)
    assert "and are left out: entry 0" in caplog.text
    assert "1 boxes have no area inside their image and are left out: entry 1" in caplog.text


def test_polygons_need_an_image_of_known_size(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="entry 0: its segmentation is no RLE, and polygons need an image of known size"
    ):
        read(tmp_path, [entry("b", segmentation=[[1, 1, 9, 1, 9, 9]])])


def test_image_ids_with_decimals_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([entry(7.0)]))
    assert read_results(str(path), ["7"], ["head"], category_ids=None).column("classes").to_pylist() == [[0]]


def test_a_score_that_is_null_is_the_default_one(tmp_path: Path) -> None:
    assert read(tmp_path, [entry(score=None), entry(score=0.75)], default_score=0.5)["a"]["scores"] == [0.75, 0.5]
    with pytest.raises(DataError, match="it has no score"):
        read(tmp_path, [entry(score=None)])


def test_a_score_that_float32_cannot_hold_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"entry 0: its score must be a finite number, got 1e\+300"):
        read(tmp_path, [entry(score=1e300)])


def test_of_no_image_there_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([entry()]))
    assert read_results(str(path), [], ["head"], category_ids=None).num_rows == 0


def test_shares_of_width_and_height_are_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = read(tmp_path, [entry(box=(0.25, 0.25, 0.5, 0.5)), entry(score=0.5)])["a"]
    assert row["boxes"] == [[0.25, 0.25, 0.75, 0.75], [4, 4, 24, 24]]
    assert f"json: 1 {BELOW_A_PIXEL}: entry 0" in caplog.text
