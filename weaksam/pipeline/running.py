"""Runs steps in order: skips finished steps and continues unfinished steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from weaksam.core import storage
from weaksam.core.step import Outcome, Step
from weaksam.core.step_folders import keep_config, whole_manifest
from weaksam.errors import FailedRowsError
from weaksam.execution import ray_env
from weaksam.pipeline.changes import log_changes
from weaksam.pipeline.manifest import manifest_of

log = logging.getLogger(__name__)

_SHOWN_FAILURES = 3


def run_steps(steps: Sequence[Step]) -> None:
    """Runs steps in order; skips the finished steps and logs that.

    Raises:
        WeakSamError: a step could not finish, or too many of its rows failed.
    """
    ray_env.prepare()  # before a stage imports Ray
    for step in steps:
        manifest = whole_manifest(step)
        if manifest is not None:
            keep_config(step)
            log.info("%s: finished, skipped (%s)", step.name, step.folder)
        else:
            manifest = _run_step(step)
        _check_failed(step, manifest)


def _run_step(step: Step) -> dict[str, Any]:
    log_changes(step)
    keep_config(step)
    log.info("%s: %s -> %s", step.name, step.stage.name, step.folder)
    started = time.time()
    outcome = step.stage.run(step)
    seconds = time.time() - started
    manifest = manifest_of(step, outcome, seconds)
    storage.write_json(step.manifest_uri, manifest)
    log.info(
        "%s: %s in %.0f s%s", step.name, _counts(outcome), seconds, f": {outcome.summary}" if outcome.summary else ""
    )
    return manifest


def _counts(outcome: Outcome) -> str:
    return f"{outcome.rows} rows" + (f", {outcome.failed} failed" if outcome.failed else "")


def _check_failed(step: Step, manifest: Mapping[str, Any]) -> None:
    allowed = math.ceil(step.config.max_failed * manifest["rows"])
    if manifest["failed"] > allowed:
        listed = "\n  ".join(manifest["failures"])
        raise FailedRowsError(
            f"step {step.name}: {manifest['failed']} of {manifest['rows']} rows failed, {allowed} may "
            f"(steps.{step.name}.max_failed={step.config.max_failed:g}). The rows are kept in {step.folder}; "
            f"raise max_failed to go on with them, or remove that folder to try again (images that were not found are "
            f"tried again where they are back).{_tolerance_of_inputs(step)} The first:\n  {listed}"
        )
    if manifest["failed"]:
        shown = "; ".join(manifest["failures"][:_SHOWN_FAILURES])
        log.warning("%s: %d of %d rows failed: %s", step.name, manifest["failed"], manifest["rows"], shown)


def _tolerance_of_inputs(step: Step) -> str:
    """Returns a sentence on an input that may fail in more rows than the step: its failed rows fail in the step too."""
    more = [
        (other.config.max_failed, other.name)
        for other in step.inputs.values()
        if isinstance(other, Step) and other.config.max_failed > step.config.max_failed
    ]
    if not more:
        return ""
    share, name = max(more)
    return (
        f" Step {name}, which it reads, may fail in more (steps.{name}.max_failed={share:g}): rows that failed there "
        f"fail here too, and steps.{step.name}.max_failed={share:g} accepts as many."
    )
