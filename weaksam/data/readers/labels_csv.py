"""Reads the CSV file of a labelled folder: the labels of each image.

UTF-8 with a header: columns `file` and `labels`, and optionally `split`; other columns are ignored, and so are empty
cells after the last column. Labels are separated by ';' or '|', or on several lines of the same file. An empty cell
means that the image shows none of the classes. Without a split column all images are split `train`.
"""

from __future__ import annotations

import csv
import io
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from weaksam.core import storage
from weaksam.errors import DataError

DEFAULT_SPLIT = "train"
_COLUMNS = ("file", "labels", "split")
_MOST_FAULTS = 20  # listed per table


@dataclass
class Listed:
    """Split and labels of a file; `line` is the first line that names it."""

    line: int
    split: str
    labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Row:
    """A line: its cells by column name, or its fault."""

    line: int
    cells: dict[str, str] = field(default_factory=dict)
    fault: str = ""


def read_labels(uri: str, classes: Sequence[str] | None) -> tuple[dict[str, Listed], list[str]]:
    """Reads split and labels of each file, by its path below the folder, and the faults of the table.

    Args:
        uri: URI of the CSV file.
        classes: the allowed labels; None: any.

    Returns:
        listed: the files of all lines without a fault.
        faults: at most one per line: the first twenty and the number of others; empty if the table is valid.

    Raises:
        DataError: there is no such file, or it is not text.
        StorageError: the storage is at fault.
    """
    listed: dict[str, Listed] = {}
    faults: list[str] = []
    for row in _rows(uri):
        if fault := row.fault or _add(listed, row, classes):
            faults.append(f"{uri}, line {row.line}: {fault}")
    if not listed and not faults:
        faults.append(f"{uri}: lists no image")
    if len(faults) > _MOST_FAULTS:
        faults[_MOST_FAULTS:] = [f"{uri}: {len(faults) - _MOST_FAULTS} more lines have faults"]
    return listed, faults


def _add(listed: dict[str, Listed], row: _Row, classes: Sequence[str] | None) -> str | None:
    """Adds a line to `listed` and returns None, or returns its fault and adds nothing."""
    file = row.cells["file"]
    path = posixpath.normpath(file.replace("\\", "/")) if file else ""
    if not path or path.startswith(("/", "../")):
        return f"the file is {file!r}: a path below the folder was expected"
    split = row.cells.get("split", DEFAULT_SPLIT)
    if not split:
        return f"the split of {path} is empty"
    entry = listed.get(path, Listed(row.line, split))
    if entry.split != split:
        return f"{path} is in split {split!r}, line {entry.line} says {entry.split!r}"
    labels = [label.strip() for label in re.split("[;|]", row.cells["labels"]) if label.strip()]
    for position, label in enumerate(labels):
        if classes is not None and label not in classes:
            return f"class {label!r} is not among the classes {list(classes)}"
        if label in entry.labels or label in labels[:position]:
            return f"{path} has label {label!r} already: remove the line or the label"
    if path in listed and not (labels and entry.labels):
        if labels or entry.labels:
            return f"{path} is also in line {entry.line}: only one of them says that it shows no class: remove one"
        return f"{path} has label '' already: remove the line or the label"
    entry.labels += labels
    listed[path] = entry
    return None


def _rows(uri: str) -> Iterator[_Row]:
    """Yields the lines after the header without blank ones. Stops after a bad header or a line that is not CSV."""
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{uri}: no such file: a CSV file with columns file and labels was expected") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{uri}: not UTF-8 text ({error}): save it as CSV UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    header: list[str] = []
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield _Row(reader.line_num, fault=f"not valid CSV ({error})")
            return
        if cells is None:
            return
        cells = _without_empty_end([cell.strip() for cell in cells], least=len(header))
        if not cells or not any(cells):
            continue
        if header:
            yield _to_row(reader.line_num, cells, header)
            continue
        header = [cell.lower() for cell in cells]
        counts = [header.count(name) for name in _COLUMNS]
        if counts[0] != 1 or counts[1] != 1 or counts[2] > 1:
            got = repr(",".join(cells))
            expected = "a header with the columns file, labels (and split) between commas was expected"
            yield _Row(reader.line_num, fault=f"{expected}, got {got}")
            return


def _without_empty_end(cells: list[str], *, least: int) -> list[str]:
    """Removes empty cells at the end, which spreadsheets write, but keeps the first `least` cells."""
    count = len(cells)
    while count > least and not cells[count - 1]:
        count -= 1
    return cells[:count]


def _to_row(line: int, cells: list[str], header: list[str]) -> _Row:
    if len(cells) != len(header):
        return _Row(line, fault=f"{len(cells)} cells, the header has {len(header)}: separate labels with ';'")
    named = dict(zip(header, cells, strict=True))
    return _Row(line, {name: named[name] for name in _COLUMNS if name in named})
