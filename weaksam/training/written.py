"""Reads the records of a training: rows of metrics, and samples left out. Imports neither Ray nor torch.

Both files are for users and progress, and a store may have cut them off: an unreadable line is skipped with a warning,
and never ends a training that could resume from its checkpoints.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import Any

from weaksam.core import storage
from weaksam.core.schemas import FAILED_STATUSES

METRICS, LEFT_OUT = "training_log.jsonl", "left_out.jsonl"

log = logging.getLogger(__name__)


def read_metrics(folder: str, *, warns: bool = True) -> list[dict[str, Any]]:
    """Reads the rows of metrics of a training's folder, in their order; NaN and infinity are None.

    Raises:
        StorageError: the file exists and cannot be read.
    """
    rows = _read_rows(storage.join(folder, METRICS), _is_metrics, warns=warns)
    return [{key: _finite(value) for key, value in row.items()} for row in rows]


def read_left_out(folder: str) -> list[dict[str, Any]]:
    """Reads the samples left out of a training: `sample`, first `step`, `name` and `status` of each.

    Raises:
        StorageError: the file exists and cannot be read.
    """
    return _read_rows(storage.join(folder, LEFT_OUT), _is_left_out, warns=True)


def _read_rows(uri: str, is_row: Callable[[Any], bool], *, warns: bool) -> list[dict[str, Any]]:
    try:
        content = storage.read_replaceable(uri)
    except FileNotFoundError:
        return []
    lines = [(i, line) for i, line in enumerate(content.decode(errors="replace").split("\n"), start=1) if line.strip()]
    read = [(number, _parse(line)) for number, line in lines]
    rows = [row for _, row in read if is_row(row)]
    broken = [number for number, row in read if not is_row(row)]
    if broken and warns:
        log.warning("warning: %s: %d lines cannot be read and are left out, e.g. line %d", uri, len(broken), broken[0])
    return rows


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_metrics(row: Any) -> bool:
    needed = ("step", "lr", "images_per_second")
    return isinstance(row, dict) and all(
        [
            *(_is_number(row.get(key)) for key in needed),
            *(v is None or _is_number(v, finite=False) for v in row.values()),
        ]
    )


def _is_left_out(row: Any) -> bool:
    if not isinstance(row, dict) or not all(_is_number(row.get(key)) for key in ("sample", "step")):
        return False
    return isinstance(row.get("name"), str) and row.get("status") in FAILED_STATUSES


def _is_number(value: Any, *, finite: bool = True) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and (not finite or math.isfinite(value))


def _finite(value: Any) -> Any:
    return value if value is not None and math.isfinite(value) else None
