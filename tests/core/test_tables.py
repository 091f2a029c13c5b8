"""Schemas keep their types, parts keep their promises, readers refuse what they do not know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from weaksam.core import schemas, storage, tables
from weaksam.core.config import StageConfig
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import DamagedError, DataError, StageError

SCHEMA = schemas.with_metadata(schemas.PROPOSALS, fingerprint="abc", class_names=["cat", "dog"])
ROW = {
    "image_id": "1",
    "status": "ok",
    "boxes": np.array([[0, 0, 2, 3]], np.float32),
    "predicted_iou": np.array([0.5], np.float32),
    "source": np.array([0], np.uint8),
    "masks": [b"12"],
    "points": [{"x": 1.0, "y": 2.0, "label": 0, "score": 0.5, "kind": 1}],
}


def test_rows_become_exactly_the_schema_whatever_lists_they_hold() -> None:
    table = schemas.to_table([ROW, {"image_id": "2", "status": "unreadable", "boxes": np.zeros((0, 4))}], SCHEMA)
    assert table.schema.equals(SCHEMA, check_metadata=True)
    first, second = table.to_pylist()
    assert first["boxes"] == [[0, 0, 2, 3]]
    assert first["points"][0]["kind"] == 1
    assert second["boxes"] == []
    assert second["masks"] is None
    assert schemas.to_table([], SCHEMA).num_rows == 0


def test_a_part_is_read_back_as_it_was(tmp_path: Path) -> None:
    table = schemas.to_table([ROW], SCHEMA)
    name = tables.write_part(str(tmp_path), table)
    (read,) = tables.read_parts(str(tmp_path), [name])
    assert read.equals(table)
    assert read.schema.equals(SCHEMA, check_metadata=True)
    assert schemas.class_names_of(read.schema) == ["cat", "dog"]
    assert tables.rows_in(name) == 1


def test_another_major_version_is_refused(tmp_path: Path) -> None:
    schema = SCHEMA.with_metadata({"weaksam.schema_version": "2.0"})
    name = tables.write_part(str(tmp_path), schemas.to_table([ROW], schema))
    with pytest.raises(DataError, match=rf"{name}: written with table version 2\.0, this weaksam reads 1\.x"):
        tables.read_parts(str(tmp_path), [name])
    pq.write_table(pa.table({"image_id": ["1"]}), tmp_path / "part-0-1.parquet")
    with pytest.raises(DataError, match="table version none"):
        tables.read_parts(str(tmp_path), ["part-0-1.parquet"])


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "part-0-1.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"part-0-1\.parquet: damaged"):
        tables.done_ids(str(tmp_path))


def test_rows_are_joined_and_filtered_by_image_id() -> None:
    given = [("a", "ok", 2), ("b", "oom", 0), ("c", "ok", 1)]
    rows = [{"image_id": name, "status": status, "boxes": [[0, 0, 2, 3]] * count} for name, status, count in given]
    parts = (schemas.to_table(some, schemas.DETECTIONS) for some in (rows[:2], rows[2:]))
    table = pa.concat_tables(parts)

    def ids(found: pa.Table) -> list[str | None]:
        assert found.schema.equals(table.schema)
        return found.column("image_id").to_pylist()

    joined = tables.rows_for(table, ["c", "a", "c"])
    assert (ids(joined), [len(boxes) for boxes in joined.column("boxes").to_pylist()]) == (["c", "a", "c"], [1, 2, 1])
    assert ids(tables.rows_for(table, [])) == ids(tables.rows_for(table.slice(0, 0), [])) == []
    with pytest.raises(KeyError, match="x"):
        tables.rows_for(table, ["a", "x", "y"])
    lacking = tables.rows_for(table, ["x", "a"], may_lack=True)
    assert ids(lacking) == [None, "a"]
    assert lacking.column("status").to_pylist() == [None, "ok"]
    assert (ids(tables.with_ids(table, {"c", "a", "x"})), ids(tables.with_ids(table, []))) == (["a", "c"], [])
    assert (ids(tables.without_ids(table, ["a", "x"])), ids(tables.without_ids(table, []))) == (["b", "c"], [*"abc"])
    assert ids(tables.with_status_ok(table)) == ["a", "c"]


def test_an_unfinished_step_cannot_be_read() -> None:
    stage = Stage("s", 1, StageConfig, lambda step: Outcome(0), writes="things")
    with pytest.raises(StageError, match="step a: not finished"):
        Step("a", stage, StageConfig(), {}, {}, "f", "memory://nowhere").read()


def test_parts_written_after_the_manifest_are_not_read(tmp_path: Path) -> None:
    first = tables.write_part(str(tmp_path), schemas.to_table([ROW], SCHEMA))
    tables.write_part(str(tmp_path), schemas.to_table([{**ROW, "image_id": "late"}], SCHEMA))
    table = tables.read_table(str(tmp_path), {"parts": [first], "excluded": {}})
    assert table.column("image_id").to_pylist() == ["1"]


def test_ground_truth_lies_apart(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert tables.read_ground_truth(folder) is None
    schema = schemas.with_metadata(schemas.GROUND_TRUTH, fingerprint="f", class_names=["cat"])
    row = {
        "image_id": "1",
        "boxes": [[0, 0, 1, 1]],
        "classes": [0],
        "difficult": [False],
        "crowd": [False],
        "masks": [None],
        "areas": [0.5],
    }
    tables.write_ground_truth(folder, schemas.to_table([row], schema))
    assert tables.list_parts(folder) == []
    assert storage.list_folders(folder) == ["ground_truth"]
    truth = tables.read_ground_truth(folder)
    assert truth is not None
    assert truth.to_pylist() == [row]


@pytest.mark.parametrize(
    "part", ["../../etc/passwd", "/etc/passwd", "part-1.parquet/../x", "s3://b/part-00-1.parquet", 3]
)
def test_a_manifest_that_names_something_else_than_parts_is_damaged(part: object, tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="which is no part of a table"):
        tables.read_table(str(tmp_path), {"parts": [part], "excluded": {}})


def test_class_names_come_from_the_manifest_and_no_part_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(uri: str, **_: object) -> None:
        raise AssertionError(f"{uri} was opened")

    monkeypatch.setattr(tables, "read_parquet", refuse)
    manifest = {"parts": ["part-0-1.parquet"], "class_names": ["cat", "dog"]}
    assert tables.read_class_names(str(tmp_path), manifest) == ["cat", "dog"]


def test_class_names_of_an_older_manifest_come_from_the_schema_and_no_row_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tables.write_part(str(tmp_path), schemas.to_table([ROW], SCHEMA))
    read, asked = tables.read_parquet, []

    def count(uri: str, *, columns: list[str] | None = None) -> pa.Table:
        asked.append(columns)
        return read(uri, columns=columns)

    monkeypatch.setattr(tables, "read_parquet", count)
    manifest = {"parts": [part, "part-1-1.parquet"], "excluded": {}}
    assert tables.read_class_names(str(tmp_path), manifest) == ["cat", "dog"]
    assert asked == [[]]
    with pytest.raises(DamagedError, match=r"part-1-1\.parquet: the manifest lists it, but it is gone"):
        tables.read_class_names(str(tmp_path), {"parts": ["part-1-1.parquet"]})
    with pytest.raises(DamagedError, match="is no part of a table"):
        tables.read_class_names(str(tmp_path), {"parts": ["../part-1-1.parquet"]})
