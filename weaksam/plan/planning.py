"""Plans a run from its pilot: time with an interval, GPU-hours, storage and cost of each step, and advice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from weaksam.core import storage
from weaksam.core.step import Step
from weaksam.execution.pools import TASK_CPUS, PoolResources, fit_pool
from weaksam.execution.progress import duration
from weaksam.execution.times import FOLDER, read_times
from weaksam.plan.pilot import Pilot
from weaksam.plan.projection import Advice, Pace, advise, mapping_start, measure_pace, project_mapping, project_small
from weaksam.plan.training_projection import Seconds, parts_of_steps, project_training
from weaksam.training.settings import LoopSettings, cpus_of_worker
from weaksam.training.written import read_metrics

UNMODELLED = 0.1  # relative model error added to every interval: other images, a less trained network
_KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class StepPlan:
    """Prediction for one step: its `rows`, the `bytes` it writes, the `cpus` and `gpus` it reserves.

    Only steps with a pool of actors have a `pace`, a `start` (seconds before the first row) and `advice`.
    """

    step: str
    stage: str
    rows: int
    seconds: Seconds
    cpus: float
    gpus: float
    bytes: int
    pace: Pace | None = None
    start: float = 0.0
    advice: Advice | None = None

    @property
    def gpu_hours(self) -> float:
        """Reserved GPUs times hours."""
        return self.gpus * self.seconds.value / 3600

    @property
    def cpu_hours(self) -> float:
        """Reserved processors times hours."""
        return self.cpus * self.seconds.value / 3600


@dataclass(frozen=True)
class Prices:
    """Price of a GPU and of a processor for an hour; None = unknown."""

    gpu: float | None = None
    cpu: float | None = None

    def of(self, steps: Sequence[StepPlan]) -> float | None:
        """Returns the cost of steps; None when no price is known."""
        if self.gpu is None and self.cpu is None:
            return None
        return sum((self.gpu or 0.0) * step.gpu_hours + (self.cpu or 0.0) * step.cpu_hours for step in steps)


@dataclass(frozen=True)
class Plan:
    """Prediction for a run: the seconds to start, then the steps one after the other."""

    start_seconds: float
    steps: list[StepPlan]
    images: int
    folder: str

    @property
    def seconds(self) -> Seconds:
        """Time of the whole run; the unmodelled error is shared by all steps, other errors are independent."""
        value = self.start_seconds + sum(step.seconds.value for step in self.steps)
        own = [
            max(step.seconds.high - step.seconds.value, 0.0) ** 2 - (UNMODELLED * step.seconds.value) ** 2
            for step in self.steps
        ]
        half = math.sqrt(max(sum(own), 0.0) + (UNMODELLED * value) ** 2)
        return Seconds(value, max(value - half, 0.0), value + half)


def make_plan(pilot: Pilot) -> Plan:
    """Returns the plan that follows from a finished pilot."""
    steps = [_plan_step(pilot, step) for step in pilot.steps]
    return Plan(pilot.start_seconds, steps, pilot.images, pilot.folder)


def _plan_step(pilot: Pilot, step: Step) -> StepPlan:
    manifest = step.manifest() or {}
    rows, run_rows, seconds = pilot.rows[step.name], pilot.run_rows[step.name], manifest["seconds"]
    fields: dict[str, Any] = {"step": step.name, "stage": step.stage.name, "rows": run_rows, "cpus": 1.0, "gpus": 0.0}
    ratio, checkpoints = run_rows / max(rows, 1), 1.0
    whole, config = pilot.whole[step.name], step.config
    if isinstance(config, LoopSettings) and (lines := read_metrics(step.folder)):
        courses = config.course(rows), whole.course(run_rows)
        estimate = project_training(courses[0], lines, seconds, courses[1])
        kept = [min(_KEPT_CHECKPOINTS, int(parts_of_steps(course)[:, -1].sum())) for course in courses]
        checkpoints = kept[1] / kept[0] if kept[0] else 1.0
        resources = whole.resources
        cpus = cpus_of_worker(resources, pilot.nodes)
        fields |= {"cpus": resources.workers * cpus, "gpus": resources.workers * resources.gpus_per_worker}
    elif isinstance(getattr(config, "resources", None), PoolResources):
        pace, pool = measure_pace(read_times(step.folder)), fit_pool(whole.resources, pilot.nodes)
        start = mapping_start(pace, rows, seconds)
        estimate = project_mapping(pace, start, run_rows, pool.actors)
        fields |= {"pace": pace, "start": start, "advice": advise(pace, whole.resources, pilot.nodes)}
        cpus = pool.actors * pool.actor_cpus + pool.fetches * TASK_CPUS
        fields |= {"cpus": cpus, "gpus": pool.actors * pool.actor_gpus}
    else:
        estimate = project_small(rows, seconds, run_rows)
    size = project_bytes(storage.list_files(step.folder), ratio, checkpoints)
    return StepPlan(**fields, seconds=_widened(estimate), bytes=size)


def _widened(estimate: Seconds) -> Seconds:
    """Returns the estimate with the unmodelled error added to its interval."""
    down, up = (
        math.hypot(distance, UNMODELLED * estimate.value)
        for distance in (estimate.value - estimate.low, estimate.high - estimate.value)
    )
    return Seconds(estimate.value, max(estimate.value - down, 0.0), estimate.value + up)


def project_bytes(files: Sequence[storage.FileInfo], ratio: float, checkpoints: float) -> int:
    """Returns the bytes that a step will write: tables and exports grow with the rows, weights do not.

    Files that only a pilot has are not counted.

    Args:
        files: files of the pilot's step.
        ratio: rows of the run divided by rows of the pilot.
        checkpoints: checkpoints kept by the run divided by those kept by the pilot.
    """
    total = 0.0
    for file in files:
        first, _, rest = file.path.partition("/")
        if first == FOLDER:
            continue
        is_table = file.path.rpartition("/")[2].startswith("part-") or first == "export"
        is_checkpoint = first == "checkpoint" and rest.startswith("checkpoint_")
        total += file.size * (ratio if is_table else checkpoints if is_checkpoint else 1.0)
    return round(total)


def table_of(plan: Plan, prices: Prices) -> Table:
    """Returns the plan as a table for a terminal."""
    heads = ["step", "stage", "rows", "time", "(90 %)", "GPU-hours", "storage", "cost", "bottleneck"]
    table = Table(*heads, box=None)
    table.add_row("start", "", "", duration(plan.start_seconds))
    for step in plan.steps:
        table.add_row(*_cells(step.step, step.stage, f"{step.rows}", step.seconds, [step], prices), _bottleneck(step))
    table.add_row(*_cells("total", "", "", plan.seconds, plan.steps, prices))
    return table


def _cells(name: str, stage: str, rows: str, seconds: Seconds, steps: Sequence[StepPlan], prices: Prices) -> list[str]:
    cost, gpu_hours = prices.of(steps), sum(step.gpu_hours for step in steps)
    interval = f"{duration(seconds.low)} .. {duration(seconds.high)}"
    size = _size(sum(step.bytes for step in steps))
    cells = [name, stage, rows, duration(seconds.value), interval, f"{gpu_hours:.2f}" if gpu_hours else "", size]
    return [*cells, "" if cost is None else f"{cost:.2f}"]


def _bottleneck(step: StepPlan) -> str:
    if step.pace is None or step.advice is None:
        return ""
    return f"{step.advice.bottleneck}: busy {100 * step.pace.busy_share:.0f} %"


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def sentences(plan: Plan) -> list[str]:
    """Returns a sentence for each pool: its bottleneck, and a better pool."""
    return [_sentence(step, step.pace, step.advice) for step in plan.steps if step.pace and step.advice]


def _sentence(step: StepPlan, pace: Pace, advice: Advice) -> str:
    key = f"steps.{step.step}.resources.max_actors"

    def becomes(speedup: float) -> str:
        after = step.start + (step.seconds.value - step.start) / speedup
        return f"{duration(after)} instead of {duration(step.seconds.value)}"

    if advice.bottleneck == "actors":
        sentence = f"actors are the bottleneck, busy {100 * pace.busy_share:.0f} % of the time."
    else:
        sentence = (
            f"{advice.bottleneck} is the bottleneck: actors wait {100 * (1 - pace.busy_share):.0f} % of the time."
        )
    if advice.best_actors > advice.actors:
        sentence += f" With {advice.best_actors} actors ({key}={advice.best_actors}) instead of {advice.actors}: "
        sentence += becomes(advice.best_speedup)
        if advice.fetching_from is not None:
            sentence += f"; from {advice.fetching_from} on fetching would hold them up"
    elif advice.best_actors < advice.actors:
        sentence += (
            f" With {advice.best_actors} ({key}={advice.best_actors}) instead of {advice.actors} it is as fast or "
        )
        sentence += f"faster: {becomes(advice.best_speedup)}"
    else:
        sentence += f" A pool of {advice.actors} is the best of this cluster; two such clusters, with a pool of "
        sentence += f"{advice.doubled_actors}: {becomes(advice.doubled_speedup)}"
    return f"{step.step}: {sentence}."


def as_json_of(plan: Plan, prices: Prices) -> dict[str, Any]:
    """Returns the plan as JSON values."""

    def summed(steps: Sequence[StepPlan]) -> Mapping[str, Any]:
        hours = {key: round(sum(getattr(step, key) for step in steps), 4) for key in ("gpu_hours", "cpu_hours")}
        cost = prices.of(steps)
        return hours | {"bytes": sum(step.bytes for step in steps), "cost": None if cost is None else round(cost, 4)}

    steps = [asdict(step) | dict(summed([step])) for step in plan.steps]
    total = {"seconds": asdict(plan.seconds)} | dict(summed(plan.steps))
    head = {"folder": plan.folder, "images": plan.images, "start_seconds": plan.start_seconds}
    return head | {"steps": steps, "total": total, "advice": sentences(plan)}
