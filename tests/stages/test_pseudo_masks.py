"""Masks for boxes as a stage: the masks of `segment_anything`'s predictor, a row an image, faults named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from segment_anything import SamPredictor

from tests.stages.test_import_detections import imported
from tests.stages.test_proposals import batch, jpeg
from tests.stages.test_train_wsod import finished
from weaksam.core import schemas, storage, tables
from weaksam.core.config import parse_settings
from weaksam.core.step import Outcome, Step
from weaksam.data.images import decode_image
from weaksam.errors import DataError
from weaksam.execution import runtime
from weaksam.execution.mapping import map_batch
from weaksam.execution.rows import Fetch
from weaksam.ops.rle import decode_rle, encode_rle
from weaksam.sam.checkpoints import load_sam
from weaksam.stages import pseudo_masks
from weaksam.stages.pseudo_masks import DrawMasks, PseudoMasksConfig

SCHEMA = schemas.with_metadata(schemas.PSEUDO_MASKS, fingerprint="f", class_names=["red", "blue"])
BOXES = [[4.0, 3.0, 30.0, 25.0], [20.0, 10.0, 58.0, 38.0], [0.0, 0.0, 60.0, 40.0]]
GIVEN = {"boxes": BOXES, "classes": [1, 0, 1], "scores": [0.75, 0.5, 0.25]}
SIZE = (40, 60)


def make_config(weights: Path, **settings: object) -> PseudoMasksConfig:
    raw = {"images": "images", "pgt": "pgt", "sam": {"model": "vit_xs", "checkpoint": str(weights)}}
    config, faults = parse_settings(PseudoMasksConfig, {**raw, **settings}, where="steps.m")
    assert isinstance(config, PseudoMasksConfig), faults
    return config


def prompted(images: dict[str, bytes | None], given: dict[str, dict]) -> pa.Table:
    table = batch(**images)
    for key, kind in (("boxes", pa.list_(pa.list_(pa.float32()))), ("classes", pa.list_(pa.int32())),
                      ("scores", pa.list_(pa.float32()))):  # fmt: skip
        table = table.append_column(key, pa.array([given.get(name, {}).get(key) for name in images], kind))
    return table


def rows_of(draw: DrawMasks, images: pa.Table) -> pa.Table:
    return map_batch(draw, images, schema=SCHEMA, max_pixels=draw.config.max_pixels)


@pytest.mark.parametrize("candidates", ["single", "best_of_three"])
def test_masks_are_those_of_the_predictor(weights: Path, candidates: str) -> None:
    config = make_config(weights, candidates=candidates, empty="drop")
    (row,) = rows_of(DrawMasks(config), prompted({"a": jpeg(*SIZE)}, {"a": GIVEN})).to_pylist()
    predictor = SamPredictor(load_sam("vit_xs", weights))
    predictor.set_image(decode_image(jpeg(*SIZE)))
    wanted, ratings, classes, scores = [], [], [], []
    for i, box in enumerate(BOXES):
        masks, rated, _ = predictor.predict(box=np.array(box), multimask_output=candidates == "best_of_three")
        if masks[rated.argmax()].any():
            wanted.append(masks[rated.argmax()])
            ratings.append(rated.max())
            classes.append(GIVEN["classes"][i])
            scores.append(GIVEN["scores"][i])
    assert len(wanted) > 0
    assert (row["classes"], row["scores"], len(row["dropped"])) == (classes, scores, 3 - len(wanted))
    assert np.allclose(row["predicted_iou"], ratings, atol=1e-4)
    for mask, own, box in zip(wanted, row["masks"], row["boxes"], strict=True):
        assert (decode_rle(own, *SIZE) != mask).sum() <= 1
        ys, xs = np.nonzero(decode_rle(own, *SIZE))
        assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_each_image_has_a_row_and_is_encoded_once_if_it_has_boxes(weights: Path) -> None:
    draw = DrawMasks(make_config(weights))
    images = {"a": jpeg(*SIZE), "none": jpeg(*SIZE), "gone": None, "junk": b"<html>"}
    none: dict[str, list] = {"boxes": [], "classes": [], "scores": []}
    table = rows_of(draw, prompted(images, {"a": GIVEN, "none": none, "gone": GIVEN, "junk": GIVEN}))
    assert table.schema.equals(SCHEMA, check_metadata=True)
    rows = {row["image_id"]: row for row in table.to_pylist()}
    assert [rows[name]["status"] for name in images] == ["ok", "ok", "not_found", "unreadable"]
    assert rows["none"]["masks"] == []
    assert rows["junk"]["masks"] is None
    assert draw.engine.encoder_calls == 1


def test_boxes_may_stay_as_they_were(weights: Path) -> None:
    draw = DrawMasks(make_config(weights, boxes="prompt", empty="box"))
    (row,) = rows_of(draw, prompted({"a": jpeg(*SIZE)}, {"a": GIVEN})).to_pylist()
    assert row["boxes"] == BOXES
    assert len(row["masks"]) == 3


def test_a_row_that_failed_before_stays_failed(tmp_path: Path, weights: Path) -> None:
    images = [{"image_id": name, "uri": str(tmp_path / f"{name}.jpg"), "split": "train"} for name in "ab"]
    for row in images:
        Path(row["uri"]).write_bytes(jpeg(*SIZE))
    given = [
        {"image_id": "a", "status": "oom", "message": "no device memory"},
        {"image_id": "b", "status": "ok", "message": "", **GIVEN},
    ]
    index = finished(tmp_path, "images", images, schemas.IMAGES, {})
    pgt = finished(tmp_path, "pgt", given, schemas.PGT, {"images": index})
    step = make_step(tmp_path, weights, {"images": index, "pgt": pgt})
    draw = DrawMasks(step.config)
    failed, drawn = rows_of(draw, Fetch()(pseudo_masks.read_prompts(step))).to_pylist()
    assert (failed["status"], failed["message"]) == ("oom", "step pgt: no device memory")
    assert (failed["boxes"], failed["masks"]) == (None, None)
    assert (drawn["status"], len(drawn["masks"]), draw.engine.encoder_calls) == ("ok", 3, 1)


def test_what_people_drew_stays_and_what_is_missing_is_drawn(weights: Path) -> None:
    drawn = np.zeros(SIZE, bool)
    drawn[5:9, 5:9] = True
    people = encode_rle(drawn)
    draw = DrawMasks(make_config(weights, max_outside=0.0, empty="drop", exploding="drop"))
    whole = {**GIVEN, "trusted": True, "masks": [people] * 3}
    given = {
        "whole": whole,
        "some": whole | {"masks": [None, people, None]},
        "bare": whole | {"masks": None},
        "none": {"boxes": [], "classes": [], "scores": [], "trusted": True, "masks": None},
        "small": whole | {"masks": [encode_rle(drawn[:20])] * 3},
        "own": GIVEN | {"trusted": False, "masks": [people] * 3},
    }
    table = prompted({name: jpeg(*SIZE) for name in given}, given)
    for key, kind in (("trusted", pa.bool_()), ("masks", pa.list_(pa.large_binary()))):
        table = table.append_column(key, pa.array([one[key] for one in given.values()], kind))
    rows = {row["image_id"]: row for row in rows_of(draw, table).to_pylist()}
    assert draw.engine.encoder_calls == 3  # some, bare, own: the others lack no mask
    for name in ("whole", "some", "bare"):
        assert (rows[name]["boxes"], rows[name]["classes"], rows[name]["dropped"]) == (BOXES, GIVEN["classes"], [])
        assert rows[name]["trusted"]
    assert (rows["whole"]["masks"], rows["whole"]["predicted_iou"]) == ([people] * 3, [None] * 3)
    assert rows["some"]["masks"][1] == people
    assert [value is None for value in rows["some"]["predicted_iou"]] == [False, True, False]
    assert rows["some"]["masks"][::2] == rows["bare"]["masks"][::2]
    assert all(decode_rle(mask, *SIZE).any() for mask in rows["bare"]["masks"])
    assert (rows["none"]["status"], rows["none"]["masks"], rows["none"]["trusted"]) == ("ok", [], True)
    assert rows["small"]["message"] == "the masks that people drew are not of its size, 40 x 60"
    assert (rows["own"]["trusted"], people in rows["own"]["masks"]) == (False, False)


def test_reviewed_rows_bring_their_masks(tmp_path: Path, weights: Path, inputs: dict[str, Step]) -> None:
    mask = encode_rle(np.ones(SIZE, bool))
    row = {"image_id": "b", "status": "ok", **GIVEN, "masks": [mask, None, None], "trusted": True}
    reviewed = finished(tmp_path, "reviewed", [row], schemas.PGT, {"images": inputs["images"]})
    (found,) = pseudo_masks.read_prompts(make_step(tmp_path, weights, inputs | {"pgt": reviewed})).to_pylist()
    assert (found["masks"], found["trusted"], found["boxes"]) == ([mask, None, None], True, BOXES)


IMAGES = [
    {"image_id": name, "uri": f"{name}.jpg", "split": split, "labels": [0]}
    for name, split in (("a", "train"), ("b", "train"), ("t", "test"))
]


def make_step(folder: Path, weights: Path, inputs: dict[str, Step], **settings: object) -> Step:
    config = make_config(weights, **settings)
    return Step("m", pseudo_masks.STAGE, config, inputs, {}, "m", str(folder / "m-m"))


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Step]:
    images = finished(tmp_path, "images", IMAGES, schemas.IMAGES, {})
    rows = [{"image_id": "b", "status": "ok", **GIVEN}, {"image_id": "a", "status": "unreadable"}]
    return {"images": images, "pgt": finished(tmp_path, "pgt", rows, schemas.DETECTIONS, {"images": images})}


def test_the_images_are_those_with_a_row(tmp_path: Path, weights: Path, inputs: dict[str, Step]) -> None:
    source = pseudo_masks.read_prompts(make_step(tmp_path, weights, inputs))
    assert schemas.class_names_of(source.schema) == ["red", "blue"]
    rows = source.to_pylist()
    assert [(row["image_id"], row["uri"]) for row in rows] == [("a", "a.jpg"), ("b", "b.jpg")]
    assert (rows[0]["boxes"], rows[1]["boxes"], rows[1]["classes"]) == (None, BOXES, [1, 0, 1])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_what_people_drew_travels_through_the_cluster(tmp_path: Path, weights: Path) -> None:
    images = [{"image_id": name, "uri": str(tmp_path / f"{name}.jpg"), "split": "train"} for name in "abc"]
    for row in images:
        Path(row["uri"]).write_bytes(jpeg(*SIZE))
    mask = encode_rle(np.ones(SIZE, bool))
    rows = [
        {"image_id": "a", "status": "ok", **GIVEN, "masks": [mask, None, mask], "trusted": True},
        {"image_id": "b", "status": "ok", **GIVEN, "trusted": False},
        {"image_id": "c", "status": "ok", "boxes": [], "classes": [], "scores": [], "trusted": True},
    ]
    index = finished(tmp_path, "images", images, schemas.IMAGES, {})
    reviewed = finished(tmp_path, "reviewed", rows, schemas.PGT, {"images": index})
    step = make_step(tmp_path, weights, {"images": index, "pgt": reviewed}, resources={"max_actors": 1})
    outcome = pseudo_masks.run(step)
    there = {"parts": outcome.parts, "excluded": outcome.excluded}
    drawn = {row["image_id"]: row for row in tables.read_table(step.folder, there).to_pylist()}
    assert [drawn[name]["trusted"] for name in "abc"] == [True, False, True]
    assert (drawn["a"]["boxes"], drawn["a"]["masks"][::2], drawn["c"]["masks"]) == (BOXES, [mask, mask], [])
    assert len(drawn["b"]["masks"]) == 3


def test_a_split_without_boxes_is_named(tmp_path: Path, weights: Path, inputs: dict[str, Step]) -> None:
    with pytest.raises(DataError, match=r"steps\.m\.split: no image of split 'test' has boxes"):
        pseudo_masks.read_prompts(make_step(tmp_path, weights, inputs, split="test"))


def test_boxes_from_elsewhere_prompt_too(tmp_path: Path, weights: Path, inputs: dict[str, Step]) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": "t", "category_id": 2, "bbox": [1, 2, 30, 20]}]))
    found = imported(inputs["images"], path, default_score=1.0)
    step = make_step(tmp_path, weights, inputs | {"detections": found}, pgt=None, detections="found", split="test")
    (row,) = pseudo_masks.read_prompts(step).to_pylist()
    assert (row["image_id"], row["boxes"], row["classes"], row["scores"]) == ("t", [[1, 2, 31, 22]], [1], [1])


def test_one_of_two_sources_prompts(weights: Path) -> None:
    raw = {"images": "i", "sam": {"model": "vit_xs"}}
    for given, named in (({}, "none"), ({"pgt": "p", "detections": "d"}, "pgt, detections")):
        _, faults = parse_settings(PseudoMasksConfig, raw | given, where="steps.m")
        assert faults == [f"steps.m: exactly one of pgt and detections must be set, got {named}"]


def test_statistics_count_what_was_drawn(
    tmp_path: Path, weights: Path, inputs: dict[str, Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, mask = make_step(tmp_path, weights, inputs), encode_rle(np.ones(SIZE, bool))
    size = {"height": SIZE[0], "width": SIZE[1]}
    rows = [
        {"image_id": "a", "status": "ok", **size, **GIVEN, "masks": [mask] * 3, "predicted_iou": [0.5, None, 0.9],
         "mask_state": [0, 2, 0], "dropped": [1, 1]},
        {"image_id": "b", "status": "unreadable"},
    ]  # fmt: skip

    def map_images(step: Step, *_: object, **__: object) -> Outcome:
        return Outcome(2, 1, parts=[tables.write_part(step.folder, schemas.to_table(rows, SCHEMA))])

    monkeypatch.setattr(runtime, "map_images", map_images)
    outcome = pseudo_masks.run(step)
    told = storage.read_json(storage.join(step.folder, "statistics.json"))
    assert told.pop("predicted_iou") == pytest.approx(0.7)
    assert told == {"images": 2, "masks": 3, "dropped": 2, "fits": 2, "empty": 2, "exploding": 1}
    assert outcome.summary == (
        "3 masks, rated 0.70 by SAM; 2 boxes had an empty one, 1 an exploding one, 2 objects left out"
    )
