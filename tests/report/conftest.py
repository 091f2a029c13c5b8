"""A run folder as a pipeline leaves it, its proposals and detections made of the ground truth, and its report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from weaksam import pipeline
from weaksam.core import schemas, storage, tables
from weaksam.core.step import Outcome, Step
from weaksam.demo.scenes import write_scenes
from weaksam.report.page import write_report
from weaksam.stages import hygiene

CONFIG = """
run: {base}/run
steps:
  images: {{stage: index, format: voc, root: {base}/data, splits: [trainval, test]}}
  hygiene: {{stage: hygiene, images: images}}
  proposals: {{stage: proposals, images: images, sam: {{model: vit_xs}}, max_failed: 0.2}}
  oicr: {{stage: train_wsod, images: images, proposals: proposals, split: trainval, method: oicr}}
  boxes: {{stage: detect, images: images, proposals: proposals, detector: oicr}}
  pgt: {{stage: pgt, images: images, detections: boxes, split: trainval}}
  recall: {{stage: evaluate, images: images, proposals: proposals, split: test}}
  boxes_ap: {{stage: evaluate, images: images, detections: boxes, split: test}}
  pgt_quality: {{stage: evaluate, images: images, pgt: pgt, split: trainval}}
"""
BROKEN = "000002"
COPIES = ("000003", "000011")  # of the two splits
STRANGE = "000001"  # nothing is found in it


def find(step: Step) -> Outcome:
    """The objects of each image, a little moved, once as proposals and once as detections; an image fails."""
    images = step.inputs["images"]
    truth = tables.read_ground_truth(images.folder)
    names = schemas.class_names_of(images.read([]).schema)
    kinds = {"proposals": schemas.PROPOSALS, "detections": schemas.DETECTIONS}
    schema = schemas.with_metadata(kinds[step.stage.writes], fingerprint=step.fingerprint, class_names=names)
    assert truth is not None
    rows = [_row(row, step.stage.writes) for row in truth.to_pylist()]
    part = tables.write_part(step.folder, schemas.to_table(rows, schema))
    return Outcome(rows=len(rows), failed=1, parts=[part], failures=[f"{BROKEN}: unreadable: cut short"])


def _row(truth: dict[str, Any], writes: str) -> dict[str, Any]:
    image_id = truth["image_id"]
    row: dict[str, Any] = {"image_id": image_id, "status": "ok", "message": "", "height": 240, "width": 320}
    if image_id == BROKEN and writes == "proposals":
        return {"image_id": image_id, "status": "unreadable", "message": "cut short <b>here</b>"}
    boxes = np.array(truth["boxes"], np.float32).reshape(-1, 4)
    if image_id == STRANGE:
        boxes = boxes[:0]
    count = len(boxes)
    moved = boxes + np.linspace(0, 3, count, dtype=np.float32)[:, None]
    scores = np.linspace(0.95, 0.4, count, dtype=np.float32)
    if writes == "proposals":
        sources = (np.arange(count) % 4).astype(np.uint8)
        return row | {"boxes": moved, "predicted_iou": scores, "stability": scores, "source": sources, "points": []}
    return row | {"boxes": moved, "classes": truth["classes"][:count], "scores": scores}


def learn(step: Step) -> Outcome:
    """A training that left its journal alone."""
    rows = "".join(f'{{"step": {s}, "loss": {2.0 / s}, "lr": 0.1, "images_per_second": 5}}\n' for s in (1, 2, 4))
    storage.write_bytes(storage.join(step.folder, "training_log.jsonl"), rows.encode())
    return Outcome(rows=8)


def look_through(step: Step) -> Outcome:
    """Two images in two splits that are told to be the same; the rest is what the stage counts."""
    images = step.inputs["images"].read(["uri", "split", "labels"])
    names = schemas.class_names_of(images.schema)
    empty = [
        {"image_id": one, "status": "ok", "message": "", "height": 240, "width": 320}
        for one in images["image_id"].to_pylist()
    ]
    rows = schemas.to_table(empty, schemas.HYGIENE)
    members = [(row["image_id"], row["split"], row["uri"]) for row in images.to_pylist() if row["image_id"] in COPIES]
    columns = dict(zip(("image_id", "split", "uri"), map(list, zip(*members, strict=True)), strict=True))
    more = {"group": [0, 0], "kind": ["near", "near"], "sha256": ["a", "b"]}
    listed = pa.table(columns | more).select(hygiene.DUPLICATES.names).cast(hygiene.DUPLICATES)
    told = hygiene.count_images(images, rows, names) | hygiene.describe_groups(images, listed)
    storage.write_json(storage.join(step.folder, "hygiene.json"), told)
    return Outcome(rows=images.num_rows)


def run_with(step: Step) -> Step:
    """The step with its work replaced where that needs a cluster."""
    works = {"proposals": find, "detect": find, "train_wsod": learn, "hygiene": look_through}
    work = works.get(step.stage.name)
    return step if work is None else replace(step, stage=replace(step.stage, run=work))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of twelve drawn scenes."""
    base = tmp_path_factory.mktemp("report")
    write_scenes(base / "data", images=12, seed=3)
    config = base / "run.yaml"
    config.write_text(CONFIG.format(base=base))
    pipeline.run_steps([run_with(step) for step in pipeline.load(str(config))])
    return base / "run"


@pytest.fixture(scope="session")
def report_file(run_folder: Path) -> Path:
    """Its report."""
    return Path(write_report(str(run_folder), images=3, gpu_price=2.5))
