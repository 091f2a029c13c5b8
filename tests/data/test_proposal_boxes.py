"""Proposals of a table as a detector gets them: cleaned, packed, of some sources."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from weaksam.core import schemas
from weaksam.data.proposal_boxes import clean_boxes, keep_sources, pack_proposals


def test_proposals_are_cut_and_cleaned() -> None:
    boxes = np.array([[-5, 2, 20, 30], [0, 2, 20.3, 30], [0, 0, 3, 40], [50, 0, 90, 70]], np.float32)
    cleaned, rows = clean_boxes(boxes, 60, 80, min_side=8)
    assert (cleaned.tolist(), rows.tolist()) == ([[0, 2, 20, 30], [50, 0, 80, 60]], [0, 3])
    assert clean_boxes(np.zeros((0, 4), np.float32), 0, 0, min_side=8)[0].shape == (0, 4)


def test_proposals_of_some_sources() -> None:
    boxes = np.arange(12, dtype=np.float32).reshape(3, 4)
    rows = [
        {"image_id": "a", "status": "ok", "boxes": boxes, "source": [0, 3, 1], "predicted_iou": [0.5, 0.25, 1.0]},
        {"image_id": "b", "status": "unreadable"},
        {"image_id": "c", "status": "ok", "boxes": boxes[:1], "source": [2], "predicted_iou": [0.0]},
    ]
    table = schemas.to_table(rows, schemas.PROPOSALS).select(["predicted_iou", "boxes", "source", "image_id"])
    kept = keep_sources(table, [0, 1])
    assert kept.column("boxes").to_pylist() == [boxes[[0, 2]].tolist(), [], []]
    assert kept.column("predicted_iou").to_pylist() == [[0.5, 1.0], [], []]
    assert kept.schema.equals(table.schema)
    assert keep_sources(table, None) is table


def test_packed_proposals_are_those_of_the_table() -> None:
    rows = [
        {"image_id": "a", "status": "ok", "boxes": np.array([[0, 0, 9, 9]], np.float32), "height": 10, "width": 20}
        | {"predicted_iou": [0.5]},
        {"image_id": "b", "status": "unreadable"},
        {"image_id": "c", "status": "ok", "boxes": np.zeros((0, 4), np.float32), "height": 5, "width": 5}
        | {"predicted_iou": []},
        {"image_id": "d", "status": "ok", "boxes": np.array([[1, 1, 2, 1], [0, 0, 4, 4]]), "height": 7, "width": 8}
        | {"predicted_iou": [0.25, 0.75]},
    ]
    packed = pack_proposals(schemas.to_table(rows, schemas.PROPOSALS), ["d", "b", "a"])
    assert packed.starts.tolist() == [0, 2, 2, 3]
    assert packed.sizes.tolist() == [[7, 8], [0, 0], [10, 20]]
    assert packed.of(2, min_side=1)[0].tolist() == [[0, 0, 9, 9]]
    assert packed.of(0, min_side=1)[1].tolist() == [0.75]
    assert len(packed.of(1, min_side=1)[0]) == 0
    with pytest.raises(KeyError):
        pack_proposals(pa.table({"image_id": ["a"]}), ["z"])
