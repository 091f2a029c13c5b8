"""Errors a user can act on, by who must act. Everything else is a bug and keeps its traceback.

Each has the exit code that a command or job ends with: 2, the run file, the command, the data or the weights are wrong
and the same command would fail again; 3, too many rows failed; 4, storage or cluster, where the same command goes on.
"""

from __future__ import annotations

from typing import Any

from weaksam.masking import masked


class WeakSamError(Exception):
    """Base of every error with a message written for the user: what is wrong, what was got, what to do.

    Carries every fault that was found, not only the first. Secrets in URLs are masked.
    """

    exit_code = 2

    def __init__(self, *faults: Any) -> None:
        self.faults = [masked(str(fault)) for fault in faults]
        super().__init__(*self.faults)

    def __str__(self) -> str:
        return "\n".join(self.faults)


class ConfigError(WeakSamError):
    """The run file, an override or a command-line value is wrong."""


class DataError(WeakSamError):
    """A dataset, table or export does not say what it must. The message names the file and the line, key or row."""


class DamagedError(DataError):
    """A file of a run was cut or altered after it was written. The message names it and says how to replace it."""


class MissingFileError(DataError):
    """A file that a setting names is not there."""


class StorageError(WeakSamError):
    """A URI could not be read or written: network or permission. Never the fault of one image."""

    exit_code = 4


class DeniedError(StorageError):
    """A store or file system does not let us in; the same command goes on once it does."""


class ClusterError(WeakSamError):
    """The cluster cannot be reached, does not let us in, or lost what it was doing."""

    exit_code = 4


class WeightsError(WeakSamError):
    """A weights file is truncated, altered, or does not fit the model. The message names the file."""


class DivergedError(WeakSamError):
    """A training stopped because its loss, gradient or weights are not finite: the same settings lead there again."""


class TaskError(Exception):
    """The code of a training's own task raised: a bug, which happens again however often it is tried.

    Not for the user: it ends with a traceback and exit code 1. The message has the type and text of the cause.
    """


class StageError(WeakSamError):
    """A stage ended without a complete result. Running the same command again goes on where it stopped."""

    exit_code = 4


class FailedRowsError(StageError):
    """A step is complete, but more of its rows failed than may."""

    exit_code = 3


class ImageError(Exception):
    """One image cannot be used. Becomes that image's row: `status` and `message`, never an aborted job.

    Args:
        status: a short reason out of `schemas.FAILED_STATUSES`, e.g. `unreadable`.
        message: what is wrong with this image, for a person.
    """

    def __init__(self, status: str, message: str) -> None:
        self.status = status
        self.message = masked(message)
        super().__init__(status, self.message)  # as given, so that it survives pickling between processes

    def __str__(self) -> str:
        return f"{self.status}: {self.message}"
