"""Numbers that cannot be meant, as amounts and thresholds: a ValueError that says which can. Names: see `choices`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def check_whole(name: str, value: Any, *, least: int, or_none: bool = True) -> None:
    """ValueError unless a value is a whole number of at least `least`, or None."""
    if value is None and or_none:
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        none = "None or " if or_none else ""
        raise ValueError(f"{name} must be {none}a whole number from {least} on, got {value!r}")


def check_number(name: str, value: Any, *, or_none: bool = False) -> None:
    """ValueError unless a value is a finite number, or None where that is allowed."""
    if value is None and or_none:
        return
    if not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number{' or None' if or_none else ''}, got {value!r}")
