"""The result of checking the files outside a run, for `weaksam check`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Look:
    """The result of checking outside files before a run.

    Attributes:
        checked: description of the files that were read.
        unchecked: description of the files that were not read.
        faults: faults with which the step would fail.
    """

    checked: str
    unchecked: str
    faults: list[str] = field(default_factory=list)
