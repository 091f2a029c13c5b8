"""Settings from rules: the dataclass of rules declares each field, its limits, its default and its meaning.

`ops` and `models` have rules as frozen dataclasses, which know no settings. A stage can hold such an object as a nested
setting, or have its fields among its own settings by `with_rules`.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, Field, create_model

from weaksam.core.config import Config

Rules = TypeVar("Rules")


def with_rules(base: type[Config], rules: type, *, optional: bool = False) -> type[Config]:
    """Returns a base class: `base` with the fields of a dataclass of rules as settings.

    A tuple of any length is a list among the settings. A class that derives from the result may declare one of the
    fields itself, with another type.

    Args:
        base: a settings class.
        rules: a dataclass whose fields all have defaults and an entry in a section `Attributes` of its docstring, or of
            the docstring of a class that it derives from.
        optional: every setting may be None, and is by default.
    """
    hints, sentences = get_type_hints(rules, include_extras=True), sentences_of(rules)
    settings: dict[str, Any] = {}
    for field in fields(rules):
        hint = hints[field.name]
        limits = getattr(hint, "__metadata__", ())
        kind, default = hint.__origin__ if limits else hint, field.default
        if get_origin(kind) is tuple:
            kind, default = list[get_args(kind)[0]], list(field.default)  # pyright: ignore[reportArgumentType]
        if optional:
            kind, default = kind | None, None
        settings[field.name] = (Annotated[kind, *limits, Field(description=sentences[field.name])], default)
    return create_model(base.__name__, __base__=base, __doc__=base.__doc__, __module__=base.__module__, **settings)


def rules_of(config: BaseModel, rules: type[Rules], **others: Any) -> Rules:
    """Returns rules with the values of the settings of the same names, except those in `others`."""
    return rules(**values_of(config, rules) | others)


def values_of(config: BaseModel, rules: type) -> dict[str, Any]:
    """Returns the values of the settings that have the names of a dataclass's fields; lists as tuples."""
    values = {field.name: getattr(config, field.name) for field in fields(rules)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def sentences_of(rules: type) -> dict[str, str]:
    """Returns the description of each field of a dataclass, from its docstring and those of its bases."""
    sentences: dict[str, str] = {}
    for kind in reversed(rules.__mro__):
        section = inspect.cleandoc(vars(kind).get("__doc__") or "").partition("Attributes:\n")[2]
        entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
        sentences |= {name: _sentence(" ".join(text.split())) for name, text in entries}
    return sentences


def _sentence(text: str) -> str:
    return text if text.startswith("`") else text[:1].upper() + text[1:]
