"""The identity of a step: its fingerprint, its folder and the description in its `config.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from weaksam.core import storage
from weaksam.core.config import OutsideFile, Place, StageConfig, result_settings
from weaksam.core.step import AnyStep, Stage, Step
from weaksam.errors import ConfigError
from weaksam.masking import masked_values


def resolve(run: str, name: str, stage: Stage, config: StageConfig, inputs: Mapping[str, AnyStep[Any]]) -> Step:
    """Returns a step with its fingerprint and folder; reads the identity of outside files.

    Raises:
        ConfigError: the run, or a location that the step writes to, is inside the folder of a dataset.
    """
    check_outside({"the run": run}, stage.listed(config))
    if written := {f"{key}:": uri for key, uri in _written_places(config).items()}:
        read = [step for step in inputs.values() if isinstance(step, Step)]
        check_outside(written, [folder for step in read for folder in step.stage.listed(step.config)])
    files = {name: storage.identity(uri) for name, uri in outside_files(config).items()}
    outside = {**files, **stage.outside(config), **_relative_places(run, config)}
    # The content of inputs and files is hashed, not their names in this run file or their locations.
    settings = result_settings(config)
    for key in (*files, *stage.reads):
        _forget(settings, key.split("."))
    content = {
        "stage": stage.name,
        "version": stage.version,
        "settings": settings,
        "inputs": {key: step.fingerprint for key, step in inputs.items()},
        "outside": outside,
    }
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    folder = storage.join(run, f"{name}-{fingerprint}")
    return Step(name, stage, config, dict(inputs), outside, fingerprint, folder, stage.places(config))


def check_outside(written: Mapping[str, str], listed: Sequence[str]) -> None:
    """Raises ConfigError if a written location is inside a folder whose listing is part of a fingerprint.

    Args:
        written: name in the error message -> URI.
        listed: URIs of folders.
    """
    for name, uri in written.items():
        for folder in listed:
            if storage.relative_to(folder, uri) is not None:
                raise ConfigError(
                    f"{name} {uri} lies inside the dataset's folder {folder}: every command would see other files "
                    "there and begin anew: name a place outside of it"
                )


def _written_places(config: StageConfig) -> dict[str, str]:
    """Returns the locations that a step writes to, by setting."""
    return {
        name: getattr(config, name)
        for name, info in type(config).model_fields.items()
        if getattr(config, name) is not None
        and any(isinstance(mark, Place) and mark.is_written for mark in info.metadata)
    }


def _relative_places(run: str, config: StageConfig) -> dict[str, str]:
    """Returns `_written_places` in canonical form: relative to the run if they are inside it, else absolute."""
    places = {}
    for name, uri in _written_places(config).items():
        inside = storage.relative_to(run, uri)
        places[name] = storage.absolute(uri) if inside is None else f"<run>/{inside}"
    return places


def outside_files(config: Any, prefix: str = "") -> dict[str, str]:
    """Returns the URIs of all settings marked `OutsideFile`, by dotted key."""
    files: dict[str, str] = {}
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if any(isinstance(mark, OutsideFile) for mark in info.metadata) and value is not None:
            files[prefix + name] = value
        elif hasattr(type(value), "model_fields"):
            files |= outside_files(value, f"{prefix}{name}.")
    return files


def _forget(settings: dict[str, Any], path: list[str]) -> None:
    for part in path[:-1]:
        settings = settings[part]
    settings.pop(path[-1], None)


def describe(step: Step) -> dict[str, Any]:
    """Returns the content of `config.json`: everything that identifies the step, and its resources.

    Secrets in URLs are masked.
    """
    return masked_values(_described(step))


def _described(step: Step) -> dict[str, Any]:
    return {
        "step": step.name,
        "stage": step.stage.name,
        "version": step.stage.version,
        "fingerprint": step.fingerprint,
        "settings": step.config.model_dump(mode="json"),
        "inputs": {key: f"{other.name}-{other.fingerprint}" for key, other in step.inputs.items()},
        "outside": dict(step.outside),
    }
