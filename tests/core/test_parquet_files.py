"""A part that was altered after it was written is named as damaged, and never read as other data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from weaksam.core import schemas, step_files, storage, tables
from weaksam.core.parquet_files import read_parquet, write_parquet
from weaksam.errors import DamagedError, DataError

SCHEMA = schemas.with_metadata(schemas.PROPOSALS, fingerprint="abc", class_names=["cat", "dog"])


def make_table(rows: int = 4) -> pa.Table:
    draw = np.random.default_rng(0)
    return schemas.to_table(
        [
            {
                "image_id": str(index),
                "status": "ok",
                "boxes": draw.random((3, 4), np.float32),
                "predicted_iou": draw.random(3, np.float32),
                "source": np.zeros(3, np.uint8),
                "masks": [draw.bytes(9) for _ in range(3)],
                "points": [{"x": 1.0, "y": 2.0, "label": 0, "score": 0.5, "kind": 1}],
            }
            for index in range(rows)
        ],
        SCHEMA,
    )


def test_no_flipped_bit_reads_as_other_data(tmp_path: Path) -> None:
    table, folder = make_table(), str(tmp_path)
    name = tables.write_part(folder, table)
    path = tmp_path / name
    whole = path.read_bytes()
    damaged = 0
    for position in range(4, len(whole), len(whole) // 120):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            (found,) = tables.read_parts(folder, [name])
        except DataError as error:
            damaged += isinstance(error, DamagedError) and name in str(error)
        else:  # a byte that no reader looks at, such as statistics
            assert found.equals(table)
            assert schemas.class_names_of(found.schema) == ["cat", "dog"]
    assert damaged > 60


def test_names_of_classes_and_columns_are_protected(tmp_path: Path) -> None:
    path = tmp_path / tables.write_part(str(tmp_path), make_table())
    whole = path.read_bytes()
    for text, other in ((b'"cat", "dog"', b'"cau", "dog"'), (b"predicted_iou", b"predicted_iow")):
        path.write_bytes(whole.replace(text, other))
        try:
            assert read_parquet(str(path)).equals(make_table(), check_metadata=True)  # there is a second copy
        except DamagedError:
            continue
    other = make_table().schema.with_metadata({**(SCHEMA.metadata or {}), "weaksam.schema_crc32": "00000000"})
    pq.write_table(make_table().cast(other), path)
    with pytest.raises(DamagedError, match=rf"{path.name}: damaged \(the checksum of its schema .*: remove it"):
        read_parquet(str(path))


def test_what_a_table_carries_is_read_as_it_was_written(tmp_path: Path) -> None:
    uri = str(tmp_path / "a.parquet")
    for table in (make_table(), pa.table({"class": ["cat"], "ap": pa.nulls(1), "n": [3]}), make_table(0)):
        write_parquet(uri, table)
        assert read_parquet(uri).equals(table)
        assert read_parquet(uri).schema.metadata == table.schema.metadata
        assert pq.read_table(uri).equals(table)
    write_parquet(uri, make_table())
    assert read_parquet(uri, columns=["image_id"]).column_names == ["image_id"]


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    pq.write_table(make_table(), tmp_path / "old.parquet")
    assert read_parquet(str(tmp_path / "old.parquet")).equals(make_table())


def test_a_cut_part_is_damaged_and_a_missing_one_is_missing(tmp_path: Path) -> None:
    name = tables.write_part(str(tmp_path), make_table())
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedError, match=rf"{name}: damaged .*: remove it; remove manifest.json beside it"):
        tables.read_parts(str(tmp_path), [name])
    with pytest.raises(FileNotFoundError):
        read_parquet(str(tmp_path / "none.parquet"))


def test_files_that_a_finished_step_has_lost_are_found_by_a_listing(tmp_path: Path) -> None:
    folder = str(tmp_path)
    first, second = (tables.write_part(folder, make_table().slice(start, 2)) for start in (0, 2))
    tables.write_part(f"{folder}/ground_truth", make_table())
    storage.write_bytes(f"{folder}/checkpoint/model.safetensors", b"weights")
    storage.write_bytes(f"{folder}/checkpoint/checkpoint_1/state.pt", b"...")
    manifest = {"parts": [first, second], "files": step_files.lasting_files(folder)}
    assert len(manifest["files"]) == 4
    assert step_files.lost_files(folder, manifest) == {}
    truth = next(path for path in manifest["files"] if path.startswith("ground_truth/"))
    (tmp_path / truth).unlink()
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"wei")
    (tmp_path / first).write_bytes((tmp_path / first).read_bytes()[:-9])
    pq.write_table(make_table().slice(2, 2), tmp_path / second)  # another size, whole
    lost = step_files.lost_files(folder, manifest)
    assert set(lost) == {truth, "checkpoint/model.safetensors", first}
    assert (lost[truth], lost["checkpoint/model.safetensors"]) == ("is gone", "has 3 bytes, 7 were written")
    outside = {"../part-0-1.parquet": 1, "/etc/part-0-1.parquet": 1, "../../etc/passwd": 1}
    assert step_files.lost_files(folder, {"files": outside}) == {
        "/etc/part-0-1.parquet": "is gone"
    }  # that is, below it
    assert step_files.lost_files(folder, {"parts": [first, "part-0-1.parquet"]}) == {"part-0-1.parquet": "is gone"}
