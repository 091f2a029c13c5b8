"""Runs the pipeline on a sample of the images to measure what `plan` extrapolates.

A pilot's folder has steps like those of any run, so a repeated plan finds them finished. The plan measures the files
that they leave: manifests, training logs and times of actors. `cluster.json` in the same folder records the nodes of
the cluster and the seconds that it took to start.
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
_BATCHES = 4  # for each actor of the widest pool

Places = frozenset[tuple[str, str]]  # name of an index step, split


@dataclass(frozen=True)
class Pilot:
    """A finished pilot.

    Attributes:
        steps: the pilot's steps, in order; index steps list the whole dataset.
        whole: settings of the steps as the run file has them, by name.
        rows: number of rows of each step in the pilot, by name.
        run_rows: number of rows of each step in the full run, by name.
        nodes: resources of the cluster's nodes.
        start_seconds: seconds to read the run file and to start or join the cluster.
        images: number of images sampled from each split.
        folder: URI of the pilot.
    """

    steps: list[Step]
    whole: Mapping[str, Any]
    rows: Mapping[str, int]
    run_rows: Mapping[str, int]
    nodes: list[dict[str, float]]
    start_seconds: float
    images: int
    folder: str


def run_pilot(config: str, overrides: Sequence[str], *, images: int | None, folder: str | None) -> Pilot:
    """Runs the unfinished steps of a pilot.

    Args:
        config, overrides: the run file.
        images: number of images sampled from each split; None chooses enough to keep each actor busy.
        folder: URI of the pilot; None means `plan` in the folder of the run.

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
    counts = _count_places([step for step in listed.values() if step.stage.name == "index"])
    totals = {name: sum(counts[place] for place in places_of(step, counts)) for name, step in listed.items()}
    sampled = {place: min(count, images) for place, count in counts.items()}
    samples = {name: sum(sampled[place] for place in places_of(step, counts)) for name, step in listed.items()}
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
    run_rows = {name: round(count * ratios.get(name, 1.0)) for name, count in rows.items()}
    return Pilot(
        steps=measured,
        whole={name: settings for name, (_, settings) in run_file.steps.items()},
        rows=rows,
        run_rows=run_rows,
        nodes=cluster["nodes"],
        start_seconds=cluster["read_seconds"] + cluster["connect_seconds"],
        images=images,
        folder=folder,
    )


def _look_at_cluster(folder: str, *, read_seconds: float) -> dict[str, Any]:
    """Returns the cluster as it was when this folder's first pilot began; for a first pilot, records it now."""
    uri = storage.join(folder, "cluster.json")
    try:
        return storage.read_json(uri)
    except FileNotFoundError:
        began = time.monotonic()
        connect()
        seconds = time.monotonic() - began
        from weaksam.execution.nodes import alive_nodes  # imports Ray

        nodes = [{kind: node.get(kind, 0.0) for kind in ("CPU", "GPU")} for node in alive_nodes()]
        record = {"connect_seconds": seconds, "read_seconds": read_seconds, "nodes": nodes}
        storage.write_json(uri, record)
        return record


def _images_for(run_file: pipeline.RunFile, nodes: Sequence[Mapping[str, float]]) -> int:
    required = [LEAST_IMAGES]
    for _, config in run_file.steps.values():
        if isinstance(resources := getattr(config, "resources", None), PoolResources):
            required.append(_BATCHES * resources.batch_size * fit_pool(resources, nodes).actors)
    return max(required)


def _run(steps: Sequence[Step]) -> None:
    """Runs the unfinished steps; removes the files of an interrupted step first, as their times would be missing."""
    for step in steps:
        if step.manifest() is None:
            for file in storage.list_files(step.folder):
                storage.delete(file.uri)
            connect()  # its time is measured separately
    # a short training logs a row for each step or two, which only the projection needs
    rows = logging.getLogger("weaksam.training")
    before = rows.level
    rows.setLevel(logging.WARNING)
    try:
        pipeline.run_steps(steps)
    finally:
        rows.setLevel(before)


def _count_places(indexed: Sequence[Step]) -> Counter[tuple[str, str]]:
    """Returns the number of images of each split of each dataset."""
    counts: Counter[tuple[str, str]] = Counter()
    for step in indexed:
        splits = step.read(["split"]).column("split").to_pylist()
        counts.update((step.name, split) for split in splits)
    return counts


def places_of(step: AnyStep[Any], counts: Mapping[tuple[str, str], int]) -> Places:
    """Returns the splits whose images a step has rows of: its own split, or all splits that its input tables share."""
    if step.stage.name == "index":
        return frozenset(place for place in counts if place[0] == step.name)
    read = [places_of(other, counts) for other in step.inputs.values() if not isinstance(other.config, LoopSettings)]
    shared = frozenset.intersection(*read)
    split = getattr(step.config, "split", None)
    return shared if split is None else frozenset(place for place in shared if place[1] == split)


def _for_pilot(stage: str, config: Any, images: int, sampled: int) -> Any:
    """Returns a step's settings for a pilot with `images` images of each split, `sampled` of which this step reads."""
    updates: dict[str, Any] = {"max_failed": 1.0}  # a plan does not fail because of faulty images
    if stage == "index":
        updates["sample"] = min(images, config.sample or images)
    if stage == "export":
        updates["to"] = None  # only the full run writes there
    if isinstance(config, LoopSettings):
        config = config.shortened(sampled)
    if isinstance(resources := getattr(config, "resources", None), PoolResources):
        updates["resources"] = changed(resources, record_times=True)
    return changed(config, **updates)
