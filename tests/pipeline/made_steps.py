"""Two stages that need nothing, and a run file of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from weaksam.core.config import NotInFingerprint, OutsideFile, Reads, Settings, StageConfig
from weaksam.core.step import Outcome, Step
from weaksam.execution.pools import PoolResources


class Inner(Settings):
    lr: float = Field(0.1, gt=0)
    weights: Annotated[str | None, OutsideFile()] = None


class MakeConfig(StageConfig):
    """Makes things."""

    size: int = 1
    inner: Inner = Inner()
    note: Annotated[str, NotInFingerprint()] = ""
    resources: PoolResources = PoolResources()


class UseConfig(StageConfig):
    """Uses things."""

    things: Annotated[str, Reads("things")]
    other: Annotated[str | None, Reads("things")] = None


CALLS: list[str] = []


def work(step: Step) -> Outcome:
    CALLS.append(step.name)
    failed = step.config.size if isinstance(step.config, MakeConfig) and step.config.size < 100 else 0
    return Outcome(rows=1000, failed=failed, failures=["a.jpg: unreadable: not an image"])


GOOD = {"a": {"stage": "make"}, "b": {"stage": "use", "things": "a"}}


def fingerprints(steps: list[Step]) -> dict[str, str]:
    return {step.name: step.fingerprint for step in steps}
