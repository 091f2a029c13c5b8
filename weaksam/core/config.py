"""Settings classes and the run file: strict, frozen, each field documented by the sentence below it.

A run file is YAML: `run`, the URI of the folder that holds the run, and `steps`, a mapping of named steps.
Parsing collects *every* fault, each with its key, before anything starts.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, create_model, model_validator
from pydantic_core import CoreSchema, core_schema

from weaksam.core import uris


class Settings(BaseModel):
    """Base of every settings class: rejects unknown keys, wrong types, NaN and inf; instances are immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


Config = TypeVar("Config", bound=Settings)


class Reads:
    """Marks a field that names an earlier step, and the table kinds that step may write: `images`, `wsod`, ..."""

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds


@dataclass(frozen=True)
class Matching:
    """A condition on a text value, and its name in documents."""

    text: str
    holds: Callable[[str], bool]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Choice:
    """Marks a text field whose value is a name of a catalogue.

    Attributes:
        names: the names of the catalogue.
        renamed: older name -> its current one.
        others: a condition that other values may meet too, tested only for them; None: none may.
    """

    names: tuple[str, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)
    others: Matching | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def check(self, value: str) -> str:
        """Returns the value; raises ValueError that lists the names if it is not among them."""
        if value in self.renamed:
            raise ValueError(f"{value!r} is now {self.renamed[value]!r}")
        if value not in self.names and not (self.others is not None and self.others.holds(value)):
            close = difflib.get_close_matches(value, self.names, n=1)
            guess = f": did you mean {close[0]!r}?" if close else ""
            others = f" or {self.others}" if self.others is not None else ""
            raise ValueError(f"must be one of {', '.join(self.names)}{others}, got {value!r}{guess}")
        return value

    def __str__(self) -> str:
        return " | ".join([*self.names, *(["..."] if self.others is not None else [])])


@dataclass(frozen=True)
class OutsideFile:
    """Marks a field that is the URI of a file outside the run: the file's identity is part of the fingerprint."""


@dataclass(frozen=True)
class OutsideFolder:
    """Marks a field that is the URI of a folder outside the run."""


@dataclass(frozen=True)
class Place:
    """Marks a field that holds a location: its spelling is not part of the fingerprint.

    The content of the location is part of the fingerprint if the stage's `outside` identifies it. A location that the
    step writes to is part of the fingerprint itself, as a path relative to the run's folder if it is inside.
    """

    is_written: bool = False


@dataclass(frozen=True)
class NotInFingerprint:
    """Marks a field that affects how a step runs or is judged, not its result. `resources` needs no mark."""


@dataclass(frozen=True)
class Added:
    """Marks a field added later whose default keeps the old behaviour: the fingerprint contains other values only.

    Steps that were finished before the field existed stay finished.
    """


def with_defaults(base: type[Config], **defaults: Any) -> type[Config]:
    """Returns a base class: `base` with other defaults and the same field types, limits and descriptions."""
    changed_fields: dict[str, Any] = {}
    for name, value in defaults.items():
        field = copy(base.model_fields[name])
        field.default = value
        changed_fields[name] = (field.annotation, field)
    return create_model(
        base.__name__, __base__=base, __doc__=base.__doc__, __module__=base.__module__, **changed_fields
    )


