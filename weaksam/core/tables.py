"""Tables on storage: a folder of Parquet parts, each written atomically, and the rules that count a row once.

The name of a part contains the hash of its sorted image ids and their number: rows that are written again replace
themselves, and a listing is enough to compute the progress.
A finished table consists of the parts in its manifest; ids in two parts are read from the first part only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute

from weaksam.core import schemas, storage
from weaksam.core.parquet_files import read_parquet, write_parquet
from weaksam.errors import ConfigError, DamagedError, DataError

pc: Any = pyarrow.compute  # makes its functions when it is imported, which type checkers cannot follow

GROUND_TRUTH = "ground_truth"  # subfolder of an index step
_THREADS = 16
_AGAIN = "remove manifest.json beside it if there is one, and run the step again"
_PART = re.compile(r"part-[0-9a-f]+-\d+\.parquet")


def part_name(image_ids: Sequence[str]) -> str:
    """Returns `part-<hash of the sorted ids>-<number of ids>.parquet`."""
    digest = hashlib.sha256(json.dumps(sorted(image_ids)).encode()).hexdigest()
    return f"part-{digest[:16]}-{len(image_ids)}.parquet"


def is_part(name: str) -> bool:
    """Whether a file name is that of a part."""
    return _PART.fullmatch(name) is not None


def rows_in(part: str) -> int:
    """Returns the number of rows of a part, from its name."""
    return int(part.removesuffix(".parquet").rsplit("-", 1)[1])


def write_part(folder: str, table: pa.Table) -> str:
    """Writes one part atomically and returns its file name; raises ValueError for a repeated image id."""
    ids = table.column("image_id").to_pylist()
    if len(set(ids)) < len(ids):
        raise ValueError(f"a part must hold each image id once, got {len(ids) - len(set(ids))} of {len(ids)} again")
    name = part_name(ids)
    write_parquet(storage.join(folder, name), table)
    return name


def list_parts(folder: str) -> list[str]:
    """Returns the file names of the parts in a folder, sorted."""
    files = storage.list_files(folder, recursive=False)
    return [file.path for file in files if is_part(file.path)]


def read_parts(folder: str, parts: Sequence[str], *, columns: Sequence[str] | None = None) -> list[pa.Table]:
    """Reads parts in parallel and returns them in order.

    Raises:
        DamagedError: a part is missing, was altered after it was written, or is not the name of a part.
        DataError: a part was written by another major version.
    """
    _check_names(folder, parts)

    def read(part: str) -> pa.Table:
        table = _read_part(folder, part, columns)
        if table.num_rows != rows_in(part):
            raise DamagedError(
                f"{storage.join(folder, part)}: damaged ({table.num_rows} rows, {rows_in(part)} were written): remove "
                f"it; {_AGAIN}"
            )
        return table

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(read, parts))


def _check_names(folder: str, parts: Sequence[str]) -> None:
    if foreign := [part for part in parts if not isinstance(part, str) or not is_part(part)]:
        raise DamagedError(f"{folder}: the manifest lists {foreign[0]!r}, which is no part of a table: {_AGAIN}")


def _read_part(folder: str, part: str, columns: Sequence[str] | None) -> pa.Table:
    uri = storage.join(folder, part)
    try:
        table = read_parquet(uri, columns=columns)
    except FileNotFoundError as error:
        raise DamagedError(f"{uri}: the manifest lists it, but it is gone: {_AGAIN}") from error
    except DamagedError as error:
        raise DamagedError(f"{error}; {_AGAIN}") from error
    schemas.check_version(table.schema, where=uri)
    return table


def done_ids(folder: str) -> dict[str, list[str]]:
    """Returns the image ids of every part, by part name in sorted order."""
    parts = list_parts(folder)
    tables = read_parts(folder, parts, columns=["image_id"])
    return {part: table.column("image_id").to_pylist() for part, table in zip(parts, tables, strict=True)}


def missing_ids(folder: str, parts: Sequence[str]) -> set[str]:
    """Returns the image ids of the rows with status `not_found`."""
    missing: set[str] = set()
    for table in read_parts(folder, parts, columns=["image_id", "status"]):
        if "status" in table.column_names:
            rows = zip(table.column("image_id").to_pylist(), table.column("status").to_pylist(), strict=True)
            missing.update(image_id for image_id, status in rows if status == schemas.NOT_FOUND)
    return missing


def drop_rows(folder: str, image_ids: Iterable[str]) -> None:
    """Removes rows from the parts of an unfinished step: writes a part without them, then deletes the old one."""
    dropped = set(image_ids)
    for part, ids in done_ids(folder).items():
        if dropped.isdisjoint(ids):
            continue
        kept = without_ids(read_parts(folder, [part])[0], dropped)
        if kept.num_rows:
            write_part(folder, kept)
        storage.delete(storage.join(folder, part))


def first_wins(ids_by_part: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Returns the ids to exclude from each part because an earlier part has them; parts without any are not listed.

    Two parts overlap when a task presumed dead finishes after another task has computed its rows in other groups.
    """
    earlier: set[str] = set()
    excluded: dict[str, list[str]] = {}
    for part, ids in ids_by_part.items():
        again = [image_id for image_id in ids if image_id in earlier]
        if again:
            excluded[part] = again
        earlier.update(ids)
    return excluded


