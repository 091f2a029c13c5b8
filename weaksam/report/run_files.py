"""What the files of a run folder tell: its steps in order, how each went, its figures.

Nothing is computed here and no run file is needed: a folder in a bucket, or one that was moved, is enough.
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
    """A step as its folder tells of it.

    Attributes:
        name: as the run file calls it; with its fingerprint where the report shows another variant too.
        step: to read its table from.
        state: an entry of `states.read_states`.
        manifest: None while the step is unfinished.
        told: its config.json.
    """

    name: str
    step: SavedStep
    state: Mapping[str, Any]
    manifest: Mapping[str, Any] | None
    told: Mapping[str, Any]

    @property
    def writes(self) -> str:
        """What its table holds: proposals, detections, ..."""
        return self.step.stage.writes

    @cached_property
    def metrics(self) -> dict[str, Any] | None:
        """metrics.json of a finished evaluate step."""
        return read_figures(self.step.folder) if self.manifest else None

    @cached_property
    def per_class(self) -> list[dict[str, Any]]:
        """per_class.parquet of a finished evaluate step, a row a class; empty for others."""
        if self.metrics is None:
            return []
        return read_parquet(storage.join(self.step.folder, "per_class.parquet")).to_pylist()

    @cached_property
    def journal(self) -> list[dict[str, float]]:
        """training_log.jsonl of a training, a row every `log_every` steps; empty for others."""
        return read_metrics(self.step.folder)

    @cached_property
    def failures(self) -> list[dict[str, str]]:
        """The first failed rows of a finished table: image_id, status, message."""
        if not self.manifest or not self.manifest["failed"] or not self.manifest["parts"]:
            return []
        table = tables.read_table(self.step.folder, self.manifest, columns=["status", "message"])
        return [row for row in table.to_pylist() if row["status"] != schemas.OK][:_MOST_FAILURES]

    def judged(self) -> list[SavedStep]:
        """The steps that an evaluate step compared with the ground truth."""
        return [step for key, step in self.step.inputs.items() if key != "images"]


def read_run(run: str) -> list[RunStep]:
    """The steps of a run folder, each after those it reads; of several variants of a step the newest.

    Raises:
        ConfigError: no step has been started there.
    """
    run = storage.absolute(run)
    states = {state["folder"].rsplit("/", 1)[-1]: state for state in read_states(run)}
    there = {title: one for title in states if (one := _read(run, title)) is not None}
    began = {title: _when(one) for title, one in there.items()}
    started = _newest(there, began)
    if not started:
        raise ConfigError(f"{run}: no step there can be read: the log above says why")
    names = Counter(one.name for one in started.values())
    steps: dict[str, SavedStep] = {}
    found = []
    for title in _in_order(started, began):
        one = started[title]
        inputs = {key: steps[other] for key, other in one.config_json["inputs"].items() if other in steps}
        steps[title] = one.to_step(inputs)
        try:
            manifest = steps[title].manifest()
        except DamagedError as error:
            log.warning("%s: %s", title, error)
            manifest = None
        name = one.name if names[one.name] == 1 else title
        found.append(RunStep(name, steps[title], states[title], manifest, one.config_json))
    return found


def _read(run: str, title: str) -> Started | None:
    try:
        return read_started(run, title)
    except (ConfigError, DamagedError) as error:  # a store that is down is no reason to leave a step out
        log.warning("left out: %s", error)
        return None


def _newest(started: Mapping[str, Started], began: Mapping[str, float]) -> dict[str, Started]:
    """The newest variant of each step, and what those were made from."""
    newest: dict[str, tuple[float, str]] = {}
    for title, one in started.items():
        newest[one.name] = max(newest.get(one.name, (-1.0, "")), (began[title], title))
    kept: dict[str, Started] = {}
    left = [title for _, title in newest.values()]
    while left:
        title = left.pop()
        if title in started and title not in kept:
            kept[title] = started[title]
            left += started[title].config_json["inputs"].values()
    return kept


def _when(one: Started) -> float:
    """When its settings were written."""
    files = storage.list_files(one.folder, recursive=False)
    return next((file.modified or 0.0 for file in files if file.path == "config.json"), 0.0)


def _in_order(started: Mapping[str, Started], began: Mapping[str, float]) -> Iterator[str]:
    names = sorted(started, key=lambda title: (began[title], title))
    graph = {title: [t for t in started[title].config_json["inputs"].values() if t in started] for title in names}
    try:
        yield from TopologicalSorter(graph).static_order()
    except CycleError:  # no pipeline writes such a thing
        yield from names


def _read_json(folder: str, name: str) -> dict[str, Any] | None:
    try:
        return storage.read_json(storage.join(folder, name))
    except FileNotFoundError:
        return None


def read_hygiene(steps: Sequence[RunStep]) -> dict[str, Any] | None:
    """hygiene.json of the first finished hygiene step; None where there is none."""
    for one in steps:
        if one.writes == "hygiene" and one.manifest is not None:
            return _read_json(one.step.folder, "hygiene.json")
    return None
