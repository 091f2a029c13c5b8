"""Evaluate joins ground truth and proposals by image, and says so when it cannot."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from testing.places import SHARED_DATA
from tests.stages.evaluations import DETECTED, MASKED, SEGMENTED, SIZE, TRUTH, mask_of, steps
from weaksam import pipeline
from weaksam.core import storage
from weaksam.data.readers.coco_results import read_results
from weaksam.errors import DataError
from weaksam.ops.coco_metrics import NAMES
from weaksam.stages import evaluate

FOUND = [
    {
        "image_id": "a",
        "status": "ok",
        "boxes": [[0, 0, 10, 8], [50, 50, 60, 60]],
        "predicted_iou": [0.9, 0.8],
        "source": [0, 0],
    },
    {"image_id": "b", "status": "unreadable"},
    {"image_id": "c", "status": "ok", "boxes": [], "predicted_iou": [], "source": []},
]


def test_recall_counts_every_image_also_the_failed_one(tmp_path: Path) -> None:
    step = steps(tmp_path, FOUND)
    outcome = evaluate.run(step)
    report = storage.read_json(storage.join(step.folder, "metrics.json"))
    assert (report["task"], report["num_images"], report["num_objects"]) == ("proposals", 3, 2)
    assert report["metrics"]["recall@0.5"] == 0.5
    assert report["metrics"]["recall@0.9"] == 0.0
    assert report["metrics"]["boxes_per_image"] == pytest.approx(2 / 3)
    assert outcome.rows == 3
    rows = pq.read_table(storage.join(step.folder, "per_class.parquet")).to_pylist()
    assert {row["class"]: row["recall@0.5"] for row in rows} == {"cat": 1.0, "dog": 0.0}


def prompted(points: list[tuple], **size: int) -> list[dict]:
    """FOUND, where points (x, y, label, kind) prompted SAM in image a."""
    listed = [{"x": x, "y": y, "label": label, "score": 0.9, "kind": kind} for x, y, label, kind in points]
    return [{**FOUND[0], "height": SIZE[0], "width": SIZE[1], **size, "points": listed}, FOUND[1], FOUND[2]]


def test_peaks_are_located_by_kind_in_masks_and_in_boxes(tmp_path: Path) -> None:
    upper_half = [{**SEGMENTED[0], "masks": [mask_of(0, 0, 10, 5), None, None]}, *SEGMENTED[1:]]
    # coarse: in the mask of a cat, in its box alone, on a dog; fine: in the box of a dog without a mask; cross: pooled
    points = [(4, 4, 0, 1), (4, 5, 0, 1), (25, 25, 0, 1), (25, 29, 1, 2), (25, 30, -1, 3), (45, 5, -1, 3)]
    step = steps(tmp_path, prompted(points), annotated=upper_half)
    outcome = evaluate.run(step)
    figures = storage.read_json(storage.join(step.folder, "metrics.json"))["metrics"]
    assert {key: value for key, value in figures.items() if key.startswith("peaks")} == {
        "peaks_inside": pytest.approx(3 / 6),
        "peaks_in_box": pytest.approx(4 / 6),
        "peaks_per_image": pytest.approx(6 / 3),
        "peaks_coarse_inside": pytest.approx(1 / 3),
        "peaks_coarse_in_box": pytest.approx(2 / 3),
        "peaks_coarse_per_image": pytest.approx(3 / 3),
        "peaks_fine_inside": 1.0,
        "peaks_fine_in_box": 1.0,
        "peaks_fine_per_image": pytest.approx(1 / 3),
        "peaks_cross_inside": 0.5,  # the object that is hit is difficult
        "peaks_cross_in_box": 0.5,
        "peaks_cross_per_image": pytest.approx(2 / 3),
    }
    assert "peaks_inside 50.0 %, peaks_coarse_inside 33.3 %, peaks_fine_inside 100.0 %" in outcome.summary


def test_without_a_classifier_there_are_no_figures_of_peaks(tmp_path: Path) -> None:
    step = steps(tmp_path, FOUND, annotated=SEGMENTED)
    outcome = evaluate.run(step)
    figures = storage.read_json(storage.join(step.folder, "metrics.json"))["metrics"]
    assert not [key for key in figures if "peaks" in key]
    assert "peaks" not in outcome.summary


def test_peaks_in_images_of_another_size_than_the_masks_are_refused(tmp_path: Path) -> None:
    step = steps(tmp_path, prompted([(4, 4, 0, 1)], height=41), annotated=SEGMENTED)
    with pytest.raises(DataError, match=r"steps\.recall: image a of step proposals: a mask must cover .* 41 \* 50 pix"):
        evaluate.run(step)


def test_difficult_objects_count_only_when_asked(tmp_path: Path) -> None:
    step = steps(tmp_path, FOUND, include_difficult=True)
    evaluate.run(step)
    report = storage.read_json(storage.join(step.folder, "metrics.json"))
    assert report["metrics"]["recall@0.5"] == pytest.approx(1 / 3)


def test_pseudo_ground_truth_is_told_by_precision_and_recall(tmp_path: Path) -> None:
    chosen = [
        {"image_id": "a", "boxes": [[0, 0, 10, 9], [1, 0, 11, 10], [20, 20, 30, 28]], "classes": [0, 0, 1]},
        {
            "image_id": "b",
            "boxes": [[0, 0, 10, 10], [40, 40, 50, 50]],
            "classes": [0, 0],
        },  # a difficult object, nothing
        {"image_id": "c", "boxes": [], "classes": []},
    ]
    chosen = [{**row, "status": "ok", "scores": [0.9 - 0.1 * i for i in range(len(row["boxes"]))]} for row in chosen]
    step = steps(tmp_path, chosen, table_kind="pgt")
    outcome = evaluate.run(step)
    report = storage.read_json(storage.join(step.folder, "metrics.json"))
    assert report["task"] == "pgt"
    assert report["metrics"] == {
        "precision@0.5": 0.5,  # of four boxes that count, the second cat of image a and the second of b are wrong
        "recall@0.5": 1.0,
        "precision@0.75": 0.5,
        "recall@0.75": 1.0,
        "boxes_per_image": pytest.approx(5 / 3),
    }
    assert outcome.summary.startswith("precision@0.5 50.0 %, recall@0.5 100.0 %")
    rows = {row["class"]: row for row in pq.read_table(storage.join(step.folder, "per_class.parquet")).to_pylist()}
    assert (rows["cat"]["num_boxes"], rows["cat"]["precision@0.5"]) == (4, pytest.approx(1 / 3))
    assert (rows["dog"]["precision@0.75"], rows["dog"]["recall@0.75"]) == (1.0, 1.0)


def test_proposals_of_another_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"step proposals has no row for 1 of 3 images, e\.g\. c: set the same split"):
        evaluate.run(steps(tmp_path, FOUND[:2]))


def test_a_dataset_without_boxes_is_named(tmp_path: Path) -> None:
    step = steps(tmp_path, FOUND)
    for part in (tmp_path / "images" / "ground_truth").iterdir():
        part.unlink()
    with pytest.raises(DataError, match=r"the dataset of step images has no boxes"):
        evaluate.run(step)


def test_detections_are_judged_by_ap_and_corloc(tmp_path: Path) -> None:
    step = steps(tmp_path, DETECTED)
    outcome = evaluate.run(step)
    report = storage.read_json(storage.join(step.folder, "metrics.json"))
    assert (report["task"], report["num_images"], report["num_objects"]) == ("detection", 3, 2)
    # the dog is missed; the cat of image b is difficult, yet one of two cats to be localised
    assert report["metrics"] == {"AP50": 0.5, "AP75": 0.5, "CorLoc": 0.25}
    assert "AP50 50.0 %" in outcome.summary
    rows = pq.read_table(storage.join(step.folder, "per_class.parquet")).to_pylist()
    assert [(row["class"], row["AP50"], row["num_detections"]) for row in rows] == [("cat", 1.0, 2), ("dog", 0.0, 0)]


def test_corloc_may_leave_out_images_whose_objects_are_all_difficult(tmp_path: Path) -> None:
    evaluate.run(step := steps(tmp_path, DETECTED, corloc="not_difficult"))
    report = storage.read_json(storage.join(step.folder, "metrics.json"))
    assert report["metrics"] == {"AP50": 0.5, "AP75": 0.5, "CorLoc": 0.5}


def test_several_seeds_give_mean_and_standard_deviation(tmp_path: Path) -> None:
    nothing = [{"image_id": row["image_id"], "status": "ok", "boxes": []} for row in TRUTH]
    step = steps(tmp_path, DETECTED, others=(nothing,))
    evaluate.run(step)
    found = storage.read_json(storage.join(step.folder, "metrics.json"))["metrics"]
    assert found["AP50"] == 0.25
    assert found["AP50_std"] == pytest.approx(0.5 / 2**0.5)


def test_coco_figures_ignore_what_voc_calls_difficult_no_more(tmp_path: Path) -> None:
    step = steps(tmp_path, DETECTED, protocol="coco")
    evaluate.run(step)
    found = storage.read_json(storage.join(step.folder, "metrics.json"))["metrics"]
    # cats: one of two found at every threshold, at precision 1: 51 of 101 recall points; dogs: none
    assert found["AP50"] == pytest.approx(51 / 101 / 2)
    assert found["AR@100"] == pytest.approx(0.25)


def test_one_thing_is_judged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exactly one of proposals, detections and pgt must be set, got none"):
        evaluate.EvaluateConfig(images="images")
    with pytest.raises(ValueError, match="got proposals, detections"):
        evaluate.EvaluateConfig(images="images", proposals="a", detections="b")
    with pytest.raises(ValueError, match="pgt is judged by protocol voc"):
        evaluate.EvaluateConfig(images="images", pgt="a", protocol="coco")
    with pytest.raises(ValueError, match="kind segm is for detections and pgt: proposals are judged by their"):
        evaluate.EvaluateConfig(images="images", proposals="a", kind="segm")
    with pytest.raises(ValueError, match="eleven_point and reference_rules are for kind bbox"):
        evaluate.EvaluateConfig(images="images", detections="a", kind="segm", eleven_point=True)


def test_results_of_other_images_or_classes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    entry = {"image_id": 7, "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.5}
    path.write_text(json.dumps([entry]))
    with pytest.raises(
        DataError, match=r"none of its 1 entries is of an image to be judged \(image_id 7 there, 'a' here"
    ):
        read_results(str(path), ["a"], ["cat"], category_ids=None)
    assert read_results(str(path), ["7"], ["cat"], category_ids=None).column("boxes").to_pylist() == [[[0, 0, 5, 5]]]
    path.write_text(json.dumps([entry | {"category_id": 3}]))
    with pytest.raises(
        DataError, match=r"entry 0: its category_id 3 is none .* results have 3, the dataset has 1 cat: give"
    ):
        read_results(str(path), ["7"], ["cat"], category_ids=None)
    path.write_text(json.dumps([{key: value for key, value in entry.items() if key != "score"}]))
    with pytest.raises(
        DataError,
        match=r"entry 0 is no detection \(it has no score\).* must have image_id, category_id, score and a bbox or",
    ):
        read_results(str(path), ["7"], ["cat"], category_ids=None)
    assert read_results(str(path), ["7"], ["cat"], default_score=0.25, category_ids=None).column(
        "scores"
    ).to_pylist() == [[0.25]]


def test_a_figure_that_one_seed_lacks_has_no_mean(tmp_path: Path) -> None:
    nothing = [{"image_id": row["image_id"], "status": "ok", "boxes": []} for row in TRUTH]
    step = steps(tmp_path, MASKED, others=(nothing,), annotated=SEGMENTED, table_kind="pgt", kind="segm")
    evaluate.run(step)
    found = storage.read_json(storage.join(step.folder, "metrics.json"))["metrics"]
    assert "mask_iou" not in found
    assert found["mask_iou_of_objects"] == pytest.approx(0.4)


def test_nothing_detected_is_a_figure_too(tmp_path: Path) -> None:
    nothing = [{"image_id": row["image_id"], "status": "ok", "boxes": [], "classes": [], "scores": []} for row in TRUTH]
    step = steps(tmp_path, nothing, protocol="coco")
    evaluate.run(step)
    assert storage.read_json(storage.join(step.folder, "metrics.json"))["metrics"]["AP50"] == 0.0


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_published_figures_of_cocos_fake_detections_are_reproduced(tmp_path: Path, kind: str) -> None:
    oracle = SHARED_DATA / "coco_oracle"
    if not oracle.exists():
        pytest.skip(f"{oracle} is not there")
    annotations = json.loads((oracle / "instances_val2014_100.json").read_text())
    folder = tmp_path / "val"
    folder.mkdir()
    for image in annotations["images"]:
        (folder / image["file_name"]).touch()
    results = f"instances_val2014_fake{'bbox' if kind == 'bbox' else 'segm'}100_results.json"
    (tmp_path / "run.yaml").write_text(
        f"run: {tmp_path}/run\nsteps:\n"
        f"  images: {{stage: index, format: coco, root: {tmp_path}, splits: [val],\n"
        f"    annotations: {{val: {oracle}/instances_val2014_100.json}}}}\n"
        f"  found: {{stage: import_detections, images: images, results: {oracle}/{results}}}\n"
        f"  ap: {{stage: evaluate, images: images, detections: found, protocol: coco, kind: {kind}}}\n"
    )
    loaded = pipeline.load(str(tmp_path / "run.yaml"))
    pipeline.run_steps(loaded)
    found = storage.read_json(storage.join(loaded[-1].folder, "metrics.json"))["metrics"]
    text = (oracle / "val2014_fake_eval_res.txt").read_text().split(f"type={kind}")[1].split("type=")[0]
    wanted = [float(value) for value in re.findall(r"= (-?\d\.\d{3})", text)]
    assert len(wanted) == 12
    assert [round(found[name], 3) for name in NAMES] == wanted


@pytest.mark.parametrize("protocol", ["voc", "coco"])
def test_a_score_that_is_not_finite_names_its_image_and_is_no_hit(tmp_path: Path, protocol: str) -> None:
    wrong = [DETECTED[0] | {"scores": [math.nan, 0.8]}, *DETECTED[1:]]
    fault = r"image a of step detections cannot be judged: detections: scores\[0\] is not finite: nan: make it again"
    with pytest.raises(DataError, match=fault):
        evaluate.run(steps(tmp_path, wrong, protocol=protocol))