def read_table(folder: str, manifest: Mapping[str, Any], *, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads the finished table of a step, sorted by image id: every id once.

    Args:
        folder: the step's folder.
        manifest: its manifest.
        columns: the columns to read; `image_id` is added. None: all.
    """
    selected = None if columns is None else list(dict.fromkeys(["image_id", *columns]))
    kept = []
    for part, table in zip(manifest["parts"], read_parts(folder, manifest["parts"], columns=selected), strict=True):
        if again := manifest["excluded"].get(part):
            table = without_ids(table, again)
        kept.append(table)
    if not kept:
        raise DataError(f"{folder}: the manifest lists no parts: the step has no rows")
    return pa.concat_tables(kept).sort_by("image_id")


def rows_for(table: pa.Table, image_ids: Iterable[str], *, may_lack: bool = False) -> pa.Table:
    """Returns the rows of `image_ids`, in that order.

    Args:
        table: a table with each image id at most once.
        image_ids: ids of the rows.
        may_lack: whether an image may have no row; all its values are null then, including its id.

    Raises:
        KeyError: an image has no row.
    """
    ids = pa.array(list(image_ids), pa.string())
    rows = pc.index_in(ids, value_set=table["image_id"].combine_chunks())
    if rows.null_count and not may_lack:
        raise KeyError(ids.filter(rows.is_null())[0].as_py())
    return table.take(rows)


def with_ids(table: pa.Table, image_ids: Iterable[str]) -> pa.Table:
    """Returns the rows of `table` whose image id is in `image_ids`, in table order."""
    return table.filter(_is_among(table, image_ids))


def without_ids(table: pa.Table, image_ids: Iterable[str]) -> pa.Table:
    """Returns the rows of `table` whose image id is not in `image_ids`, in table order."""
    return table.filter(pc.invert(_is_among(table, image_ids)))


def _is_among(table: pa.Table, image_ids: Iterable[str]) -> pa.ChunkedArray:
    return pc.is_in(table["image_id"], value_set=pa.array(list(image_ids), pa.string()))


def with_status_ok(table: pa.Table) -> pa.Table:
    """Returns the rows of `table` whose status is ok."""
    return table.filter(pc.equal(table["status"], schemas.OK))


def of_split(images: pa.Table, split: str, *, where: str) -> pa.Table:
    """Returns the rows of one split.

    Raises:
        ConfigError: the split has no rows; `where` is the setting that names the split.
    """
    rows = images.filter(pc.equal(images["split"], split))
    if not rows.num_rows:
        splits = ", ".join(sorted(images["split"].unique().to_pylist()))
        raise ConfigError(f"{where}: no image has split '{split}': splits are {splits}")
    return rows


def read_class_names(folder: str, manifest: Mapping[str, Any]) -> list[str]:
    """Returns the class names of a finished table.

    Manifests of older versions lack them: they are read from the schema of the first part. A table without parts has
    none.
    """
    if (names := manifest.get("class_names")) is not None:
        return names
    parts = manifest["parts"][:1]
    _check_names(folder, parts)
    return schemas.class_names_of(_read_part(folder, parts[0], []).schema) if parts else []


def read_rows(folder: str, manifest: Mapping[str, Any], image_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Reads the rows of a few images of a finished table, by image id; of parts without them only the ids are read."""
    selected = set(image_ids)
    rows: dict[str, dict[str, Any]] = {}
    listed = read_parts(folder, manifest["parts"], columns=["image_id"])
    holding = [
        part
        for part, table in zip(manifest["parts"], listed, strict=True)
        if not selected.isdisjoint(table.column("image_id").to_pylist())
    ]
    for table in read_parts(folder, holding):
        for row in with_ids(table, selected).to_pylist():
            rows.setdefault(row["image_id"], row)  # an id in two parts: the first part wins
    return rows


def row_at(table: pa.Table, index: int) -> dict[str, Any]:
    """Returns a row, with lists of numbers as arrays: Python objects are too slow for millions of boxes."""
    row: dict[str, Any] = {}
    for name in table.column_names:
        value = table.column(name)[index]
        if not pa.types.is_list(value.type) or pa.types.is_large_binary(value.type.value_type):
            row[name] = value.as_py()
        elif value.values is None:
            row[name] = []
        elif name == "boxes":
            row[name] = value.values.flatten().to_numpy().reshape(-1, 4)
        else:
            row[name] = value.values.to_numpy(zero_copy_only=False)
    return row


def write_ground_truth(folder: str, table: pa.Table) -> None:
    """Writes the ground truth of an index step to a subfolder that no training stage reads."""
    write_part(storage.join(folder, GROUND_TRUTH), table)


def read_ground_truth(folder: str) -> pa.Table | None:
    """Reads the ground truth of an index step, sorted by image id, or None. Only for `evaluate` and `report`."""
    below = storage.join(folder, GROUND_TRUTH)
    tables = read_parts(below, list_parts(below))
    return pa.concat_tables(tables).sort_by("image_id") if tables else None
