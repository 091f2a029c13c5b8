"""A run in small, through the real stages, for a plan: the same run file with a sample of its images.

Its folder has steps like those of any run, so the same plan again finds them finished. Measured is what they leave:
manifests, rows of metrics of trainings, times of actors. Also `cluster.json`: the nodes there were, and how long it
took to start.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weaksam import pipeline
from weaksam.core import storage
from weaksam.core.config import changed
from weaksam.core.step import AnyStep, Step
from weaksam.execution.connection import connect
from weaksam.execution.pools import PoolResources, fit_pool
from weaksam.training.settings import LoopSettings

log = logging.getLogger(__name__)

LEAST_IMAGES = 64  # of each split
_BATCHES = 4  # of each actor of the widest pool

Places = frozenset[tuple[str, str]]  # name of an index step, split


@dataclass(frozen=True)
class Pilot:
    """A finished pilot.

    Attributes:
        steps: the pilot's, in order, those that list a dataset whole.
        whole: settings of the steps as the run file has them, by name.
        rows: of each step in the pilot, by name.
        wanted: of each step in the run.
        nodes: of the cluster.
        start_seconds: to read the run file and to start or join the cluster.
        images: of each split.
        folder: where it lies.
    """

    steps: list[Step]
    whole: Mapping[str, Any]
    rows: Mapping[str, int]
    wanted: Mapping[str, int]
    nodes: list[dict[str, float]]
    start_seconds: float
    images: int
    folder: str


def run_pilot(config: str, overrides: Sequence[str], *, images: int | None, folder: str | None) -> Pilot:
    """Runs what is not finished of a pilot.

    Args:
        config, overrides: the run file.
        images: of each split; when None so many that each actor has something to do.
        folder: where it lies; `plan` in the run's when None.

    Raises:
        WeakSamError: the run file is wrong, or a step cannot be done with so few images.
    """
    began = time.monotonic()
    run_file = pipeline.parse(config, overrides)
    folder = storage.absolute(folder or storage.join(run_file.run, "plan"))
    run_file = replace(run_file, run=folder)
    listed = {step.name: step for step in pipeline.resolve_steps(run_file)}
    cluster = _look_at_cluster(folder, read_seconds=time.monotonic() - began)
    images = images or _images_for(run_file, cluster["nodes"])
    _run([step for step in listed.values() if step.stage.name == "index"])
    there = _count_places([step for step in listed.values() if step.stage.name == "index"])
    totals = {name: sum(there[place] for place in places_of(step, there)) for name, step in listed.items()}
    sampled = {place: min(count, images) for place, count in there.items()}
    samples = {name: sum(sampled[place] for place in places_of(step, there)) for name, step in listed.items()}
    small = {
        name: (stage, _for_pilot(stage.name, config, images, samples[name]))
        for name, (stage, config) in run_file.steps.items()
    }
    steps = pipeline.resolve_steps(replace(run_file, steps=small))
    log.info("plan: a pilot with %d images of each split, in %s", images, folder)
    _run(steps)
    measured = [listed[step.name] if step.stage.name == "index" else step for step in steps]
    rows = {step.name: (step.manifest() or {})["rows"] for step in measured}
    ratios = {step.name: totals[step.name] / max(samples[step.name], 1) for step in steps if step.stage.name != "index"}
    wanted = {name: round(count * ratios.get(name, 1.0)) for name, count in rows.items()}
    return Pilot(
        steps=measured,
        whole={name: settings for name, (_, settings) in run_file.steps.items()},
        rows=rows,
        wanted=wanted,
        nodes=cluster["nodes"],
        start_seconds=cluster["read_seconds"] + cluster["connect_seconds"],
        images=images,
        folder=folder,
    )


def _look_at_cluster(folder: str, *, read_seconds: float) -> dict[str, Any]:
    """The cluster as it was when this folder's first pilot began; that is now when there was none."""
    uri = storage.join(folder, "cluster.json")
    try:
        return storage.read_json(uri)
    except FileNotFoundError:
        began = time.monotonic()
        connect()
        seconds = time.monotonic() - began
        from weaksam.execution.nodes import alive_nodes  # imports Ray

        there = [{kind: node.get(kind, 0.0) for kind in ("CPU", "GPU")} for node in alive_nodes()]
        told = {"connect_seconds": seconds, "read_seconds": read_seconds, "nodes": there}
        storage.write_json(uri, told)
        return told


def _images_for(run_file: pipeline.RunFile, nodes: Sequence[Mapping[str, float]]) -> int:
    wanted = [LEAST_IMAGES]
    for _, config in run_file.steps.values():
        if isinstance(asked := getattr(config, "resources", None), PoolResources):
            wanted.append(_BATCHES * asked.batch_size * fit_pool(asked, nodes).actors)
    return max(wanted)


def _run(steps: Sequence[Step]) -> None:
    """Runs the steps that are not finished; what an interrupted one left is removed, for it would not be measured."""
    for step in steps:
        if step.manifest() is None:
            for file in storage.list_files(step.folder):
                storage.delete(file.uri)
            connect()  # its time is measured apart
    # a row of metrics for each step or two is for the projection, not for people
    rows = logging.getLogger("weaksam.training")
    before = rows.level
    rows.setLevel(logging.WARNING)
    try:
        pipeline.run_steps(steps)
    finally:
        rows.setLevel(before)


def _count_places(indexed: Sequence[Step]) -> Counter[tuple[str, str]]:
    """Number of images of each split of each dataset."""
    found: Counter[tuple[str, str]] = Counter()
    for step in indexed:
        splits = step.read(["split"]).column("split").to_pylist()
        found.update((step.name, split) for split in splits)
    return found


def places_of(step: AnyStep[Any], there: Mapping[tuple[str, str], int]) -> Places:
    """The splits whose images a step has rows of: its own, or all that the tables it reads share."""
    if step.stage.name == "index":
        return frozenset(place for place in there if place[0] == step.name)
    read = [places_of(other, there) for other in step.inputs.values() if not isinstance(other.config, LoopSettings)]
    shared = frozenset.intersection(*read)
    split = getattr(step.config, "split", None)
    return shared if split is None else frozenset(place for place in shared if place[1] == split)


def _for_pilot(stage: str, config: Any, images: int, sampled: int) -> Any:
    """Settings of a step for a pilot: `images` of each split, `sampled` of those that this step has rows of."""
    updates: dict[str, Any] = {"max_failed": 1.0}  # a plan is not the place to judge
    if stage == "index":
        updates["sample"] = min(images, config.sample or images)
    if stage == "export":
        updates["to"] = None  # the place is for the run
    if isinstance(config, LoopSettings):
        config = config.shortened(sampled)
    if isinstance(asked := getattr(config, "resources", None), PoolResources):
        updates["resources"] = changed(asked, record_times=True)
    return changed(config, **updates)
