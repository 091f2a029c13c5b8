"""Code that all commands share: messages and exit codes of errors, log lines, the console, arguments."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

from weaksam.errors import ConfigError, WeakSamError
from weaksam.masking import masked

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="Run file (YAML).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings laid over the file: steps.<step>.<key>=<value>, run=<uri>."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def guarded(command: Callable[..., object]) -> Callable[..., None]:
    """Turns the errors that a user can act on into messages and exit codes (`errors`)."""

    @functools.wraps(command)
    def inner(*args: Any, **kwargs: Any) -> None:
        try:
            _check_working_folder()
            command(*args, **kwargs)
        except WeakSamError as error:
            for fault in error.faults:
                print(f"error: {fault}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("interrupted: the same command goes on from here", file=sys.stderr)
            raise typer.Exit(130) from None

    return inner


def end_on_sigterm() -> None:
    """Lets SIGTERM end this program as Ctrl-C does, so that it releases its resources of a cluster.

    Each program calls it once, at its start. Ray's own handler ends a process with a dump of its stacks.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _check_working_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the current folder is gone: change to one that is there") from None


def set_up_logging() -> None:
    """Logs messages of weaksam to stderr with the time of day, and only warnings of other libraries."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Masking("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("weaksam")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    logging.getLogger("ray.data").setLevel(logging.WARNING)


class _Masking(logging.Formatter):
    """Removes secrets in URLs from log lines, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def console() -> Console:
    """Returns a console on standard output; 240 columns in a pipe, where tables would be folded at 80."""
    return Console(width=None if sys.stdout.isatty() else 240, soft_wrap=True, markup=False)
