"""Reads the files of a run folder: its steps in order, their states and their figures.

The module computes nothing and needs no run file, so it also reads a folder in a bucket and a folder that was moved.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Any

from weaksam.core import schemas, storage, tables
from weaksam.core.parquet_files import read_parquet
from weaksam.core.step import SavedStep
from weaksam.errors import ConfigError, DamagedError
from weaksam.pipeline.listings import read_figures
from weaksam.pipeline.states import read_states
from weaksam.stages.started_steps import Started, read_started
from weaksam.training.written import read_metrics

log = logging.getLogger(__name__)

_MOST_FAILURES = 200


@dataclass(frozen=True)
class RunStep:
    """A step as its folder describes it.

    Attributes:
        name: name in the run file; with the fingerprint if the report also shows another variant.
        step: the step whose table is read.
        state: an entry of `states.read_states`.
        manifest: None while the step is unfinished.
        config_json: content of its config.json.
    """

    name: str
    step: SavedStep
    state: Mapping[str, Any]
    manifest: Mapping[str, Any] | None
    config_json: Mapping[str, Any]

    @property
    def writes(self) -> str:
        """Kind of its table: proposals, detections, ..."""
        return self.step.stage.writes

    @cached_property
    def metrics(self) -> dict[str, Any] | None:
        """metrics.json of a finished evaluate step."""
        return read_figures(self.step.folder) if self.manifest else None

    @cached_property
    def per_class(self) -> list[dict[str, Any]]:
        """per_class.parquet of a finished evaluate step, one row per class; empty for other steps."""
        if self.metrics is None:
            return []
        return read_parquet(storage.join(self.step.folder, "per_class.parquet")).to_pylist()

    @cached_property
    def training_log(self) -> list[dict[str, float]]:
        """training_log.jsonl of a training, a row every `log_every` steps; empty for other steps."""
        return read_metrics(self.step.folder)

    @cached_property
    def failures(self) -> list[dict[str, str]]:
        """The first failed rows of a finished table: image_id, status, message."""
        if not self.manifest or not self.manifest["failed"] or not self.manifest["parts"]:
            return []
        table = tables.read_table(self.step.folder, self.manifest, columns=["status", "message"])
        return [row for row in table.to_pylist() if row["status"] != schemas.OK][:_MOST_FAILURES]

    def judged(self) -> list[SavedStep]:
        """Returns the steps that an evaluate step compared with the ground truth."""
        return [step for key, step in self.step.inputs.items() if key != "images"]


def read_run(run: str) -> list[RunStep]:
    """Returns the steps of a run folder, each after its inputs; the newest variant of each step and its inputs.

    Raises:
        ConfigError: no step of the folder has been started.
    """
    run = storage.absolute(run)
    states = {state["folder"].rsplit("/", 1)[-1]: state for state in read_states(run)}
    readable = {title: started_step for title in states if (started_step := _read(run, title)) is not None}
    began = {title: _when(started_step) for title, started_step in readable.items()}
    started = _newest(readable, began)
    if not started:
        raise ConfigError(f"{run}: no step there can be read: the log above says why")
    names = Counter(started_step.name for started_step in started.values())
    steps: dict[str, SavedStep] = {}
    run_steps = []
    for title in _in_order(started, began):
        started_step = started[title]
        inputs = {key: steps[other] for key, other in started_step.config_json["inputs"].items() if other in steps}
        steps[title] = started_step.to_step(inputs)
        try:
            manifest = steps[title].manifest()
        except DamagedError as error:
            log.warning("%s: %s", title, error)
            manifest = None
        name = started_step.name if names[started_step.name] == 1 else title
        run_steps.append(RunStep(name, steps[title], states[title], manifest, started_step.config_json))
    return run_steps


def _read(run: str, title: str) -> Started | None:
    try:
        return read_started(run, title)
    except (ConfigError, DamagedError) as error:  # a StorageError is raised: an unreachable store must not hide steps
        log.warning("left out: %s", error)
        return None


def _newest(started: Mapping[str, Started], began: Mapping[str, float]) -> dict[str, Started]:
    """Returns the newest variant of each step, and the steps that those read."""
    newest: dict[str, tuple[float, str]] = {}
    for title, step in started.items():
        newest[step.name] = max(newest.get(step.name, (-1.0, "")), (began[title], title))
    kept: dict[str, Started] = {}
    left = [title for _, title in newest.values()]
    while left:
        title = left.pop()
        if title in started and title not in kept:
            kept[title] = started[title]
            left += started[title].config_json["inputs"].values()
    return kept


def _when(step: Started) -> float:
    """Returns the time at which the step's settings were written."""
    files = storage.list_files(step.folder, recursive=False)
    return next((file.modified or 0.0 for file in files if file.path == "config.json"), 0.0)


def _in_order(started: Mapping[str, Started], began: Mapping[str, float]) -> Iterator[str]:
    names = sorted(started, key=lambda title: (began[title], title))
    graph = {title: [t for t in started[title].config_json["inputs"].values() if t in started] for title in names}
    try:
        yield from TopologicalSorter(graph).static_order()
    except CycleError:  # no pipeline writes a cycle
        yield from names


def _read_json(folder: str, name: str) -> dict[str, Any] | None:
    try:
        return storage.read_json(storage.join(folder, name))
    except FileNotFoundError:
        return None


def read_hygiene(steps: Sequence[RunStep]) -> dict[str, Any] | None:
    """Returns hygiene.json of the first finished hygiene step; None if no such step is finished."""
    for run_step in steps:
        if run_step.writes == "hygiene" and run_step.manifest is not None:
            return _read_json(run_step.step.folder, "hygiene.json")
    return None
