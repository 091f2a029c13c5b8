"""What a stage is, and what one step of a run knows: its settings, its folder and the steps it reads.

A stage is declared once, `STAGE = Stage(...)` at the end of its file; command line help, validation,
fingerprints and documentation all follow from that declaration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import pyarrow as pa

from weaksam.core import storage, tables
from weaksam.core.config import Reads, StageConfig
from weaksam.errors import DamagedError, StageError

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
        checked: what was read, in words.
        unchecked: what was not read.
        faults: what would end the step.
    """

    checked: str
    unchecked: str
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
        input_faults: faults of settings that depend on which table kind each named step writes (by key), each
            `<key>: ` with what is wrong and what to do.
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
        """Field name -> the table kinds, one of which the step named there must write."""
        return {
            name: mark.kinds
            for name, info in self.config.model_fields.items()
            for mark in info.metadata
            if isinstance(mark, Reads)
        }

    @property
    def read_kinds(self) -> list[str]:
        """The table kinds that the stage reads, each once."""
        return list(dict.fromkeys(kind for kinds in self.reads.values() for kind in kinds))

    def references(self, settings: Mapping[str, Any]) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Key -> (step it names, table kinds that it may write); the names of a list have keys like `detections.0`."""
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

    @property
    def weights_uri(self) -> str:
        """The trained weights of a training."""
        return tables.weights_uri(self.folder)

    def manifest(self) -> dict | None:
        """The manifest, or None while the step is unfinished, or finished with files that lie elsewhere by now.

        Raises:
            DamagedError: it was cut or altered.
        """
        try:
            manifest = read_manifest(self.folder)
        except FileNotFoundError:
            return None
        return None if self.places and manifest.get("places") != self.places else manifest

    def finished_manifest(self) -> dict[str, Any]:
        """The manifest.

        Raises:
            StageError: the step is not finished.
        """
        manifest = self.manifest()
        if manifest is None:
            raise StageError(f"step {self.name}: not finished ({self.folder} has no manifest): run it first")
        return manifest

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The finished table, sorted by image id; only `image_id` and these columns, all when left out.

        Raises:
            StageError: the step is not finished.
        """
        return tables.read_table(self.folder, self.finished_manifest(), columns=columns)

    def class_names(self) -> list[str]:
        """The names of the classes of the finished table, by class.

        Raises:
            StageError: the step is not finished.
        """
        return tables.read_class_names(self.folder, self.finished_manifest())


class Step(AnyStep[Any]):
    """A resolved step of a run file, ready to be worked on; `config` is an instance of `stage.config`."""


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
