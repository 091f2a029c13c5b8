"""Choosing pseudo ground truth as a stage: what it reads, what it tells, which faults it names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.stages.test_import_detections import imported
from tests.stages.test_train_wsod import finished
from weaksam.core import schemas, storage
from weaksam.core.step import Step
from weaksam.errors import ConfigError, DataError
from weaksam.stages import pgt
from weaksam.stages.pgt import PgtConfig

IMAGES = [
    {"image_id": "a", "uri": "a.jpg", "split": "train", "labels": [0, 1]},
    {"image_id": "b", "uri": "b.jpg", "split": "train", "labels": [1]},
    {"image_id": "c", "uri": "c.jpg", "split": "train", "labels": [0]},
    {"image_id": "d", "uri": "d.jpg", "split": "train", "labels": [0]},
    {"image_id": "e", "uri": "e.jpg", "split": "train", "labels": None},
    {"image_id": "t", "uri": "t.jpg", "split": "test", "labels": [0]},
]
BOX, PART, APART = [0, 0, 40, 40], [2, 2, 20, 20], [50, 0, 90, 40]
FOUND = [  # in no order that the stage could rely on
    {"image_id": "t", "boxes": [BOX], "classes": [0], "scores": [0.9]},
    {"image_id": "c", "boxes": [BOX], "classes": [1], "scores": [0.9]},
    {"image_id": "b", "boxes": [APART, BOX], "classes": [1, 0], "scores": [0.2, 0.1]},
    {"image_id": "a", "boxes": [BOX, PART, APART, APART], "classes": [0, 0, 0, 1], "scores": [0.8, 0.7, 0.6, 0.1]},
]


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Step]:
    rows = [{"status": "ok", "message": "", "height": 60, "width": 100} | row for row in FOUND]
    rows.append({"image_id": "d", "status": "unreadable", "message": "cut off"})
    images = finished(tmp_path, "images", IMAGES, schemas.IMAGES, {})
    return {"images": images, "detections": finished(tmp_path, "found", rows, schemas.DETECTIONS, {"images": images})}


def make_step(folder: Path, inputs: dict[str, Step], **changes: object) -> Step:
    settings = {"images": "images", "detections": "found", "split": "train"}
    config = PgtConfig.model_validate(settings | changes)
    return Step("pgt", pgt.STAGE, config, inputs, {}, "p", str(folder / "pgt-p"))


def read(step: Step, parts: list[str]) -> dict[str, dict]:
    storage.write_json(step.manifest_uri, {"parts": parts, "excluded": {}})
    return {row["image_id"]: row for row in step.read().to_pylist()}


def test_labelled_images_of_the_split_have_a_row_each(tmp_path: Path, inputs: dict[str, Step]) -> None:
    step = make_step(tmp_path, inputs)
    outcome = pgt.run(step)
    rows = read(step, outcome.parts)
    assert set(rows) == {"a", "b", "c", "d"}
    assert (outcome.rows, outcome.failed, outcome.failures) == (4, 1, ["d: unreadable: cut off"])
    assert (rows["d"]["status"], rows["d"]["boxes"]) == ("unreadable", None)
    assert rows["a"]["boxes"] == [BOX, APART, APART]  # the part is gone
    assert rows["a"]["classes"] == [0, 0, 1]
    assert np.allclose(rows["a"]["scores"], [0.8, 0.6, 0.1])  # as the detector gave them
    assert (rows["b"]["boxes"], rows["b"]["classes"]) == ([APART], [1])  # class 0 is not among its labels
    assert rows["c"]["boxes"] == []
    assert (rows["a"]["height"], rows["a"]["width"]) == (60, 100)
    assert schemas.class_names_of(step.read().schema) == ["red", "blue"]


def test_statistics_tell_what_was_not_found(tmp_path: Path, inputs: dict[str, Step]) -> None:
    step = make_step(tmp_path, inputs)
    outcome = pgt.run(step)
    told = json.loads(Path(step.folder, "statistics.json").read_text())
    assert (told["images"], told["boxes"], told["boxes_per_image"]) == (4, 4, 1.0)
    assert (told["images_without"], told["labels"], told["labels_without"]) == (2, 5, 2)
    assert told["boxes_by_class"] == {"red": 2, "blue": 2}
    assert outcome.summary == "1.00 boxes per image, 2 images without any, 2 of 5 labels without any"


def test_parts_of_a_class_stay_when_it_is_named(tmp_path: Path, inputs: dict[str, Step]) -> None:
    rows = read(step := make_step(tmp_path, inputs, containment_except=["red"]), pgt.run(step).parts)
    assert rows["a"]["boxes"] == [BOX, PART, APART, APART]
    raw = make_step(tmp_path / "raw", inputs, norm="raw", threshold=0.65, containment_except=["red"])
    assert read(raw, pgt.run(raw).parts)["a"]["boxes"] == [BOX, PART, APART]
    with pytest.raises(ConfigError, match=r"containment_except: the images have no class 'rde': .* red, blue"):
        pgt.run(make_step(tmp_path, inputs, containment_except=["red", "rde"]))


def test_top_one_is_for_comparison(tmp_path: Path, inputs: dict[str, Step]) -> None:
    step = make_step(tmp_path, inputs, top_k=1)
    rows = read(step, pgt.run(step).parts)
    assert rows["a"]["classes"] == [0, 1]


def test_detections_made_elsewhere_are_taken(tmp_path: Path, inputs: dict[str, Step]) -> None:
    path = tmp_path / "results.json"
    found = [
        {"image_id": "b", "category_id": 2, "bbox": [50, 0, 40, 40], "score": 0.3},
        {"image_id": "b", "category_id": 1, "bbox": [0, 0, 40, 40], "score": 0.9},
    ]
    path.write_text(json.dumps(found))
    step = make_step(tmp_path, {"images": inputs["images"], "detections": imported(inputs["images"], path)})
    outcome = pgt.run(step)
    rows = read(step, outcome.parts)
    assert (rows["b"]["boxes"], rows["b"]["classes"], outcome.failed) == ([APART], [1], 0)
    assert rows["a"]["boxes"] == rows["d"]["boxes"] == []


def test_images_without_a_row_are_named(tmp_path: Path, inputs: dict[str, Step]) -> None:
    from_images = {"images": inputs["images"]}
    fewer = finished(tmp_path, "fewer", [FOUND[3] | {"status": "ok"}], schemas.DETECTIONS, from_images)
    with pytest.raises(DataError, match=r"step fewer has no row for 3 of 4 images, e\.g\. b: let it run on this split"):
        pgt.run(make_step(tmp_path, inputs | {"detections": fewer}))


def test_results_are_cut_at_the_border_of_images_whose_size_only_their_header_says(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.png")
    images = finished(tmp_path, "images", [IMAGES[0] | {"uri": str(tmp_path / "a.png")}], schemas.IMAGES, {})
    boxes = [[500, 500, 20, 20], [40, 30, 90, 90]]
    entries = [{"image_id": "a", "category_id": 1, "bbox": box, "score": 0.9} for box in boxes]
    (tmp_path / "results.json").write_text(json.dumps(entries))
    step = make_step(tmp_path, {"images": images, "detections": imported(images, tmp_path / "results.json")})
    row = read(step, pgt.run(step).parts)["a"]
    assert (row["boxes"], row["height"], row["width"]) == ([[40, 30, 64, 48]], 48, 64)


def test_no_box_without_area_is_handed_on_whoever_made_it(
    tmp_path: Path, inputs: dict[str, Step], caplog: pytest.LogCaptureFixture
) -> None:
    flat, turned, endless = [7, 7, 7, 30], [30, 7, 7, 30], [0, 0, float("inf"), 9]
    rows = [
        {"image_id": "a", "boxes": [flat, BOX, endless], "classes": [0, 0, 1], "scores": [0.9, 0.5, 0.8]},
        {"image_id": "b", "boxes": [turned, BOX], "classes": [1, 1], "scores": [0.9, 0.1]},
        {"image_id": "c", "boxes": [[0, 0, float("nan"), 9]], "classes": [0], "scores": [0.9]},
        {"image_id": "d", "boxes": [BOX], "classes": [0], "scores": [0.9]},
    ]
    rows = [{"status": "ok", "message": "", "height": 60, "width": 100} | row for row in rows]
    found = finished(tmp_path, "spoilt", rows, schemas.DETECTIONS, {"images": inputs["images"]})
    step = make_step(tmp_path, inputs | {"detections": found})
    with caplog.at_level("WARNING"):
        chosen = read(step, pgt.run(step).parts)
    assert {key: row["boxes"] for key, row in chosen.items()} == {"a": [BOX], "b": [BOX], "c": [], "d": [BOX]}
    left_out = "image a, image a, image b, image c"
    assert caplog.messages == [f"steps.pgt: 4 boxes have no area inside their image and are left out: {left_out}"]


def test_boxes_without_a_finite_score_are_counted(
    tmp_path: Path, inputs: dict[str, Step], caplog: pytest.LogCaptureFixture
) -> None:
    inf, nan = float("inf"), float("nan")
    rows = [
        {"image_id": "a", "boxes": [BOX, PART, APART], "classes": [0, 0, 1], "scores": [inf, 0.5, nan]},
        *FOUND[1:3],
    ]
    rows = [{"status": "ok", "message": "", "height": 60, "width": 100} | row for row in rows]
    rows.append({"image_id": "d", "status": "unreadable", "message": "cut off"})
    found = finished(tmp_path, "spoilt", rows, schemas.DETECTIONS, {"images": inputs["images"]})
    step = make_step(tmp_path, inputs | {"detections": found})
    with caplog.at_level("WARNING"):
        row = read(step, pgt.run(step).parts)["a"]
    assert (row["boxes"], row["scores"]) == ([PART], [0.5])
    assert caplog.messages == ["steps.pgt: 2 boxes have a score that is not finite and are left out: image a, image a"]


def test_boxes_whose_score_is_not_above_zero_are_counted(
    tmp_path: Path, inputs: dict[str, Step], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "results.json"
    scores = [("a", -2.5), ("a", 0.0), ("b", -0.5), ("c", 0.5)]  # class 0 is no label of b
    found = [{"image_id": i, "category_id": 1, "bbox": [0, 0, 40, 40], "score": score} for i, score in scores]
    path.write_text(json.dumps(found))
    step = make_step(tmp_path, {"images": inputs["images"], "detections": imported(inputs["images"], path)})
    with caplog.at_level("WARNING"):
        rows = read(step, pgt.run(step).parts)
    assert {key: len(row["boxes"]) for key, row in rows.items()} == {"a": 0, "b": 0, "c": 1, "d": 0}
    assert caplog.messages == [
        "steps.pgt: 2 boxes of labels of their image have a score of 0 or less and are left out (are they logits?): "
        "image a, image a"
    ]
