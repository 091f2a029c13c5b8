"""Detections of other programs as a stage: a row an image, masks included, and what the old keys are answered with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.stages.test_train_wsod import finished
from weaksam import pipeline
from weaksam.core import schemas, storage
from weaksam.core.step import Step
from weaksam.errors import ConfigError, DataError
from weaksam.ops.rle import decode_rle
from weaksam.stages import import_detections
from weaksam.stages.import_detections import ImportDetectionsConfig

IMAGES = [
    {"image_id": name, "uri": f"{name}.jpg", "split": split, "height": 48, "width": 64}
    for name, split in (("a", "train"), ("b", "train"), ("c", "train"), ("t", "test"))
]
MASK = {"size": [48, 64], "counts": [100, 20, 2952]}
ENTRIES = [
    {"image_id": "c", "category_id": 1, "bbox": [4, 4, 20, 20], "score": 0.25},
    {"image_id": "a", "category_id": 2, "segmentation": MASK, "score": 0.5},
    {"image_id": "c", "category_id": 2, "bbox": [40, 30, 90, 90], "score": 0.75, "segmentation": MASK},
]


def imported(images: Step, results: Path, **settings: object) -> Step:
    """A finished step that has read `results`."""
    config = ImportDetectionsConfig.model_validate({"images": "images", "results": str(results), **settings})
    folder = str(results.parent / "imported")
    step = Step("found", import_detections.STAGE, config, {"images": images}, {}, "i", folder)
    outcome = import_detections.run(step)
    storage.write_json(step.manifest_uri, {"parts": outcome.parts, "excluded": outcome.excluded})
    return step


@pytest.fixture
def images(tmp_path: Path) -> Step:
    return finished(tmp_path, "images", IMAGES, schemas.IMAGES, {})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(ENTRIES))
    return path


@pytest.mark.parametrize("rows_per_part", [4096, 3])
def test_every_image_has_a_row_and_masks_stay(
    images: Step, results: Path, monkeypatch: pytest.MonkeyPatch, rows_per_part: int
) -> None:
    monkeypatch.setattr(import_detections, "_ROWS_PER_PART", rows_per_part)
    step = imported(images, results)
    table = step.read()
    assert table.schema.equals(schemas.DETECTIONS)
    assert schemas.class_names_of(table.schema) == ["red", "blue"]
    rows = {row["image_id"]: row for row in table.to_pylist()}
    assert list(rows) == ["a", "b", "c", "t"]
    assert {(row["status"], row["height"], row["width"]) for row in rows.values()} == {("ok", 48, 64)}
    for name in "bt":
        assert (rows[name]["boxes"], rows[name]["classes"], rows[name]["masks"]) == ([], [], None)
    assert (rows["a"]["boxes"], rows["a"]["classes"], rows["a"]["scores"]) == ([[2, 4, 3, 24]], [1], [0.5])
    assert (rows["c"]["boxes"], rows["c"]["scores"]) == ([[40, 30, 64, 48], [4, 4, 24, 24]], [0.75, 0.25])
    assert decode_rle(rows["a"]["masks"][0], 48, 64).sum() == 20
    assert rows["c"]["masks"] == [rows["a"]["masks"][0], None]
    outcome = import_detections.run(step)
    assert (outcome.rows, outcome.failed, len(outcome.parts)) == (4, 0, -(-4 // rows_per_part))
    assert outcome.summary == "3 boxes in 2 of 4 images, with masks"


def test_only_images_of_the_split_have_rows(images: Step, results: Path, caplog: pytest.LogCaptureFixture) -> None:
    results.write_text(json.dumps([*ENTRIES, {"image_id": "t", "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]))
    step = imported(images, results, split="test")
    (row,) = step.read().to_pylist()
    assert (row["image_id"], row["boxes"], row["masks"]) == ("t", [[1, 2, 4, 6]], None)
    assert import_detections.run(step).summary == "1 boxes in 1 of 1 images"
    assert "json: 3 results are of images that are not asked for and are left out: entry 0 (c)" in caplog.text
    with pytest.raises(ConfigError, match=r"steps\.found\.split: no image has split 'val': splits are test, train"):
        imported(images, results, split="val")


def test_entries_without_a_score_need_one_for_all(images: Step, results: Path) -> None:
    results.write_text(json.dumps([ENTRIES[0] | {"score": None}, ENTRIES[1]]))
    with pytest.raises(DataError, match=r"results\.json: entry 0 is no detection \(it has no score\)"):
        imported(images, results)
    rows = imported(images, results, default_score=1.0).read().to_pylist()
    assert np.concatenate([row["scores"] for row in rows]).tolist() == [0.5, 1.0]


def test_another_file_makes_another_step(tmp_path: Path, results: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run: {tmp_path}/run\n"
        "steps:\n"
        f"  images: {{stage: index, format: folder, root: {tmp_path}/data}}\n"
        f"  found: {{stage: import_detections, images: images, results: {results}}}\n"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "labels.csv").write_text("file,labels\n")
    before = {step.name: step.fingerprint for step in pipeline.load(str(path))}
    results.write_text("[]")
    after = {step.name: step.fingerprint for step in pipeline.load(str(path))}
    assert (before["images"] == after["images"], before["found"] == after["found"]) == (True, False)


@pytest.mark.parametrize(
    "step",
    [
        "{stage: pgt, images: images, results: found.json, split: train}",
        "{stage: pseudo_masks, images: images, results: found.json, sam: {model: vit_xs}}",
        "{stage: evaluate, images: images, results: found.json}",
    ],
)
def test_the_old_key_of_other_stages_names_this_one(tmp_path: Path, step: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"run: {tmp_path}/run\nsteps:\n  images: {{stage: index, format: folder, root: d}}\n  x: {step}\n")
    with pytest.raises(ConfigError) as caught:
        pipeline.parse(str(path))
    wanted = "steps.x.results: unknown key: it is now `detections`, the name of an `import_detections` step with these"
    assert any(fault.startswith(wanted) for fault in caught.value.faults)
