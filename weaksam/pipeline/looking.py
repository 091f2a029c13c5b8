"""Checks the files outside a run that its steps will read, before anything runs, for `weaksam check`."""

from __future__ import annotations

from collections.abc import Sequence

from weaksam.core.fingerprints import outside_files
from weaksam.core.step import Step
from weaksam.errors import DamagedError, StorageError


def look_at(steps: Sequence[Step]) -> tuple[list[str], list[str]]:
    """Returns lines that name the files outside the run that were read and that were not, and the faults in them.

    Skips finished steps: their files have been read. Starts nothing and writes nothing.

    Raises:
        StorageError: only the storage is at fault; names the steps.
    """
    lines, unseen, faults, unreachable = [], [], [], []
    for step in steps:
        try:
            if step.manifest() is not None:
                continue
            report = step.stage.look(step) if step.stage.look is not None else None
        except DamagedError:
            continue  # `check` reports it
        except StorageError as error:
            unreachable.append(f"steps.{step.name}: {error}")
            continue
        if report is not None:
            lines.append(f"{step.name}: looked at {report.checked}; not at {report.unchecked}")
            faults += [f"steps.{step.name}: {fault}" for fault in report.faults]
        unseen += [f"steps.{step.name}.{key}" for key in outside_files(step.config)]
    if unreachable and not faults:
        raise StorageError(*unreachable)
    if unseen:
        lines.append(f"not looked into: {', '.join(unseen)}")
    return lines, faults + unreachable
