"""Stages, and the steps of a run: settings, folder and input steps.

A stage is declared once, `STAGE = Stage(...)` at the end of its file; command line help, validation,
fingerprints and documentation are derived from that declaration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import pyarrow as pa

from weaksam.core import step_files, storage, tables
from weaksam.core.config import Reads, StageConfig
from weaksam.core.look import Look
from weaksam.errors import DamagedError, StageError

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class Outcome:
    """The result of a stage's `run`, for the manifest.

    `rows` counts the requested rows, `failed` the rows whose status is not ok; `computed` counts the rows that this
    process computed (the others existed already). `failures` are the first few, `id: status: message`.
    """

    rows: int
    failed: int = 0
    computed: int | None = None
    failures: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    excluded: dict[str, list[str]] = field(default_factory=dict)
    summary: str = ""


@dataclass(frozen=True)
class Stage:
    """Declares a stage of the pipeline: its settings, inputs, output and function.

    Args:
        name: the value of `stage:` in a run file.
        version: increased when the meaning of the result changes; part of the fingerprint.
        config: settings class; its docstring is the stage's help, its `Reads` fields are the stage's inputs.
        run: runs one step; when called again after an interruption, it resumes.
        writes: the kind of table it writes: `images`, `proposals`, `metrics`, ...
        outside: identities of the files outside the run that affect the result, by name.
        places: absolute locations outside the run that the rows contain, by name. They are not part of the fingerprint:
            after files have moved, a finished step is run again in its folder.
        listed: folders whose listing is part of `outside`; a run inside such a folder would change it.
        warnings: returns warnings about settings that are valid but a poor choice for the data, each
            `steps.<step>.<key>: ` with the problem and a fix; called before the step runs, may read outside files and
            raise StorageError.
        look: reads the outside files that are quick to read, for `weaksam check`; None if the stage has none.
        input_faults: returns faults of settings that depend on the table kinds of the input steps (by key), each
            `<key>: ` with the problem and a fix.
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
    input_faults: Callable[[Any, Mapping[str, str]], list[str]] = lambda config, kinds: []

    @property
    def reads(self) -> dict[str, tuple[str, ...]]:
        """Field name -> the table kinds that its input step may write."""
        return {
            name: mark.kinds
            for name, info in self.config.model_fields.items()
            for mark in info.metadata
            if isinstance(mark, Reads)
        }

    @property
    def read_kinds(self) -> list[str]:
        """The table kinds that the stage reads, without duplicates."""
        return list(dict.fromkeys(kind for kinds in self.reads.values() for kind in kinds))

    def references(self, settings: Mapping[str, Any]) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Returns key -> (input step, table kinds that it may write); items of a list have keys like `detections.0`."""
        references = {}
        for key, kinds in self.reads.items():
            value = settings.get(key)
            named = {key: value} if isinstance(value, str) else {}
            if isinstance(value, list):
                named = {f"{key}.{i}": item for i, item in enumerate(value) if isinstance(item, str)}
            references |= {where: (name, kinds) for where, name in named.items()}
        return references

    @property
    def summary(self) -> str:
        """First line of the settings class's docstring."""
        return (self.config.__doc__ or "").strip().splitlines()[0]


@dataclass(frozen=True)
class AnyStep(Generic[ConfigT]):
    """A step with its folder in a run, sufficient to read its table. Either a `Step` or a `SavedStep`.

    Attributes:
        name: name of the step in the run file.
        stage: its stage.
        config: its settings.
        inputs: setting -> the input step it names.
        outside: identities of the outside files that affect the result, by name.
        fingerprint: hash of everything that affects the result.
        folder: URI of its folder.
        places: `Stage.places`; empty: not compared with those in the manifest.
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
        """URI of the manifest, which is written last; a step without it is not finished."""
        return storage.join(self.folder, "manifest.json")

    @property
    def weights_uri(self) -> str:
        """URI of the weights of a training."""
        return step_files.weights_uri(self.folder)

    def manifest(self) -> dict | None:
        """Returns the manifest, or None if the step is unfinished or its outside files have moved since.

        Raises:
            DamagedError: the manifest was truncated or altered.
        """
        try:
            manifest = read_manifest(self.folder)
        except FileNotFoundError:
            return None
        return None if self.places and manifest.get("places") != self.places else manifest

    def finished_manifest(self) -> dict[str, Any]:
        """Returns the manifest.

        Raises:
            StageError: the step is not finished.
        """
        manifest = self.manifest()
        if manifest is None:
            raise StageError(f"step {self.name}: not finished ({self.folder} has no manifest): run it first")
        return manifest

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads the finished table, sorted by image id: `image_id` and `columns`, or all columns.

        Raises:
            StageError: the step is not finished.
        """
        return tables.read_table(self.folder, self.finished_manifest(), columns=columns)

    def class_names(self) -> list[str]:
        """Reads the class names of the finished table, by class id.

        Raises:
            StageError: the step is not finished.
        """
        return tables.read_class_names(self.folder, self.finished_manifest())


@dataclass(frozen=True)
class Step(AnyStep[Any]):
    """A resolved step of a run file, ready to run; `config` is an instance of `stage.config`."""


@dataclass(frozen=True)
class SavedStep(AnyStep[Mapping[str, Any]]):
    """A step loaded from the config.json of its folder, for reading its table; `config` is raw.

    It may have been written by an older weaksam with other settings.
    """

    inputs: Mapping[str, SavedStep]


def read_manifest(folder: str) -> dict[str, Any]:
    """Reads the manifest of a step's folder.

    Raises:
        FileNotFoundError: there is no manifest.
        DamagedError: it was truncated or altered.
    """
    uri = storage.join(folder, "manifest.json")
    manifest = storage.read_json(uri)
    kinds = {"stage": str, "rows": int, "failed": int, "parts": list, "excluded": dict, "files": dict}
    kinds |= {"class_names": list}
    if (
        not isinstance(manifest, dict)
        or not any(key in manifest for key in kinds)
        or not all(isinstance(manifest[key], kind) for key, kind in kinds.items() if key in manifest)
    ):
        raise DamagedError(f"{uri}: not the manifest of a step: remove the file, and the same command goes on")
    return manifest
