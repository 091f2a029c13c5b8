"""What a stage is, and what one step of a run knows: its settings, its folder and the steps it reads.

A stage is declared once, `STAGE = Stage(...)` at the end of its file; command line help, validation,
fingerprints and documentation all follow from that declaration.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from weaksam.core import storage
from weaksam.core.config import OutsideFile, Place, Reads, StageConfig, result_settings
from weaksam.errors import ConfigError, DamagedError
from weaksam.masking import masked_values

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class Outcome:
    """What a stage's `run` gives back for the manifest.

    `rows` counts what was asked for, `failed` what ended with a status other than ok; `computed` is how much of it
    this process did (the rest was there already). `failures` are the first few, `id: status: message`.
    """

    rows: int
    failed: int = 0
    computed: int | None = None
    failures: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    excluded: dict[str, list[str]] = field(default_factory=dict)
    summary: str = ""


@dataclass(frozen=True)
class Look:
    """What a look at outside files found.

    Attributes:
        seen: what was looked at, in words.
        unseen: what was not.
        faults: what would end the step.
    """

    seen: str
    unseen: str
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """A verb of the pipeline.

    Args:
        name: the word after `stage:` in a run file.
        version: raised when the meaning of the result changes; part of the fingerprint.
        config: settings class; its docstring is the stage's help, its `Reads` fields are the stage's inputs.
        run: does the work of one step; called again after an interruption, it goes on where it stopped.
        writes: what another step may read from it: `images`, `proposals`, `metrics`, ...
        outside: identities of files outside the run that decide the result, by name.
        places: absolute places outside the run that the rows hold, by name. They are not part of the fingerprint: when
            files have moved, a finished step is run again in its folder.
        listed: folders whose listing `outside` identifies; a run inside one would change it.
        warnings: about settings that are valid but a poor choice for the data, each `steps.<step>.<key>: ` with what is
            wrong and what to do; called before the step runs, may read outside files and raise StorageError.
        look: reads of outside files what costs little, for `weaksam check`; None where the step has none of its own.
    """

    name: str
    version: int
    config: type[StageConfig]
    run: Callable[[Step], Outcome]
    writes: str
    outside: Callable[[Any], dict[str, str]] = lambda config: {}
    places: Callable[[Any], dict[str, str]] = lambda config: {}
    listed: Callable[[Any], list[str]] = lambda config: []
    warnings: Callable[[Step], list[str]] = lambda step: []
    look: Callable[[Step], Look] | None = None

    @property
    def reads(self) -> dict[str, str]:
        """Field name -> what the step named there must write."""
        return {
            name: mark.noun
            for name, info in self.config.model_fields.items()
            for mark in info.metadata
            if isinstance(mark, Reads)
        }

    def references(self, settings: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        """Key -> (step it names, what that must write); the names of a list have keys like `detections.0`."""
        found = {}
        for key, noun in self.reads.items():
            value = settings.get(key)
            named = {key: value} if isinstance(value, str) else {}
            if isinstance(value, list):
                named = {f"{key}.{i}": one for i, one in enumerate(value) if isinstance(one, str)}
            found |= {where: (name, noun) for where, name in named.items()}
        return found

    @property
    def summary(self) -> str:
        """First line of the settings class's docstring."""
        return (self.config.__doc__ or "").strip().splitlines()[0]


@dataclass(frozen=True)
class AnyStep(Generic[ConfigT]):
    """A step with its folder in a run: all that a reader of its table needs. Either a `Step` or a `SavedStep`.

    Attributes:
        name: of the step in the run file.
        stage: what it does.
        config: its settings.
        inputs: the steps it reads, by the setting that names each.
        outside: identities of the outside files that decide the result, by name.
        fingerprint: of all that decides the result.
        folder: URI of its folder.
        places: `Stage.places`; empty: those it was finished with.
    """

    name: str
    stage: Stage
    config: ConfigT
    inputs: Mapping[str, AnyStep[Any]]
    outside: Mapping[str, str]
    fingerprint: str
    folder: str
    places: Mapping[str, str] = field(default_factory=dict)

    @property
    def manifest_uri(self) -> str:
        """Written last; a step without it is not finished."""
        return storage.join(self.folder, "manifest.json")

    def manifest(self) -> dict | None:
        """The manifest, or None while the step is unfinished, or finished with files that lie elsewhere by now.

        Raises:
            DamagedError: it was cut or altered.
        """
        try:
            found = read_manifest(self.folder)
        except FileNotFoundError:
            return None
        return None if self.places and found.get("places") != self.places else found


