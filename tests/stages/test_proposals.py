"""The mapper of proposals on a plain table: no cluster, a tiny image, random weights."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from weaksam.core import schemas, storage, tables
from weaksam.core.config import StageConfig, parse_settings
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import ConfigError
from weaksam.execution.mapping import map_batch
from weaksam.models.classifiers.weaktr_weights import build_weaktr
from weaksam.ops.rle import decode_rle
from weaksam.stages import proposals
from weaksam.stages.proposals import ProposalsConfig, ProposeBoxes, TrainedClassifier
from weaksam.stages.train_classifier import TrainClassifierConfig

SCHEMA = schemas.with_metadata(schemas.PROPOSALS, fingerprint="f", class_names=["thing"])


def make_config(weights: Path, **settings: object) -> ProposalsConfig:
    raw = {
        "images": "images",
        "sam": {"model": "vit_xs", "checkpoint": str(weights)},
        "grid": {"points_per_side": 3, "pred_iou_threshold": 0.0, "stability_threshold": 0.0},
    }
    config, faults = parse_settings(ProposalsConfig, {**raw, **settings}, where="steps.p")
    assert isinstance(config, ProposalsConfig), faults
    return config


def jpeg(height: int, width: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def batch(**images: bytes | None) -> pa.Table:
    status = ["ok" if data is not None else "not_found" for data in images.values()]
    return pa.table(
        {
            "image_id": list(images),
            "data": pa.array(list(images.values()), pa.large_binary()),
            "status": status,
            "message": ["" if one == "ok" else "no such object" for one in status],
        }
    )


def rows_of(propose: ProposeBoxes, images: pa.Table) -> pa.Table:
    return map_batch(propose, images, schema=SCHEMA, max_pixels=propose.config.max_pixels)


def test_every_image_has_a_row_of_the_declared_types_whatever_became_of_it(weights: Path) -> None:
    propose = ProposeBoxes(make_config(weights, masks=True, max_pixels=10_000))
    table = rows_of(propose, batch(good=jpeg(40, 60), gone=None, junk=b"<html>", empty=b"", large=jpeg(200, 200)))
    assert table.schema.equals(SCHEMA, check_metadata=True)
    rows = {row["image_id"]: row for row in table.to_pylist()}
    assert {name: row["status"] for name, row in rows.items()} == {
        "good": "ok",
        "gone": "not_found",
        "junk": "unreadable",
        "empty": "unreadable",
        "large": "too_large",
    }
    good = rows["good"]
    assert (good["height"], good["width"]) == (40, 60)
    assert len(good["boxes"]) == len(good["predicted_iou"]) == len(good["source"]) == len(good["masks"]) > 0
    assert all(rows[name]["boxes"] is None for name in ("gone", "junk", "large"))


def test_a_box_is_its_masks_box(weights: Path) -> None:
    propose = ProposeBoxes(make_config(weights, masks=True))
    (row,) = rows_of(propose, batch(a=jpeg(50, 30))).to_pylist()
    for box, mask in zip(row["boxes"], row["masks"], strict=True):
        ys, xs = np.nonzero(decode_rle(mask, 50, 30))
        assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_the_best_rated_come_first_and_the_cap_keeps_them(weights: Path) -> None:
    grid = {"points_per_side": 4, "pred_iou_threshold": 0.0, "stability_threshold": 0.0, "nms_threshold": 1.0}
    (every,) = rows_of(ProposeBoxes(make_config(weights, grid=grid)), batch(a=jpeg(64, 64))).to_pylist()
    (some,) = rows_of(ProposeBoxes(make_config(weights, grid=grid, max_proposals=2)), batch(a=jpeg(64, 64))).to_pylist()
    assert every["predicted_iou"] == sorted(every["predicted_iou"], reverse=True)
    assert some["predicted_iou"] == every["predicted_iou"][:2]
    assert every["masks"] is None


def test_each_image_is_encoded_once(weights: Path) -> None:
    propose = ProposeBoxes(make_config(weights))
    rows_of(propose, batch(a=jpeg(20, 20), b=jpeg(30, 20), broken=b"x"))
    assert propose.engine.encoder_calls == 2


def test_an_official_model_needs_its_weights_named() -> None:
    _, faults = parse_settings(ProposalsConfig, {"images": "i", "sam": {"model": "vit_h"}}, where="steps.p")
    assert len(faults) == 1
    assert faults[0].startswith("steps.p.sam: checkpoint is required for vit_h")


SMALL_PEAKS = {"coarse": {"kernel": 5}, "fine": {"kernel": 5}, "cross": {"kernel": 9}, "scales": [1.0]}
OPEN = {"pred_iou_threshold": 0.0, "stability_threshold": 0.0}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> TrainedClassifier:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("classifier") / "model.safetensors"
    save_file(build_weaktr("frozen_sam", 3).state_dict(), path)
    return TrainedClassifier(str(path), "frozen_sam", gated=False, num_classes=3)


def labelled(batch: pa.Table, labels: list[list[int] | None]) -> pa.Table:
    return batch.append_column("labels", pa.array(labels, pa.list_(pa.int32())))


def test_peaks_prompt_too_and_an_image_is_still_encoded_once(weights: Path, classifier: TrainedClassifier) -> None:
    config = make_config(weights, peaks={**SMALL_PEAKS, **OPEN}, masks=True, duplicate_threshold=None)
    propose = ProposeBoxes(config, classifier)
    images = {"a": jpeg(64, 96), "b": jpeg(48, 48), "broken": b"x"}
    table = rows_of(propose, labelled(batch(**images), [[2, 0], None, [1]]))
    assert table.schema.equals(SCHEMA, check_metadata=True)
    assert propose.engine.encoder_calls == 2
    a, b, broken = table.to_pylist()
    assert a["labels"] == [0, 2]
    assert set(a["source"]) >= {0, 1}
    assert {point["kind"] for point in a["points"]} == {1, 2, 3}
    assert {point["label"] for point in a["points"]} <= {0, 2}
    assert all(0 <= point["x"] < 96 and 0 <= point["y"] < 64 and point["score"] >= 0.9 for point in a["points"])
    assert len(a["masks"]) == len(a["boxes"]) == len(a["source"])
    assert len(b["labels"]) >= 1  # predicted
    assert broken["status"] == "unreadable"
    assert broken["points"] is None


def test_the_grids_part_is_what_the_grid_alone_gives(weights: Path, classifier: TrainedClassifier) -> None:
    images = labelled(batch(a=jpeg(64, 96)), [[0, 1]])
    config = make_config(weights, peaks={**SMALL_PEAKS, **OPEN}, duplicate_threshold=None)
    (every,) = rows_of(ProposeBoxes(config, classifier), images).to_pylist()
    (alone,) = rows_of(ProposeBoxes(make_config(weights)), images).to_pylist()
    grid = [box for box, source in zip(every["boxes"], every["source"], strict=True) if source == 0]
    assert grid == alone["boxes"]
    assert len(every["boxes"]) > len(grid)
    assert alone["points"] == []
    assert alone["labels"] is None


def test_a_kind_that_is_switched_off_prompts_nothing(weights: Path, classifier: TrainedClassifier) -> None:
    peaks = {**SMALL_PEAKS, **OPEN, "fine": {"enabled": False}, "cross": {"enabled": False}}
    images = labelled(batch(a=jpeg(64, 96)), [[0]])
    (row,) = rows_of(ProposeBoxes(make_config(weights, peaks=peaks), classifier), images).to_pylist()
    assert {point["kind"] for point in row["points"]} == {1}
    assert set(row["source"]) <= {0, 1}


def finished_images(folder: Path, rows: list[dict], name: str = "images", names: tuple[str, ...] = ("x", "y")) -> Step:
    stage = Stage("index", 1, StageConfig, lambda step: Outcome(0), writes="images")
    step = Step(name, stage, StageConfig(), {}, {}, name, str(folder / name))
    schema = schemas.with_metadata(schemas.IMAGES, fingerprint="f", class_names=names)
    part = tables.write_part(step.folder, schemas.to_table(rows, schema))
    storage.write_json(step.manifest_uri, {"parts": [part], "excluded": {}})
    return step


def proposals_step(folder: Path, images: Step, trained_on: Step, **peaks: object) -> Step:
    config = TrainClassifierConfig(images="images", split="train", backbone="frozen_sam")
    stage = Stage("train_classifier", 1, TrainClassifierConfig, lambda step: Outcome(0), writes="classifier")
    trained = Step("classifier", stage, config, {"images": trained_on}, {}, "c", str(folder / "classifier"))
    own, faults = parse_settings(
        ProposalsConfig, {"images": "i", "sam": {"model": "vit_xs"}, "peaks": peaks}, where="steps.p"
    )
    assert own, faults
    return Step("p", proposals.STAGE, own, {"images": images, "classifier": trained}, {}, "p", str(folder / "p"))


LISTED = [
    {"image_id": "a", "uri": "a.jpg", "split": "train", "labels": [1]},
    {"image_id": "b", "uri": "b.jpg", "split": "test", "labels": [0]},
    {"image_id": "c", "uri": "c.jpg", "split": "train", "labels": []},
]


def test_labels_are_known_on_the_classifiers_own_split_alone(tmp_path: Path) -> None:
    images = finished_images(tmp_path, LISTED)
    table = images.read()
    step = proposals_step(tmp_path, images, images)
    assert proposals._known_labels(step, table).to_pylist() == [[1], None, []]
    step = proposals_step(tmp_path, images, images, known_splits=[])
    assert proposals._known_labels(step, table).to_pylist() == [None, None, None]
    step = proposals_step(tmp_path, images, images, known_splits=["test"])
    assert proposals._known_labels(step, table).to_pylist() == [None, [0], None]
    elsewhere = finished_images(tmp_path, LISTED, name="other")
    step = proposals_step(tmp_path, images, elsewhere)
    assert proposals._known_labels(step, table).to_pylist() == [None, None, None]
    step = proposals_step(tmp_path, images, images, known_splits=["val"])
    with pytest.raises(ConfigError, match=r"steps.p.peaks.known_splits: no image has split 'val'"):
        proposals._known_labels(step, table)


def test_a_classifier_of_other_classes_is_refused(tmp_path: Path) -> None:
    images = finished_images(tmp_path, LISTED)
    other = finished_images(tmp_path, LISTED, name="other", names=("cat",))
    step = proposals_step(tmp_path, images, other)
    with pytest.raises(ConfigError, match=r"step classifier knows 1 classes \(cat, \.\.\.\), the images have 2"):
        proposals._trained_classifier(step, ["x", "y"])


def test_cross_layers_are_the_third_quarter_unless_named() -> None:
    config = ProposalsConfig(images="i", sam={"model": "vit_xs"})
    assert config.peaks.rules(12).cross_layers == (8, 9)
    assert config.peaks.rules(6).cross_layers == (4,)
    assert config.peaks.rules(4).cross_layers == (2,)
    _, faults = parse_settings(
        ProposalsConfig,
        {"images": "i", "sam": {"model": "vit_xs"}, "peaks": {"coarse": {"kernel": 4}, "keep_masks": [3]}},
        where="steps.p",
    )
    assert sorted(faults) == [
        "steps.p.peaks.coarse: kernel must be odd, got 4",
        "steps.p.peaks.keep_masks.0: input should be 0, 1 or 2, got 3",
    ]


def test_precision_and_amounts_reach_the_engine(weights: Path) -> None:
    sam = {"model": "vit_xs", "checkpoint": str(weights), "precision": "bf16"}
    resources = {"points_per_chunk": 7, "compile_encoder": True}
    engine = ProposeBoxes(make_config(weights, sam=sam, resources=resources)).engine
    assert (engine.settings.precision, engine.settings.compiled) == ("bf16", True)
    assert (engine.settings.points_per_side, engine.amounts.points) == (3, 7)
    assert ProposeBoxes(make_config(weights)).engine.settings.precision == "fp32"


def test_precision_is_part_of_what_a_step_is_known_by(weights: Path) -> None:
    from weaksam.core.config import result_settings

    def known_by(**sam: str) -> object:
        config = make_config(weights, sam={"model": "vit_xs", "checkpoint": str(weights), **sam})
        return result_settings(config)

    assert known_by() != known_by(precision="fp16")
