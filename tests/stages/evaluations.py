"""Steps for tests of `evaluate`: images with ground truth, and what is judged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from weaksam.core import schemas, storage, tables
from weaksam.core.config import StageConfig
from weaksam.core.step import Outcome, Stage, Step
from weaksam.ops.rle import encode_rle
from weaksam.stages import evaluate
from weaksam.stages.index import IndexConfig

TRUTH = [
    {"image_id": "a", "boxes": [[0, 0, 10, 10], [20, 20, 30, 30]], "classes": [0, 1], "difficult": [False, False]},
    {"image_id": "b", "boxes": [[0, 0, 10, 10]], "classes": [0], "difficult": [True]},
    {"image_id": "c", "boxes": [], "classes": [], "difficult": []},
]
DETECTED = [
    {
        "image_id": "a",
        "status": "ok",
        "boxes": [[0, 0, 10, 10], [1, 0, 11, 10]],
        "classes": [0, 0],
        "scores": [0.9, 0.8],
    },
    {"image_id": "b", "status": "unreadable"},
    {"image_id": "c", "status": "ok", "boxes": [], "classes": [], "scores": []},
]
SIZE = (40, 50)


def mask_of(left: int, top: int, right: int, bottom: int) -> bytes:
    pixels = np.zeros(SIZE, bool)
    pixels[top:bottom, left:right] = True
    return encode_rle(pixels)


# What TRUTH is of, where people drew masks too: an object more in image a, difficult, that VOC paints void.
SEGMENTED = [
    {
        "image_id": "a",
        "boxes": [[0, 0, 10, 10], [20, 20, 30, 30], [40, 0, 50, 10]],
        "classes": [0, 1, 0],
        "difficult": [False, False, True],
        "masks": [mask_of(0, 0, 10, 10), mask_of(20, 20, 30, 30), None],
    },
    {**TRUTH[1], "masks": [mask_of(0, 0, 10, 10)]},
    TRUTH[2],
]
MASKED = [
    {
        "image_id": "a",
        "status": "ok",
        "height": SIZE[0],
        "width": SIZE[1],
        "boxes": [[0, 0, 10, 10], [20, 20, 30, 26], [40, 0, 50, 9]],
        "classes": [0, 1, 0],
        "scores": [0.9, 0.8, 0.7],
        "masks": [mask_of(0, 0, 10, 10), mask_of(20, 20, 30, 26), mask_of(40, 0, 50, 9)],
    },
    {"image_id": "b", "status": "unreadable"},
    {"image_id": "c", "status": "ok", "height": SIZE[0], "width": SIZE[1], "boxes": [], "classes": [], "scores": []},
]


def steps(
    folder: Path,
    found: list[dict],
    *,
    others: tuple[list[dict], ...] = (),
    table_kind: str = "detections",
    annotated: list[dict] = TRUTH,
    **settings: object,
) -> Step:
    """A step that judges `found`, as proposals, or as detections or pgt of one or several seeds."""

    def finished(name: str, rows: list[dict], schema: object, config: StageConfig) -> Step:
        stage = Stage(name, 1, type(config), lambda step: Outcome(0), writes=name)
        step = Step(name, stage, config, {}, {}, "f", str(folder / name))
        table = schemas.to_table(rows, schemas.with_metadata(schema, fingerprint="f", class_names=["cat", "dog"]))
        manifest = {"parts": [tables.write_part(step.folder, table)], "excluded": {}}
        storage.write_json(step.manifest_uri, manifest)
        return step

    listed = [{"image_id": row["image_id"], "split": "test"} for row in annotated]
    images = finished("images", listed, schemas.IMAGES, IndexConfig(format="folder", root="somewhere"))
    truth = [{"crowd": [False] * len(row["boxes"]), "masks": [None] * len(row["boxes"]), **row} for row in annotated]
    metadata = schemas.with_metadata(schemas.GROUND_TRUTH, fingerprint="f", class_names=["cat", "dog"])
    tables.write_ground_truth(images.folder, schemas.to_table(truth, metadata))
    inputs = {"images": images}
    key, schema = (table_kind, schemas.DETECTIONS) if "source" not in found[0] else ("proposals", schemas.PROPOSALS)
    for number, rows in enumerate((found, *others)):
        made = finished(f"{key}{number or ''}", rows, schema, StageConfig())
        inputs[f"{key}.{number}" if others else key] = dataclasses.replace(made, inputs={"images": images})
    named = [step.name for step in inputs.values()][1:]
    config = evaluate.EvaluateConfig(images="images", **{key: named if others else named[0]}, **settings)
    return Step("recall", evaluate.STAGE, config, inputs, {}, "f", str(folder / "recall"))