@dataclass(frozen=True)
class Recipe:
    """Defaults of a stage that apply when some of its settings have certain values.

    Attributes:
        when: setting -> the value it must have, or the condition it must meet, set in the file or by default.
        defaults: setting -> its default value.
    """

    when: Mapping[str, str | Matching]
    defaults: Mapping[str, Any]

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Returns whether the settings have these values."""
        return all(
            isinstance(values[key], str) and value.holds(values[key])
            if isinstance(value, Matching)
            else values[key] == value
            for key, value in self.when.items()
        )


def _meets(value: Any, condition: str | Matching) -> bool:
    if isinstance(condition, Matching):
        return isinstance(value, str) and condition.holds(value)
    return value == condition


class StageConfig(Settings):
    """Settings of every step."""

    recipes: ClassVar[tuple[Recipe, ...]] = ()
    """If several recipes have a default for a setting, the last one applies."""

    max_failed: Annotated[float, NotInFingerprint()] = Field(default=0.001, ge=0, le=1)
    """Share of rows, rounded up, that may fail before the step counts as failed."""

    @model_validator(mode="before")
    @classmethod
    def _take_recipes(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        values = {name: field.default for name, field in cls.model_fields.items()} | raw
        used = [recipe for recipe in cls.recipes if recipe.applies(values)]
        return {key: value for recipe in used for key, value in recipe.defaults.items()} | raw


def one_of(config: BaseModel, *keys: str) -> str:
    """Returns the only one of `keys` that is set, i.e. not None and not an empty text or list. For validators.

    Raises:
        ValueError: no key is set, or several are.
    """
    set_keys = [key for key in keys if getattr(config, key)]
    if len(set_keys) != 1:
        choices = f"{', '.join(keys[:-1])} and {keys[-1]}"
        raise ValueError(f"exactly one of {choices} must be set, got {', '.join(set_keys) or 'none'}")
    return set_keys[0]


def parse_settings(
    config: type[Config], raw: Any, *, where: str, renamed: Mapping[str, str] = MappingProxyType({})
) -> tuple[Config | None, list[str]]:
    """Returns `raw` as an instance of `config`, or None and one fault per key, which starts with the full key.

    Args:
        config: the settings class.
        raw: a mapping, as parsed from YAML.
        where: the key of `raw` in its file.
        renamed: old key -> its replacement; keys are dotted paths below `where`.
    """
    if not isinstance(raw, dict):
        return None, [f"{where}: must be a mapping of settings, got {raw!r}"]
    try:
        # Through JSON: strict types, but a YAML list may become a tuple.
        return config.model_validate_json(json.dumps(raw, default=str)), []
    except (TypeError, RecursionError) as error:
        return None, [f"{where}: cannot be read as settings: {error}"]
    except pydantic.ValidationError as error:
        return None, [_fault(config, fault, where, renamed) for fault in error.errors(include_url=False)]


def _fault(config: type[Settings], fault: Any, where: str, renamed: Mapping[str, str]) -> str:
    inner = ".".join(str(part) for part in fault["loc"])
    key = f"{where}.{inner}" if inner else where
    is_unknown = fault["type"] in ("extra_forbidden", "unexpected_keyword_argument")
    if is_unknown and inner in renamed:
        return f"{key}: unknown key: it is now {renamed[inner]}"
    if is_unknown:
        close = difflib.get_close_matches(str(fault["loc"][-1]), _names_at(config, fault["loc"][:-1]), n=1)
        return f"{key}: unknown key" + (f": did you mean '{close[0]}'?" if close else "")
    if fault["type"] == "missing":
        return f"{key}: required: set it in the file or on the command line as {key}=..."
    if fault["type"] == "value_error":  # messages of our own validators contain the value
        return f"{key}: {fault['msg'].removeprefix('Value error, ')}"
    return f"{key}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r}"


def _names_at(config: type, location: tuple) -> list[str]:
    """Returns the field names of the settings class or rules dataclass at `location`."""
    for part in location:
        field = config.model_fields.get(str(part)) if issubclass(config, BaseModel) else None
        if field is None or not isinstance(field.annotation, type):
            return []
        config = field.annotation
    if issubclass(config, BaseModel):
        return list(config.model_fields)
    return [field.name for field in fields(config)] if is_dataclass(config) else []


def changed(config: Config, **updates: Any) -> Config:
    """Returns a validated copy with the values of `updates`."""
    return type(config).model_validate(dict(config) | updates)


def places_of(config: BaseModel, prefix: str = "") -> list[tuple[str, str]]:
    """Returns key and value of every setting that is the URI of a file or folder outside the run."""
    places = []
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            places += places_of(value, f"{prefix}{name}.")
        elif isinstance(value, str) and any(isinstance(mark, OutsideFile | OutsideFolder) for mark in info.metadata):
            places.append((prefix + name, value))
    return places


def place_texts(config: BaseModel, prefix: str = "") -> list[tuple[str, str]]:
    """Returns key and text of every setting that holds a location, including paths below another folder."""
    places = []
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            places += place_texts(value, f"{prefix}{name}.")
        elif any(isinstance(mark, OutsideFile | OutsideFolder | Place) for mark in info.metadata):
            texts = value.items() if isinstance(value, dict) else [("", value)]
            places += [(f"{prefix}{name}.{key}".rstrip("."), text) for key, text in texts if isinstance(text, str)]
    return places


def with_absolute_files(config: Config) -> Config:
    """Returns a copy with absolute paths for local `OutsideFile` settings: workers have another working directory."""
    updates: dict[str, Any] = {}
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Settings):
            inner = with_absolute_files(value)
            updates |= {name: inner} if inner is not value else {}
        elif isinstance(value, str) and any(isinstance(mark, OutsideFile) for mark in info.metadata):
            updates |= {name: uris.absolute(value)} if uris.is_local(value) and uris.fault_of(value) is None else {}
    return config.model_copy(update=updates) if updates else config


def result_settings(config: BaseModel) -> dict[str, Any]:
    """Returns the settings that affect the result of a step, as plain JSON values, for its fingerprint."""
    kept: dict[str, Any] = {}
    values = config.model_dump(mode="json")
    for name, info in type(config).model_fields.items():
        if name == "resources" or any(isinstance(mark, NotInFingerprint | Place) for mark in info.metadata):
            continue
        value = getattr(config, name)
        is_added = any(isinstance(mark, Added) for mark in info.metadata)
        if is_added and value == info.get_default(call_default_factory=True):
            continue
        kept[name] = result_settings(value) if isinstance(value, BaseModel) else values[name]
    return kept