@dataclass(frozen=True)
class Step(AnyStep[Any]):
    """A resolved step of a run file, ready to be worked on; `config` is an instance of `stage.config`."""


@dataclass(frozen=True)
class SavedStep(AnyStep[Mapping[str, Any]]):
    """A step as the config.json of its folder describes it, to be read from; `config` is raw.

    An older weaksam may have written it, with other settings than those of today.
    """

    inputs: Mapping[str, SavedStep]


def read_manifest(folder: str) -> dict[str, Any]:
    """The manifest of a step's folder.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: it was cut or altered.
    """
    uri = storage.join(folder, "manifest.json")
    found = storage.read_json(uri)
    kinds = {"stage": str, "rows": int, "failed": int, "parts": list, "excluded": dict, "files": dict}
    kinds |= {"class_names": list}
    if (
        not isinstance(found, dict)
        or not any(key in found for key in kinds)
        or not all(isinstance(found[key], kind) for key, kind in kinds.items() if key in found)
    ):
        raise DamagedError(f"{uri}: not the manifest of a step: remove the file, and the same command goes on")
    return found


def resolve(run: str, name: str, stage: Stage, config: StageConfig, inputs: Mapping[str, AnyStep[Any]]) -> Step:
    """A step with its fingerprint and folder; reads the identity of outside files.

    Raises:
        ConfigError: the run, or a place that the step writes to, lies inside a dataset's folder.
    """
    check_outside({"the run": run}, stage.listed(config))
    if written := {f"{key}:": uri for key, uri in _written_places(config).items()}:
        read = [step for step in inputs.values() if isinstance(step, Step)]
        check_outside(written, [folder for step in read for folder in step.stage.listed(step.config)])
    files = {name: storage.identity(uri) for name, uri in outside_files(config).items()}
    outside = {**files, **stage.outside(config), **_relative_places(run, config)}
    # A step is known by what its inputs and files *are*, not by how this run file names them or where they lie.
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
    """Raises ConfigError when something is written into a folder whose listing is part of a fingerprint.

    Args:
        written: URIs by what they are called in the message.
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
    """Places that a step writes to, by setting."""
    return {
        name: getattr(config, name)
        for name, info in type(config).model_fields.items()
        if getattr(config, name) is not None
        and any(isinstance(mark, Place) and mark.is_written for mark in info.metadata)
    }


def _relative_places(run: str, config: StageConfig) -> dict[str, str]:
    """`_written_places` in one spelling: relative to the run where they are inside."""
    found = {}
    for name, uri in _written_places(config).items():
        inside = storage.relative_to(run, uri)
        found[name] = storage.absolute(uri) if inside is None else f"<run>/{inside}"
    return found


def outside_files(config: Any, prefix: str = "") -> dict[str, str]:
    """URIs of the files that settings marked `OutsideFile` name, by dotted key."""
    found: dict[str, str] = {}
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if any(isinstance(mark, OutsideFile) for mark in info.metadata) and value is not None:
            found[prefix + name] = value
        elif hasattr(type(value), "model_fields"):
            found |= outside_files(value, f"{prefix}{name}.")
    return found


def _forget(settings: dict[str, Any], path: list[str]) -> None:
    for part in path[:-1]:
        settings = settings[part]
    settings.pop(path[-1], None)


def describe(step: Step) -> dict[str, Any]:
    """The content of `config.json`: everything that makes the step what it is, and its resources.

    Without what URLs hold of secrets.
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
