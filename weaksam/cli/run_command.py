"""Runs the steps of a run file, for `weaksam run` and for the jobs."""

from __future__ import annotations

import logging
import sys

import typer

from weaksam.cli.terminal import end_on_sigterm, guarded, set_up_logging
from weaksam.core.step import Step
from weaksam.errors import ConfigError

log = logging.getLogger(__name__)


def run_pipeline(
    config: str, overrides: list[str], *, only: list[str] | None = None, stage: str | None = None
) -> list[Step]:
    """Checks everything, logs the warnings, runs the chosen steps.

    Args:
        config: path of the run file.
        overrides: `key=value` texts.
        only: names of the steps to run; all when empty.
        stage: run only the steps of this stage.

    Returns:
        Every step of the run file, in order, also those that were not run.
    """
    from weaksam import pipeline

    set_up_logging()
    steps = pipeline.load(config, overrides)
    if stage is not None:
        only = [step.name for step in steps if step.stage.name == stage]
        if not only:
            raise ConfigError(f"{config}: no step has the stage '{stage}'")
    chosen = pipeline.select(steps, only or [])
    for text in pipeline.warnings_of(chosen):
        log.warning("warning: %s", text)
    pipeline.run_steps(chosen)
    return steps


def run_job(*, of_stage: bool = False) -> None:
    """Entry point of `python -m jobs.pipeline CONFIG [KEY=VALUE]...`, which runs every step.

    Args:
        of_stage: whether to act as `python -m jobs.stage NAME CONFIG [KEY=VALUE]...`, which runs one stage's steps.
    """
    arguments = sys.argv[1:]
    if len(arguments) < 1 + of_stage or arguments[0] in ("-h", "--help"):
        job, what = ("stage NAME", "the steps of stage NAME") if of_stage else ("pipeline", "every step")
        print(f"usage: python -m jobs.{job} CONFIG [KEY=VALUE]...\nRuns {what} of a run file.")
        sys.exit(0 if arguments and arguments[0].startswith("-") else 2)
    stage = arguments.pop(0) if of_stage else None
    end_on_sigterm()
    try:
        guarded(run_pipeline)(arguments[0], arguments[1:], stage=stage)
    except typer.Exit as end:
        sys.exit(end.exit_code)
