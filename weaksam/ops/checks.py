"""Checks numbers such as counts, thresholds and boxes: raises ValueError with the allowed ones. Names: `choices`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def check_whole(name: str, value: Any, *, least: int, or_none: bool = True) -> None:
    """Raises ValueError unless a value is a whole number of at least `least`, or None if that is allowed."""
    if value is None and or_none:
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        none = "None or " if or_none else ""
        raise ValueError(f"{name} must be {none}a whole number from {least} on, got {value!r}")


def check_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    or_none: bool = False,
) -> None:
    """Raises ValueError unless a value is a finite number within the limits, or None if that is allowed.

    Args:
        name: name of the value, for the message.
        value: the value.
        least: the value is at least this.
        above: the value is above this.
        most: the value is at most this.
        or_none: whether None is allowed.
    """
    if value is None and or_none:
        return
    number = float(value) if isinstance(value, (int, float, np.integer, np.floating)) else math.nan
    if not (math.isfinite(number) and least <= number <= most and number > above):
        words = {"from {:g} on": least, "above {:g}": above, "at most {:g}": most}
        limits = " and ".join(text.format(limit) for text, limit in words.items() if math.isfinite(limit))
        allowed = f"a finite number {limits}".rstrip() + (" or None" if or_none else "")
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_objects(row: Mapping[str, Any], what: str, num_classes: int | None = None) -> None:
    """Raises ValueError unless the values of a row of objects or detections are valid.

    NaN compares as false with every threshold, so a NaN box or score would count as a hit.

    Args:
        row: `boxes` and optionally `classes` and `scores`, one per box.
        what: name of the row, for messages.
        num_classes: classes are 0 to num_classes - 1; None: not checked.
    """
    boxes = np.asarray(row["boxes"], np.float64)
    if boxes.size and (boxes.ndim != 2 or boxes.shape[1] != 4):
        raise ValueError(f"{what}: boxes must be (objects, 4), got {boxes.shape}")
    count = len(boxes) if boxes.size else 0
    values = {key: np.asarray(row[key], np.float64) for key in ("classes", "scores") if row.get(key) is not None}
    for key, array in values.items():
        if array.shape != (count,):
            raise ValueError(f"{what}: must have one of `{key}` for each of its {count} boxes, got {array.shape}")
    finite = {"boxes": boxes} | {key: array for key, array in values.items() if key == "scores"}
    for key, array in finite.items():
        if not np.isfinite(array).all():
            position = int(np.argwhere(~np.isfinite(array))[0, 0])
            raise ValueError(f"{what}: {key}[{position}] is not finite: {array[position].tolist()}")
    classes = values.get("classes")
    if num_classes is not None and classes is not None and not ((classes >= 0) & (classes < num_classes)).all():
        wrong = classes[~((classes >= 0) & (classes < num_classes))][0]
        raise ValueError(f"{what}: class {wrong:g} is none of 0 to {num_classes - 1}")
