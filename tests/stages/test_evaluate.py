"""Evaluate joins ground truth and proposals by image, and says so when it cannot."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from weaksam import schemas, storage, tables
from weaksam.config import StageConfig
from weaksam.errors import DataError
from weaksam.stage import Outcome, Stage, Step
from weaksam.stages import evaluate
from weaksam.stages.index import IndexConfig

TRUTH = [
    {"image_id": "a", "boxes": [[0, 0, 10, 10], [20, 20, 30, 30]], "classes": [0, 1], "difficult": [False, False]},
    {"image_id": "b", "boxes": [[0, 0, 10, 10]], "classes": [0], "difficult": [True]},
    {"image_id": "c", "boxes": [], "classes": [], "difficult": []},
]
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


def steps(folder: Path, found: list[dict], **settings: object) -> Step:
    def finished(name: str, rows: list[dict], schema: object, config: StageConfig) -> Step:
        stage = Stage(name, 1, type(config), lambda step: Outcome(0), writes=name)
        step = Step(name, stage, config, {}, {}, "f", str(folder / name))
        table = schemas.to_table(rows, schemas.with_metadata(schema, fingerprint="f", class_names=["cat", "dog"]))
        manifest = {"parts": [tables.write_part(step.folder, table)], "excluded": {}}
        storage.write_json(step.manifest_uri, manifest)
        return step

    listed = [{"image_id": row["image_id"], "split": "test"} for row in TRUTH]
    images = finished("images", listed, schemas.IMAGES, IndexConfig(format="folder", root="somewhere"))
    truth = [{**row, "crowd": [False] * len(row["boxes"]), "masks": [None] * len(row["boxes"])} for row in TRUTH]
    metadata = schemas.with_metadata(schemas.GROUND_TRUTH, fingerprint="f", class_names=["cat", "dog"])
    tables.write_ground_truth(images.folder, schemas.to_table(truth, metadata))
    proposals = finished("proposals", found, schemas.PROPOSALS, StageConfig())
    proposals = dataclasses.replace(proposals, inputs={"images": images})
    config = evaluate.EvaluateConfig(images="images", proposals="proposals", **settings)
    inputs = {"images": images, "proposals": proposals}
    return Step("recall", evaluate.STAGE, config, inputs, {}, "f", str(folder / "recall"))


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


def test_difficult_objects_count_only_when_asked(tmp_path: Path) -> None:
    step = steps(tmp_path, FOUND, include_difficult=True)
    evaluate.run(step)
    report = storage.read_json(storage.join(step.folder, "metrics.json"))
    assert report["metrics"]["recall@0.5"] == pytest.approx(1 / 3)


def test_proposals_of_another_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"step proposals has no row for 1 of 3 images, e\.g\. c: set the same split"):
        evaluate.run(steps(tmp_path, FOUND[:2]))


def test_a_dataset_without_boxes_is_named(tmp_path: Path) -> None:
    step = steps(tmp_path, FOUND)
    for part in (tmp_path / "images" / "ground_truth").iterdir():
        part.unlink()
    with pytest.raises(DataError, match=r"the dataset of step images has no boxes"):
        evaluate.run(step)
