"""The review loop: the most uncertain images go out, what people made of them comes back and no run changes it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.readers.test_import_label_studio import annotation, as_exported
from tests.stages.test_import_detections import imported
from tests.stages.test_train_wsod import finished
from weaksam.core import schemas, storage, tables
from weaksam.core.config import parse_settings
from weaksam.core.fingerprints import resolve
from weaksam.core.step import Step
from weaksam.errors import DataError
from weaksam.ops.rle import decode_rle
from weaksam.stages import STAGES, export, pgt
from weaksam.stages.export_config import ExportConfig
from weaksam.stages.index import IndexConfig

IMAGES = [
    {"image_id": image_id, "uri": f"s3://b/i/{split}/{image_id}.jpg", "split": split, "labels": labels}
    for image_id, split, labels in (
        ("a", "train", [0, 1]), ("b", "train", [1]), ("c", "train", [0]), ("d", "train", [0]), ("e", "train", []),
        ("u", "train", None), ("v", "train", None), ("t", "test", [0]),
    )
]  # fmt: skip
BOX, APART = [0.0, 0.0, 40.0, 40.0], [50.0, 0.0, 90.0, 40.0]


def found(image_id: str, *objects: tuple[list[float], int, float]) -> dict[str, Any]:
    boxes, classes, scores = ([one[key] for one in objects] for key in range(3))
    row = {"image_id": image_id, "status": "ok", "message": "", "height": 60, "width": 100}
    return row | {"boxes": boxes, "classes": classes, "scores": scores}


# Class 0: a above c, d failed. Class 1: b above a. Without labels: v nearer to a half than u.
DETECTED = [
    found("a", (BOX, 0, 0.9), (APART, 1, 0.001), (APART, 1, 0.0005)),
    found("b", (BOX, 1, 0.002)),
    found("c", (BOX, 0, 0.3)),
    {"image_id": "d", "status": "unreadable", "message": "cut off"},
    found("e"),
    found("t", (BOX, 0, 0.5)),
    found("u", (BOX, 1, 0.9)),
    found("v", (BOX, 0, 0.55), (APART, 1, 0.99)),
]


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Step]:
    images = finished(tmp_path, "images", IMAGES, schemas.IMAGES, {})
    images = replace(images, config=IndexConfig(format="folder", root=str(tmp_path)))
    return {
        "images": images,
        "detections": finished(tmp_path, "found", DETECTED, schemas.DETECTIONS, {"images": images}),
    }


def run_pgt(folder: Path, inputs: dict[str, Step], **settings: object) -> tuple[Step, dict[str, dict], str]:
    """A finished step, its rows and its summary."""
    given = {"images": "images", "detections": "found", "split": "train", **settings}
    config, faults = parse_settings(STAGES["pgt"].config, given, where="steps.pgt")
    assert not faults
    step = resolve(str(folder / "run"), "pgt", pgt.STAGE, config, inputs)  # type: ignore[arg-type]
    outcome = pgt.run(step)
    storage.write_json(step.manifest_uri, {"parts": outcome.parts, "excluded": outcome.excluded})
    return step, {row["image_id"]: row for row in step.read().to_pylist()}, outcome.summary


def run_export(folder: Path, inputs: dict[str, Step], name: str, **settings: object) -> tuple[list[dict], dict]:
    """Tasks and report."""
    given = {"images": "images", "format": "label_studio", "to": str(folder / name), **settings}
    step = Step(name, export.STAGE, ExportConfig.model_validate(given), inputs, {}, "x", str(folder / f"{name}-x"))
    export.run(step)
    tasks = json.loads((folder / name / "tasks.json").read_text())
    return tasks, json.loads(Path(step.folder, "export.json").read_text())


def write_review(path: Path, tasks: list[dict]) -> str:
    path.write_text(json.dumps(tasks))
    return str(path)


# --- out


def test_the_most_uncertain_images_come_first(tmp_path: Path, inputs: dict[str, Step]) -> None:
    out = {"detections": "found", "image_prefix": "https://host/"}
    tasks, report = run_export(tmp_path, inputs, "out", most_uncertain=4, **out)
    told = [(task["data"]["image_id"], task["data"]["uncertainty"]) for task in tasks]
    # a, c and t have label 0: ranks 1, 1/3, 2/3; a and b have label 1: ranks 1/2 and 1.
    assert told == [
        ("v", 0.9),
        ("c", pytest.approx(2 / 3, abs=1e-6)),
        ("a", 0.5),
        ("t", pytest.approx(1 / 3, abs=1e-6)),
    ]
    assert report["left_out"] == {"failed_images": 1, "less_uncertain_images": 3}
    assert (report["images"], report["boxes"]) == (4, 7)
    assert tasks[0]["data"]["image"] == "https://host/train/v.jpg"  # below the folder of all images, whichever are left
    tasks, report = run_export(tmp_path, inputs, "all", **out)
    assert [task["data"]["image_id"] for task in tasks] == ["a", "b", "c", "e", "t", "u", "v"]
    assert all("uncertainty" not in task["data"] for task in tasks)


def test_only_a_split_is_ranked_and_more_than_there_are_is_all(tmp_path: Path, inputs: dict[str, Step]) -> None:
    settings = {"detections": "found", "most_uncertain": 99, "split": "train", "min_score": 0.5}
    tasks, report = run_export(tmp_path, inputs, "out", **settings)
    told = [(task["data"]["image_id"], task["data"]["uncertainty"]) for task in tasks]
    assert told == [("v", 0.9), ("a", 0.5), ("c", 0.5), ("u", 0.2), ("b", 0), ("e", 0)]
    assert report["left_out"] == {"failed_images": 1, "boxes_below_min_score": 4}  # whatever is exported of a row


def test_most_uncertain_is_for_label_studio() -> None:
    with pytest.raises(ValueError, match="most_uncertain is for format label_studio, not coco"):
        ExportConfig(images="images", pgt="pgt", format="coco", most_uncertain=1)


def test_many_images_in_many_parts_are_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weaksam.stages import export_rows

    monkeypatch.setattr(export_rows, "BATCH", 3)
    ids = [f"i{number:02}" for number in range(20)]
    rows = [{"image_id": one, "uri": f"s3://b/{one}.jpg", "split": "train", "labels": [0]} for one in ids]
    images = finished(tmp_path, "images", rows, schemas.IMAGES, {})
    scores = np.random.default_rng(0).permutation(20) + 1
    detected = [found(one, (BOX, 0, score / 20)) for one, score in zip(ids, scores, strict=True)]
    step = finished(tmp_path, "found", detected, schemas.DETECTIONS, {"images": images})
    schema = schemas.with_metadata(schemas.DETECTIONS, fingerprint="f", class_names=["red", "blue"])
    parts = [tables.write_part(step.folder, schemas.to_table(detected[k::7], schema)) for k in range(7)]
    storage.write_json(step.manifest_uri, {"parts": parts, "excluded": {}})
    both = {"images": images, "detections": step}
    tasks, _ = run_export(tmp_path, both, "out", detections="found", most_uncertain=8)
    assert [task["data"]["image_id"] for task in tasks] == [ids[k] for k in np.argsort(scores)[:8]]


# --- and back


def test_what_people_say_is_in_the_row_whatever_the_detector_says(
    tmp_path: Path, inputs: dict[str, Step], caplog: pytest.LogCaptureFixture
) -> None:
    tasks, _ = run_export(tmp_path, inputs, "out", detections="found", image_prefix="https://host/")
    corrected = {task["data"]["image_id"]: task for task in as_exported(tasks)}
    # a: a box moved, one of a class that is no label of the image, with a polygon. c: nothing there. d: failed.
    first, second, third = corrected["a"]["annotations"][0]["result"]
    first["value"] |= {"x": 10, "y": 50, "width": 30, "height": 25}
    moved = first | {"origin": "prediction-changed"}
    square = {"points": [[0, 0], [10, 0], [10, 50], [0, 50]], "closed": True, "polygonlabels": ["blue"]}
    drawn = third | {"type": "polygonlabels", "from_name": "mask", "id": "m", "parentID": second["id"], "value": square}
    other = corrected["t"]
    lost = other | {"data": other["data"] | {"image_id": "d"}, "id": 90}
    empty = corrected["c"] | {"annotations": [annotation([])]}
    back = [corrected["a"] | {"annotations": [annotation([moved, second, drawn])]}, empty, lost, other, corrected["v"]]
    unseen = corrected["b"] | {"annotations": []}
    review = write_review(tmp_path / "review.json", [*back, unseen])
    with caplog.at_level(logging.INFO, "weaksam"):
        step, rows, summary = run_pgt(tmp_path, inputs, reviewed=review)
    assert list(rows) == ["a", "b", "c", "d", "e", "v"]  # v has no labels: without a review it has no row
    assert [image_id for image_id, row in rows.items() if row["trusted"]] == ["a", "c", "d", "v"]
    assert np.allclose(rows["a"]["boxes"], [[10, 30, 40, 45], APART], atol=0.01)
    assert (rows["a"]["classes"], rows["a"]["scores"]) == ([0, 1], [1, 1])
    assert rows["a"]["masks"][0] is None
    assert np.argwhere(decode_rle(rows["a"]["masks"][1], 60, 100)).max(0).tolist() == [29, 9]
    assert (rows["c"]["boxes"], rows["c"]["status"], rows["c"]["height"]) == ([], "ok", 60)
    assert (rows["d"]["status"], rows["d"]["classes"], rows["d"]["masks"]) == ("ok", [0], None)
    assert (rows["b"]["scores"], rows["b"]["trusted"]) == ([pytest.approx(0.002)], False)
    assert storage.read_json(f"{step.folder}/statistics.json")["trusted_images"] == 4
    assert summary.endswith("labels without any, 4 images reviewed and trusted")
    assert "pgt: 1 reviewed images are of other splits than 'train': left out" in caplog.messages
    assert {row["image_id"] for row in step.read().to_pylist()} == set(rows)


def test_no_other_run_changes_what_people_say(tmp_path: Path, inputs: dict[str, Step]) -> None:
    tasks, _ = run_export(tmp_path, inputs, "out", detections="found")
    review = write_review(
        tmp_path / "review.json", [task for task in as_exported(tasks) if task["data"]["image_id"] in "av"]
    )
    _, before, _ = run_pgt(tmp_path, inputs, reviewed=review)
    assert [len(before[image_id]["boxes"]) for image_id in "av"] == [3, 2]  # no part of another goes, either
    other = [found(row["image_id"], (APART, 0, 0.4)) for row in IMAGES if row["image_id"] not in "uv"]
    worse = inputs | {
        "detections": finished(tmp_path, "worse", other, schemas.DETECTIONS, {"images": inputs["images"]})
    }
    for changed, settings in ((inputs, {"top_k": 1, "max_per_image": 1}), (worse, {}), (worse, {"threshold": 1.0})):
        _, rows, _ = run_pgt(tmp_path / str(len(settings)), changed, reviewed=review, **settings)
        assert [rows[image_id] for image_id in "av"] == [before[image_id] for image_id in "av"]
    assert (rows["c"]["boxes"], before["c"]["boxes"]) == ([APART], [BOX])  # others follow the detector
    _, again, _ = run_pgt(tmp_path, inputs, top_k=1)
    assert (len(again["a"]["boxes"]), again["a"]["trusted"]) == (2, False)  # without the file they do so too


def test_a_sample_of_a_dataset_may_have_no_reviewed_image(tmp_path: Path, inputs: dict[str, Step]) -> None:
    strange = {"id": 1, "data": {"image_id": "not sampled"}, "annotations": []}
    (tmp_path / "review.json").write_text(json.dumps([strange]))
    with pytest.raises(DataError, match="not in the dataset"):
        run_pgt(tmp_path, inputs, reviewed=str(tmp_path / "review.json"))
    images = inputs["images"]
    sampled = replace(images, config=images.config.model_copy(update={"sample": 5}))
    _, rows, told = run_pgt(tmp_path, inputs | {"images": sampled}, reviewed=str(tmp_path / "review.json"))
    assert not any(row["trusted"] for row in rows.values())
    assert "0 images reviewed" in told


def test_the_content_of_the_review_is_in_the_fingerprint(tmp_path: Path, inputs: dict[str, Step]) -> None:
    path = tmp_path / "review.json"
    tasks, _ = run_export(tmp_path, inputs, "out", detections="found", most_uncertain=3)
    one, _, _ = run_pgt(tmp_path, inputs, reviewed=write_review(path, as_exported(tasks)))
    two, _, _ = run_pgt(tmp_path, inputs, reviewed=write_review(path, as_exported(tasks)[:1]))
    three, _, _ = run_pgt(tmp_path, inputs, reviewed=write_review(tmp_path / "copy.json", as_exported(tasks)))
    assert one.fingerprint == three.fingerprint != two.fingerprint
    assert one.outside.keys() == {"reviewed"}


def test_reviewed_images_are_neither_asked_for_again_nor_ranked_among(tmp_path: Path, inputs: dict[str, Step]) -> None:
    tasks, _ = run_export(tmp_path, inputs, "out", detections="found", most_uncertain=2)
    assert [task["data"]["image_id"] for task in tasks] == ["v", "c"]
    step, _, _ = run_pgt(tmp_path, inputs, reviewed=write_review(tmp_path / "review.json", as_exported(tasks)))
    both = {"images": inputs["images"], "pgt": step}
    tasks, report = run_export(tmp_path, both, "again", pgt="pgt", most_uncertain=2)
    assert [(task["data"]["image_id"], task["data"]["uncertainty"]) for task in tasks] == [("a", 0.5), ("b", 0)]
    assert report["left_out"] == {"failed_images": 1, "trusted_images": 2, "less_uncertain_images": 1}
    all_of_them, report = run_export(tmp_path, both, "everything", pgt="pgt")
    assert len(all_of_them) == 5  # trusted ones too
    rest = [task for task in as_exported(all_of_them) if task["data"]["image_id"] not in "vc"]
    more = as_exported(run_export(tmp_path, inputs, "vc", detections="found", most_uncertain=2)[0])
    review = write_review(tmp_path / "more.json", [*more, *rest])
    step, _, _ = run_pgt(tmp_path, inputs, reviewed=review)
    with pytest.raises(DataError, match="step pgt: all 5 images are reviewed: none is left"):
        run_export(tmp_path, both | {"pgt": step}, "none", pgt="pgt", most_uncertain=2)


def test_tables_from_before_reviews_can_be_exported(tmp_path: Path, inputs: dict[str, Step]) -> None:
    old = finished(tmp_path, "old", DETECTED[:3], schemas.DETECTIONS, {"images": inputs["images"]})
    tasks, _ = run_export(tmp_path, {"images": inputs["images"], "pgt": old}, "out", pgt="old", most_uncertain=1)
    assert [task["data"]["image_id"] for task in tasks] == ["a"]


def test_detections_made_elsewhere_may_be_reviewed_too(tmp_path: Path, inputs: dict[str, Step]) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"image_id": "b", "category_id": 2, "bbox": [50, 0, 40, 40], "score": 0.3}]))
    tasks, _ = run_export(tmp_path, inputs, "out", detections="found", most_uncertain=2)
    review = write_review(tmp_path / "review.json", as_exported(tasks))
    sized = finished(tmp_path, "sized", [row | {"height": 60, "width": 100} for row in IMAGES], schemas.IMAGES, {})
    images = replace(sized, config=inputs["images"].config)
    given = {"images": images, "detections": imported(images, results)}
    _, rows, _ = run_pgt(tmp_path, given, reviewed=review)
    assert np.allclose(rows["c"]["boxes"], [BOX], atol=0.01)
    assert (rows["c"]["height"], rows["c"]["width"]) == (60, 100)  # as Label Studio says
    assert (rows["b"]["boxes"], rows["b"]["trusted"]) == ([APART], False)
