"""Turns a run file into steps and runs the steps in order."""

from weaksam.pipeline.manifest import git_commit
from weaksam.pipeline.run_file import RunFile, load, parse, resolve_steps, select, warnings_of, with_defaults
from weaksam.pipeline.running import run_steps

__all__ = [
    "RunFile",
    "git_commit",
    "load",
    "parse",
    "resolve_steps",
    "run_steps",
    "select",
    "warnings_of",
    "with_defaults",
]
