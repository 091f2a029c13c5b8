"""Settings classes and the run file: strict, frozen, each field documented by the sentence under it.

A run file is YAML: `run`, the URI where everything of the run lives, and `steps`, a mapping of named steps.
Reading one collects *every* fault, each named by its key, before anything starts.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, create_model, model_validator
from pydantic_core import CoreSchema, core_schema

from weaksam.core import uris


class Settings(BaseModel):
    """Base of every settings class: unknown keys, wrong types, NaN and inf are faults, values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


Config = TypeVar("Config", bound=Settings)


class Reads:
    """Marks a field that names an earlier step, which must write one of these table kinds: `images`, `wsod`, ..."""

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds


@dataclass(frozen=True)
class Choice:
    """Marks a text field whose value is one of the names of a catalogue; `renamed` maps older names to them."""

    names: tuple[str, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def check(self, value: str) -> str:
        """The value; ValueError with the names if it is none of them."""
        if value in self.renamed:
            raise ValueError(f"{value!r} is now {self.renamed[value]!r}")
        if value not in self.names:
            close = difflib.get_close_matches(value, self.names, n=1)
            guess = f": did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"must be one of {', '.join(self.names)}, got {value!r}{guess}")
        return value


@dataclass(frozen=True)
class OutsideFile:
    """Marks a field that is the URI of a file made elsewhere: its identity is part of the fingerprint."""


@dataclass(frozen=True)
class OutsideFolder:
    """Marks a field that is the URI of a folder outside the run."""


@dataclass(frozen=True)
class Place:
    """Marks a field that says where something lies: how it is written is not part of the fingerprint.

    What lies there is, if the stage's `outside` says so. A place that is written to is itself part of it, relative to
    the run's folder where it is inside.
    """

    is_written: bool = False


@dataclass(frozen=True)
class NotInFingerprint:
    """Marks a field that decides how a step runs or is judged, never what it computes. `resources` is one by name."""


@dataclass(frozen=True)
class Added:
    """Marks a field that came later, with a default that keeps the old meaning: the fingerprint has other values only.

    So steps that were finished before there was such a field stay finished.
    """


def with_defaults(base: type[Config], **defaults: Any) -> type[Config]:
    """`base` with other defaults, to inherit from: types, limits and sentences of the fields stay those of `base`."""
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
    """Other defaults of a stage, where some of its settings have certain values.

    Attributes:
        when: these settings, as they are given or by default.
        defaults: settings and their values, for those that are not given.
    """

    when: Mapping[str, str]
    defaults: Mapping[str, Any]


class StageConfig(Settings):
    """Keys that every step has."""

    recipes: ClassVar[tuple[Recipe, ...]] = ()
    """Where several have a default, the last counts."""

    max_failed: Annotated[float, NotInFingerprint()] = Field(default=0.001, ge=0, le=1)
    """Share of rows, rounded up, that may fail before the step counts as failed."""

    @model_validator(mode="before")
    @classmethod
    def _take_recipes(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        values = {name: field.default for name, field in cls.model_fields.items()} | raw
        used = [recipe for recipe in cls.recipes if all(values[key] == value for key, value in recipe.when.items())]
        return {key: value for recipe in used for key, value in recipe.defaults.items()} | raw


def one_of(config: BaseModel, *keys: str) -> str:
    """The key, out of these, that is set: not None, nor an empty text or list. For validators.

    Raises:
        ValueError: none is set, or several are.
    """
    set_keys = [key for key in keys if getattr(config, key)]
    if len(set_keys) != 1:
        choices = f"{', '.join(keys[:-1])} and {keys[-1]}"
        raise ValueError(f"exactly one of {choices} must be set, got {', '.join(set_keys) or 'none'}")
    return set_keys[0]


def parse_settings(
    config: type[Config], raw: Any, *, where: str, renamed: Mapping[str, str] = MappingProxyType({})
) -> tuple[Config | None, list[str]]:
    """`raw` as an instance of `config`, or None and one fault a key, each starting with its full key.

    Args:
        config: the settings class.
        raw: a mapping, as YAML gives it.
        where: the key of `raw` in its file.
        renamed: of keys that older versions had, dotted below `where`: what replaces them.
    """
    if not isinstance(raw, dict):
        return None, [f"{where}: must be a mapping of settings, got {raw!r}"]
    try:
        # Through JSON: strict about types, yet a YAML list may be a tuple.
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
    if fault["type"] == "value_error":  # our own validators say what was got
        return f"{key}: {fault['msg'].removeprefix('Value error, ')}"
    return f"{key}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r}"


def _names_at(config: type, location: tuple) -> list[str]:
    """Field names of the settings class, or of the rules, that `location` leads to."""
    for part in location:
        field = config.model_fields.get(str(part)) if issubclass(config, BaseModel) else None
        if field is None or not isinstance(field.annotation, type):
            return []
        config = field.annotation
    if issubclass(config, BaseModel):
        return list(config.model_fields)
    return [field.name for field in fields(config)] if is_dataclass(config) else []


def changed(config: Config, **updates: Any) -> Config:
    """A copy with other values, validated like any."""
    return type(config).model_validate(dict(config) | updates)


def places_of(config: BaseModel, prefix: str = "") -> list[tuple[str, str]]:
    """Key and value of every setting that is the URI of a file or folder outside the run."""
    places = []
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            places += places_of(value, f"{prefix}{name}.")
        elif isinstance(value, str) and any(isinstance(mark, OutsideFile | OutsideFolder) for mark in info.metadata):
            places.append((prefix + name, value))
    return places


def place_texts(config: BaseModel, prefix: str = "") -> list[tuple[str, str]]:
    """Key and text of every setting that says where something lies, also below another folder."""
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
    """A copy in which every `OutsideFile` of this machine is an absolute path: workers have other working folders."""
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
    """The settings that change what a step computes, as plain JSON values; the stuff of a fingerprint."""
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
