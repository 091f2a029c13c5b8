"""Reads the steps of a run folder without a run file.

A step's config.json names its stage, its settings and the steps it read. So a run folder has everything that a reader
of its tables needs, also after it was moved.
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

_KEYS = {"stage", "settings", "inputs", "outside", "fingerprint"}  # keys of config.json that this module reads


@dataclass(frozen=True)
class Started:
    """A step that was started in a run folder. `config_json` is the content of its config.json."""

    run: str
    title: str  # <step>-<fingerprint>, the name of its folder
    stage: Stage
    config_json: Mapping[str, Any]

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
        """URI of the manifest, which exists once the step is finished."""
        return storage.join(self.folder, "manifest.json")

    @property
    def is_finished(self) -> bool:
        """Whether it has a manifest."""
        return storage.exists(self.manifest_uri)

    def to_step(self, inputs: Mapping[str, SavedStep]) -> SavedStep:
        """Returns a step whose table can be read; `inputs` are the steps that it read."""
        config, outside, fingerprint = (self.config_json[key] for key in ("settings", "outside", "fingerprint"))
        return SavedStep(self.name, self.stage, config, inputs, outside, fingerprint, self.folder)


def read_started(run: str, title: str) -> Started | None:
    """Returns the step in a folder of a run; None if the folder has no config.json.

    Raises:
        WeakSamError: its config.json is damaged, or of a stage that does not exist.
    """
    uri = storage.join(run, title, "config.json")
    try:
        config_json = masked_values(storage.read_json(uri))  # a file of an older weaksam may have secrets in URLs
    except FileNotFoundError:
        return None
    if not isinstance(config_json, dict) or not config_json.keys() >= _KEYS:
        raise DamagedError(f"{uri}: does not describe a step: it is damaged, run the step's run file again")
    if config_json["stage"] not in STAGES:
        raise ConfigError(f"{uri}: there is no stage '{config_json['stage']}': use the version of weaksam that made it")
    return Started(run, title, STAGES[config_json["stage"]], config_json)
