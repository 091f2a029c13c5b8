"""What a run will take, step by step, from its pilot: time with its interval, GPU-hours, storage, money; and advice."""

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

UNMODELLED = 0.1  # share of a time that is added to its interval: other images, a network that has learnt less
_KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class StepPlan:
    """What one step will take. `rows` it will have; `bytes` it will write; it reserves `cpus` and `gpus`.

    `pace`, `start` (seconds before its first row) and `advice` are those of a step with a pool of actors.
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
    """Of a GPU and of a processor, an hour; None = not asked for."""

    gpu: float | None = None
    cpu: float | None = None

    def of(self, steps: Sequence[StepPlan]) -> float | None:
        """What steps cost; None when no price is known."""
        if self.gpu is None and self.cpu is None:
            return None
        return sum((self.gpu or 0.0) * one.gpu_hours + (self.cpu or 0.0) * one.cpu_hours for one in steps)


@dataclass(frozen=True)
class Plan:
    """What a run will take: to start, and each step after the other."""

    start_seconds: float
    steps: list[StepPlan]
    images: int
    folder: str

    @property
    def seconds(self) -> Seconds:
        """Of the whole run. What is unmodelled is so in all steps alike, other errors are their own."""
        value = self.start_seconds + sum(one.seconds.value for one in self.steps)
        own = [
            max(one.seconds.high - one.seconds.value, 0.0) ** 2 - (UNMODELLED * one.seconds.value) ** 2
            for one in self.steps
        ]
        half = math.sqrt(max(sum(own), 0.0) + (UNMODELLED * value) ** 2)
        return Seconds(value, max(value - half, 0.0), value + half)


def make_plan(pilot: Pilot) -> Plan:
    """The plan that a finished pilot makes."""
    steps = [_plan_step(pilot, step) for step in pilot.steps]
    return Plan(pilot.start_seconds, steps, pilot.images, pilot.folder)


def _plan_step(pilot: Pilot, step: Step) -> StepPlan:
    manifest = step.manifest() or {}
    rows, wanted, seconds = pilot.rows[step.name], pilot.wanted[step.name], manifest["seconds"]
    told: dict[str, Any] = {"step": step.name, "stage": step.stage.name, "rows": wanted, "cpus": 1.0, "gpus": 0.0}
    ratio, checkpoints = wanted / max(rows, 1), 1.0
    whole, config = pilot.whole[step.name], step.config
    if isinstance(config, LoopSettings) and (lines := read_metrics(step.folder)):
        courses = config.course(rows), whole.course(wanted)
        found = project_training(courses[0], lines, seconds, courses[1])
        kept = [min(_KEPT_CHECKPOINTS, int(parts_of_steps(course)[:, -1].sum())) for course in courses]
        checkpoints = kept[1] / kept[0] if kept[0] else 1.0
        asked = whole.resources
        cpus = cpus_of_worker(asked, pilot.nodes)
        told |= {"cpus": asked.workers * cpus, "gpus": asked.workers * asked.gpus_per_worker}
    elif isinstance(getattr(config, "resources", None), PoolResources):
        pace, pool = measure_pace(read_times(step.folder)), fit_pool(whole.resources, pilot.nodes)
        start = mapping_start(pace, rows, seconds)
        found = project_mapping(pace, start, wanted, pool.actors)
        told |= {"pace": pace, "start": start, "advice": advise(pace, whole.resources, pilot.nodes)}
        cpus = pool.actors * pool.actor_cpus + pool.fetches * TASK_CPUS
        told |= {"cpus": cpus, "gpus": pool.actors * pool.actor_gpus}
    else:
        found = project_small(rows, seconds, wanted)
    size = project_bytes(storage.list_files(step.folder), ratio, checkpoints)
    return StepPlan(**told, seconds=_widened(found), bytes=size)


def _widened(found: Seconds) -> Seconds:
    """With what is not modelled."""
    down, up = (
        math.hypot(one, UNMODELLED * found.value) for one in (found.value - found.low, found.high - found.value)
    )
    return Seconds(found.value, max(found.value - down, 0.0), found.value + up)


def project_bytes(files: Sequence[storage.FileInfo], ratio: float, checkpoints: float) -> int:
    """What a step will write: tables and exports grow with the rows, weights do not; what only a pilot has is left out.

    Args:
        files: of the pilot's step.
        ratio: of rows.
        checkpoints: of numbers of checkpoints that are kept.
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
    """The plan for people."""
    heads = ["step", "stage", "rows", "time", "(90 %)", "GPU-hours", "storage", "cost", "bottleneck"]
    table = Table(*heads, box=None)
    table.add_row("start", "", "", duration(plan.start_seconds))
    for one in plan.steps:
        table.add_row(*_cells(one.step, one.stage, f"{one.rows}", one.seconds, [one], prices), _held_up(one))
    table.add_row(*_cells("total", "", "", plan.seconds, plan.steps, prices))
    return table


