"""The side-by-side benchmark of the engine runs, and notices masks that differ."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import sam_engine
from benchmarks.mask_agreement import compare, matched
from weaksam.ops.rle import encode_rle
from weaksam.sam.engine import Proposals

HW = (20, 30)


def found(*boxes: tuple[int, int, int, int]) -> Proposals:
    """Masks that fill boxes."""
    masks = []
    for left, top, right, bottom in boxes:
        mask = np.zeros(HW, bool)
        mask[top:bottom, left:right] = True
        masks.append(encode_rle(mask))
    ratings = np.linspace(0.9, 0.5, len(boxes), dtype=np.float32)
    return Proposals(np.array(boxes, np.float32), ratings, ratings, np.zeros(len(boxes), np.uint8), masks)


def records(of: Proposals) -> list[dict]:
    """As the generator of `segment_anything` gives them."""
    pairs = zip(of.masks or [], of.predicted_iou.tolist(), strict=True)
    return [{"segmentation": {"counts": rle.decode(), "size": HW}, "predicted_iou": score} for rle, score in pairs]


def test_the_same_masks_are_the_same_and_others_are_not():
    here, there = found((0, 0, 9, 9), (3, 3, 20, 18)), found((0, 0, 9, 9), (3, 3, 20, 17))
    assert compare(here, records(here), HW) == {"same": True, "masks": 2, "pixels": 0}
    assert compare(here, records(there), HW) == {"same": False, "masks": 2, "pixels": 17}
    assert not compare(here, records(found((0, 0, 9, 9))), HW)["same"]
    rated = replace(here, predicted_iou=here.predicted_iou + 0.01)
    assert not compare(rated, records(here), HW)["same"]


def test_masks_match_by_overlap():
    expected = found((0, 0, 10, 10), (10, 10, 20, 20))
    assert matched([expected], [expected], [HW]) == 1.0
    assert matched([found((0, 0, 10, 9), (12, 10, 20, 20))], [expected], [HW]) == 0.5
    assert matched([found()], [expected], [HW]) == 0.0


def test_it_runs(monkeypatch, capsys):
    arguments = ["--image-sizes", "60x80", "90x70", "--points-per-side", "5", "--thresholds", ".3", ".3", ".7"]
    monkeypatch.setattr("sys.argv", ["sam_engine", "--device", "cpu", "--phases", *arguments])
    assert sam_engine.main() == 0
    told = json.loads(capsys.readouterr().out)
    (model,) = told["models"]
    assert list(model["rows"]) == ["segment_anything", "fp32", "bf16"]
    assert model["rows"]["fp32"]["ratio"] > 0
    assert all(one["masks"] > 0 for one in model["rows"]["fp32"]["agreement"])
    left = list(model["survivors"].values())
    assert left == sorted(left, reverse=True)
    assert left[0] == pytest.approx(75, abs=5)
    for row in model["rows"].values():
        assert row["phases_s"]["total"] >= row["phases_s"]["encode"] > 0
