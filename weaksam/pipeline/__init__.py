"""A run file becomes steps, and steps are run in order."""

from weaksam.pipeline.manifest import git_commit
from weaksam.pipeline.run_file import Parsed, load, parse, resolve_steps, select, warnings_of
from weaksam.pipeline.running import run_steps

__all__ = ["Parsed", "git_commit", "load", "parse", "resolve_steps", "run_steps", "select", "warnings_of"]
