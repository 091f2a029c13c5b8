"""Errors that a user can fix. Any other exception is a bug and keeps its traceback.

Each has the exit code of the command or job: 2, the run file, the command, the data or the weights are wrong and the
same command would fail again; 3, too many rows failed; 4, a fault of storage or cluster: the same command resumes.
"""

from __future__ import annotations

from typing import Any

from weaksam.masking import masked


class WeakSamError(Exception):
    """Base of errors with a message for the user: the problem, the actual value and a fix.

    Contains every fault, not only the first. Secrets in URLs are masked.
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
    """The content of a dataset, table or export is invalid. The message names the file and the line, key or row."""


class DamagedError(DataError):
    """A file of a run was truncated or altered after it was written. The message names it and how to replace it."""


class MissingFileError(DataError):
    """A file that a setting names does not exist."""


class StorageError(WeakSamError):
    """A URI could not be read or written because of network or permission. Never caused by a single image."""

    exit_code = 4


class DeniedError(StorageError):
    """A store or file system denies access; the same command resumes once access is granted."""


class ClusterError(WeakSamError):
    """The cluster cannot be reached, denies access, or lost its tasks."""

    exit_code = 4


class WeightsError(WeakSamError):
    """A weights file is truncated, altered, or does not fit the model. The message names the file."""


class DivergedError(WeakSamError):
    """A training stopped because its loss, gradient or weights are not finite; the same settings fail again."""


class TaskError(Exception):
    """The code of a training task raised an exception: a bug that a retry cannot fix.

    Not for the user: the command ends with a traceback and exit code 1. The message has type and text of the cause.
    """


class StageError(WeakSamError):
    """A stage ended without a complete result. The same command resumes it."""

    exit_code = 4


class FailedRowsError(StageError):
    """A step is complete, but more of its rows failed than `max_failed` allows."""

    exit_code = 3


class ImageError(Exception):
    """An image cannot be used. Becomes `status` and `message` of the image's row and never aborts a job.

    Args:
        status: a value of `schemas.FAILED_STATUSES`, e.g. `unreadable`.
        message: the fault, for the user.
    """

    def __init__(self, status: str, message: str) -> None:
        self.status = status
        self.message = masked(message)
        super().__init__(status, self.message)  # the constructor's arguments, so that the error can be pickled

    def __str__(self) -> str:
        return f"{self.status}: {self.message}"
