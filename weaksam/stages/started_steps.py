"""The steps of a run folder as they lie there, without a run file.

A step's config.json names its stage, its settings and the steps it read: a run folder tells all that whoever reads its
tables needs, also when it was moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weaksam.core import storage
from weaksam.core.step import SavedStep, Stage
from weaksam.errors import ConfigError, DamagedError
from weaksam.masking import masked_values
from weaksam.stages import STAGES

_TOLD = {"stage", "settings", "inputs", "outside", "fingerprint"}  # keys of config.json that are used here


@dataclass(frozen=True)
class Started:
    """A step that was started in a run folder. `told` is its config.json."""

    run: str
    title: str  # <step>-<fingerprint>, the name of its folder
    stage: Stage
    told: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The step's name in the run file."""
        return self.title.rpartition("-")[0]

    @property
    def folder(self) -> str:
        """URI of its folder."""
        return storage.join(self.run, self.title)

    @property
    def manifest_uri(self) -> str:
        """Is there when the step is finished."""
        return storage.join(self.folder, "manifest.json")

    @property
    def is_finished(self) -> bool:
        """Whether it has a manifest."""
        return storage.exists(self.manifest_uri)

    def to_step(self, inputs: Mapping[str, SavedStep]) -> SavedStep:
        """A step that can be read from, with the steps that it read."""
        config, outside, fingerprint = (self.told[key] for key in ("settings", "outside", "fingerprint"))
        return SavedStep(self.name, self.stage, config, inputs, outside, fingerprint, self.folder)


def read_started(run: str, title: str) -> Started | None:
    """The step in a folder of a run; None when the folder is not a step's.

    Raises:
        WeakSamError: its config.json is damaged, or of a stage that does not exist.
    """
    uri = storage.join(run, title, "config.json")
    try:
        told = masked_values(storage.read_json(uri))  # what an older weaksam wrote may hold secrets of URLs
    except FileNotFoundError:
        return None
    if not isinstance(told, dict) or not told.keys() >= _TOLD:
        raise DamagedError(f"{uri}: does not describe a step: it is damaged, run the step's run file again")
    if told["stage"] not in STAGES:
        raise ConfigError(f"{uri}: there is no stage '{told['stage']}': use the version of weaksam that made it")
    return Started(run, title, STAGES[told["stage"]], told)
