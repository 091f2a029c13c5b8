"""The last line of a step that finds boxes counts them, so that a step that finds nothing does not look well."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from weaksam.core import schemas, tables
from weaksam.core.step import Outcome
from weaksam.stages.box_counts import summarise_boxes, with_box_counts


def test_boxes_of_ok_rows_are_counted(tmp_path: Path) -> None:
    lists = {"a": [0, 1, 1], "b": [], "c": [1], "d": None}
    rows = [
        {
            "image_id": name,
            "status": schemas.OK if classes is not None else "unreadable",
            "message": "",
            "boxes": None if classes is None else [[0.0, 0.0, 1.0, 1.0]] * len(classes),
            "classes": classes,
            "scores": None if classes is None else [0.5] * len(classes),
        }
        for name, classes in lists.items()
    ]
    schema = schemas.with_metadata(schemas.DETECTIONS, fingerprint="f", class_names=["cat", "dog"])
    parts = [tables.write_part(str(tmp_path), schemas.to_table(half, schema)) for half in (rows[:2], rows[2:])]
    outcome = with_box_counts(str(tmp_path), Outcome(4, failed=1, parts=parts), "classes")
    assert outcome.summary == "1.33 boxes per image, 1 images without any"
    assert (outcome.rows, outcome.failed, outcome.parts) == (4, 1, parts)


def test_no_boxes_and_no_rows() -> None:
    nothing = pa.chunked_array([pa.array([[], []], pa.list_(pa.uint8()))])
    assert summarise_boxes(nothing) == "0.00 boxes per image, 2 images without any"
    assert summarise_boxes(nothing[:0]) == ""
