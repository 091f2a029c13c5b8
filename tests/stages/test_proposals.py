"""The proposals callable on a plain table: no cluster, a tiny image, random weights."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from weaksam import schemas
from weaksam.config import parse_settings
from weaksam.ops.masks import decode_rle
from weaksam.sam.build import build_sam
from weaksam.stages.proposals import ProposalsConfig, ProposeBoxes

SCHEMA = schemas.with_metadata(schemas.PROPOSALS, fingerprint="f", class_names=["thing"])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(build_sam("vit_xs").state_dict(), path)
    return path


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


def test_every_image_has_a_row_of_the_declared_types_whatever_became_of_it(weights: Path) -> None:
    propose = ProposeBoxes(make_config(weights, masks=True, max_pixels=10_000), SCHEMA)
    table = propose(batch(good=jpeg(40, 60), gone=None, junk=b"<html>", empty=b"", large=jpeg(200, 200)))
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
    propose = ProposeBoxes(make_config(weights, masks=True), SCHEMA)
    (row,) = propose(batch(a=jpeg(50, 30))).to_pylist()
    for box, mask in zip(row["boxes"], row["masks"], strict=True):
        ys, xs = np.nonzero(decode_rle(mask, 50, 30))
        assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_the_best_rated_come_first_and_the_cap_keeps_them(weights: Path) -> None:
    grid = {"points_per_side": 4, "pred_iou_threshold": 0.0, "stability_threshold": 0.0, "nms_threshold": 1.0}
    (every,) = ProposeBoxes(make_config(weights, grid=grid), SCHEMA)(batch(a=jpeg(64, 64))).to_pylist()
    (some,) = ProposeBoxes(make_config(weights, grid=grid, max_proposals=2), SCHEMA)(batch(a=jpeg(64, 64))).to_pylist()
    assert every["predicted_iou"] == sorted(every["predicted_iou"], reverse=True)
    assert some["predicted_iou"] == every["predicted_iou"][:2]
    assert every["masks"] is None


def test_each_image_is_encoded_once(weights: Path) -> None:
    propose = ProposeBoxes(make_config(weights), SCHEMA)
    propose(batch(a=jpeg(20, 20), b=jpeg(30, 20), broken=b"x"))
    assert propose.engine.encoder_calls == 2


def test_an_official_model_needs_its_weights_named() -> None:
    _, faults = parse_settings(ProposalsConfig, {"images": "i", "sam": {"model": "vit_h"}}, where="steps.p")
    assert len(faults) == 1
    assert faults[0].startswith("steps.p.sam: checkpoint is required for vit_h")
