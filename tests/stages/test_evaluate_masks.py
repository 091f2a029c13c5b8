"""Evaluation of masks, of detections and of pseudo ground truth, as a stage."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.stages.evaluations import DETECTED, MASKED, SEGMENTED, SIZE, TRUTH, steps
from weaksam.core import storage
from weaksam.errors import DataError
from weaksam.stages import evaluate


@pytest.mark.parametrize("protocol", ["voc", "coco"])
def test_masks_are_compared_only_where_there_are_some(tmp_path: Path, protocol: str) -> None:
    # image b holds a difficult object alone, image c none
    with pytest.raises(
        DataError, match=r"kind segm: the dataset has no masks in 1 of 2 images with objects, e\.g\. a: "
    ):
        evaluate.run(steps(tmp_path, DETECTED, protocol=protocol, kind="segm"))
    with pytest.raises(DataError, match="step detections has no masks: judge a detector that makes some, or use kind"):
        evaluate.run(steps(tmp_path / "b", DETECTED, annotated=SEGMENTED, protocol=protocol, kind="segm"))


def test_pseudo_masks_are_compared_only_where_there_are_some(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"kind segm: the dataset has no masks in 1 of 2 images"):
        evaluate.run(steps(tmp_path, MASKED, table_kind="pgt", kind="segm"))
    with pytest.raises(DataError, match="step pgt has no masks: judge a pseudo_masks step, or use kind bbox"):
        evaluate.run(steps(tmp_path / "b", DETECTED, annotated=SEGMENTED, table_kind="pgt", kind="segm"))


def test_masks_of_another_size_than_the_ground_truths_are_refused(tmp_path: Path) -> None:
    smaller = [{**MASKED[0], "height": SIZE[0] // 2}, *MASKED[1:]]
    with pytest.raises(DataError, match="masks of image a do not all have the 20 x 50 pixels that step detections sta"):
        evaluate.run(steps(tmp_path, smaller, annotated=SEGMENTED, kind="segm"))


def test_masks_of_detections_are_judged_as_voc12_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    step = steps(tmp_path, MASKED, annotated=SEGMENTED, kind="segm")
    outcome = evaluate.run(step)
    report = storage.read_json(storage.join(step.folder, "metrics.json"))
    # image b failed: one of two cats is found, difficult or not; the void cat of image a does not count
    assert (report["task"], report["num_images"], report["num_objects"]) == ("segmentation", 3, 3)
    assert report["metrics"] == pytest.approx(
        {"AP25": (51 / 101 + 1) / 2, "AP50": (51 / 101 + 1) / 2, "AP70": 51 / 101 / 2, "AP75": 51 / 101 / 2}
    )
    assert outcome.summary == "AP25 75.2 %, AP50 75.2 %, AP70 25.2 %, AP75 25.2 %"
    rows = pq.read_table(storage.join(step.folder, "per_class.parquet")).to_pylist()
    assert [(row["class"], row["AP50"], row["AP75"]) for row in rows] == [
        ("cat", pytest.approx(51 / 101), pytest.approx(51 / 101)),
        ("dog", pytest.approx(1.0), 0.0),
    ]
    assert "steps.recall: kind segm: 1 objects without a mask do not count" in caplog.text


def test_no_mask_found_is_a_figure_too(tmp_path: Path) -> None:
    nothing = [{"image_id": row["image_id"], "status": "ok", "height": 40, "width": 50, "boxes": []} for row in TRUTH]
    step = steps(tmp_path, nothing, others=(MASKED,), annotated=SEGMENTED, kind="segm")
    evaluate.run(step)
    found = storage.read_json(storage.join(step.folder, "metrics.json"))["metrics"]
    assert found["AP75"] == pytest.approx(51 / 101 / 4)
    assert found["AP75_std"] == pytest.approx(51 / 101 / 2 / 2**0.5)
    rows = pq.read_table(storage.join(step.folder, "per_class.parquet")).to_pylist()
    assert [row["AP25"] for row in rows] == [0.0, 0.0]


def test_pseudo_masks_are_told_by_their_iou(tmp_path: Path) -> None:
    step = steps(tmp_path, MASKED, annotated=SEGMENTED, table_kind="pgt", kind="segm")
    outcome = evaluate.run(step)
    report = storage.read_json(storage.join(step.folder, "metrics.json"))
    # the void cat of image a and the difficult one of image b count neither way
    assert (report["task"], report["num_objects"]) == ("pgt", 2)
    assert report["metrics"] == pytest.approx(
        {
            "mask_iou": (1 + 0.6) / 2,
            "mask_iou_of_objects": (1 + 0.6) / 2,
            "precision@0.5": 1.0,
            "recall@0.5": 1.0,
            "precision@0.75": 0.5,
            "recall@0.75": 0.5,
            "boxes_per_image": 1.0,
        }
    )
    assert outcome.summary.startswith("mask_iou 80.0 %, precision@0.5 100.0 %")
    rows = {row["class"]: row for row in pq.read_table(storage.join(step.folder, "per_class.parquet")).to_pylist()}
    assert (rows["dog"]["mask_iou"], rows["dog"]["precision@0.75"]) == (pytest.approx(0.6), 0.0)
    assert (rows["cat"]["num_boxes"], rows["cat"]["num_objects"], rows["cat"]["mask_iou_of_objects"]) == (2, 1, 1.0)