def _cells(name: str, stage: str, rows: str, seconds: Seconds, steps: Sequence[StepPlan], prices: Prices) -> list[str]:
    cost, gpu_hours = prices.of(steps), sum(one.gpu_hours for one in steps)
    interval = f"{duration(seconds.low)} .. {duration(seconds.high)}"
    size = _size(sum(one.bytes for one in steps))
    told = [name, stage, rows, duration(seconds.value), interval, f"{gpu_hours:.2f}" if gpu_hours else "", size]
    return [*told, "" if cost is None else f"{cost:.2f}"]


def _held_up(one: StepPlan) -> str:
    if one.pace is None or one.advice is None:
        return ""
    return f"{one.advice.bottleneck}: busy {100 * one.pace.busy_share:.0f} %"


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def sentences(plan: Plan) -> list[str]:
    """What holds each pool up, and which would be better."""
    return [_sentence(one, one.pace, one.advice) for one in plan.steps if one.pace and one.advice]


def _sentence(one: StepPlan, pace: Pace, advice: Advice) -> str:
    key = f"steps.{one.step}.resources.max_actors"

    def becomes(speedup: float) -> str:
        after = one.start + (one.seconds.value - one.start) / speedup
        return f"{duration(after)} instead of {duration(one.seconds.value)}"

    if advice.bottleneck == "actors":
        told = f"actors are the bottleneck, busy {100 * pace.busy_share:.0f} % of the time."
    else:
        told = f"{advice.bottleneck} is the bottleneck: actors wait {100 * (1 - pace.busy_share):.0f} % of the time."
    if advice.best_actors > advice.actors:
        told += f" With {advice.best_actors} actors ({key}={advice.best_actors}) instead of {advice.actors}: "
        told += becomes(advice.best_speedup)
        if advice.fetching_from is not None:
            told += f"; from {advice.fetching_from} on fetching would hold them up"
    elif advice.best_actors < advice.actors:
        told += f" With {advice.best_actors} ({key}={advice.best_actors}) instead of {advice.actors} it is as fast or "
        told += f"faster: {becomes(advice.best_speedup)}"
    else:
        told += f" A pool of {advice.actors} is the best of this cluster; two such clusters, with a pool of "
        told += f"{advice.doubled_actors}: {becomes(advice.doubled_speedup)}"
    return f"{one.step}: {told}."


def as_json_of(plan: Plan, prices: Prices) -> dict[str, Any]:
    """The plan for programs."""

    def summed(steps: Sequence[StepPlan]) -> Mapping[str, Any]:
        hours = {key: round(sum(getattr(one, key) for one in steps), 4) for key in ("gpu_hours", "cpu_hours")}
        cost = prices.of(steps)
        return hours | {"bytes": sum(one.bytes for one in steps), "cost": None if cost is None else round(cost, 4)}

    steps = [asdict(one) | dict(summed([one])) for one in plan.steps]
    total = {"seconds": asdict(plan.seconds)} | dict(summed(plan.steps))
    head = {"folder": plan.folder, "images": plan.images, "start_seconds": plan.start_seconds}
    return head | {"steps": steps, "total": total, "advice": sentences(plan)}
