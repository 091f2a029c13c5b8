"""Checks the values of rules: a misspelt name raises an error instead of selecting another choice.

Rules are frozen dataclasses that check themselves; the settings of a stage contain the same objects, or their fields.
The limits of a number are declared with its type, `Annotated[float, Ge(0), Le(1)]`, for rules and settings alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from weaksam.ops.checks import check_number, check_whole

# Value of `__pydantic_config__` of rules in settings: values of a run file are not converted, unknown keys are faults.
STRICT: Any = {"extra": "forbid", "strict": True, "allow_inf_nan": False}

_ARGUMENTS = {"ge": "least", "gt": "above", "le": "most"}  # of annotated_types -> of `checks`


def check_rules(rules: Any) -> None:
    """Checks the choices, and the numbers with limits, of a dataclass.

    Raises:
        ValueError: a field has a value that it cannot have.
    """
    check_choices(rules)
    for field, (check, limits) in _limits_of(type(rules)).items():
        check(field, getattr(rules, field), **limits)


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


@cache
def _limits_of(kind: type) -> dict[str, tuple[Callable[..., None], dict[str, Any]]]:
    """Returns the check of each annotated number, and its arguments."""
    checks: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            continue
        number, *marks = get_args(hint)
        kinds = get_args(number) if isinstance(number, UnionType) else (number,)
        if int in kinds or float in kinds:
            limits = {_ARGUMENTS[field.name]: getattr(mark, field.name) for mark in marks for field in fields(mark)}
            check = check_whole if int in kinds else check_number
            checks[name] = check, limits | {"or_none": NoneType in kinds}
    return checks
