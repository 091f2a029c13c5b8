"""Checks the choices of rules: a misspelt name raises an error instead of selecting another choice.

Rules are frozen dataclasses that check themselves; the settings of a stage contain the same objects.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

# Value of `__pydantic_config__` of rules in settings: values of a run file are not converted, unknown keys are faults.
STRICT: Any = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


def check_choices(rules: Any) -> None:
    """Raises ValueError if a `Literal` field of a dataclass has a value that is not one of its choices."""
    for field, choices in _choices_of(type(rules)).items():
        if (value := getattr(rules, field)) not in choices:
            known = ", ".join(repr(choice) for choice in choices)
            raise ValueError(f"{type(rules).__name__}: {field} must be one of {known}, got {value!r}")


@cache
def _choices_of(kind: type) -> dict[str, tuple[Any, ...]]:
    hints = get_type_hints(kind)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
