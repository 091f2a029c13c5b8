"""Errors a user can act on, by who must act. Everything else is a bug and keeps its traceback."""

from __future__ import annotations


class WeakSamError(Exception):
    """Base of every error with a message written for the user: what is wrong, what was got, what to do."""


class ConfigError(WeakSamError):
    """The run file, an override or a command-line value is wrong. Carries every fault found, not only the first."""

    def __init__(self, *faults: str) -> None:
        self.faults = list(faults)
        super().__init__(*faults)

    def __str__(self) -> str:
        return "\n".join(self.faults)


class DataError(WeakSamError):
    """A dataset or table does not say what it must. The message names the file and the line, key or row."""


class StorageError(WeakSamError):
    """A URI could not be read or written: network, permission or a missing file. Never the fault of one image."""


class WeightsError(WeakSamError):
    """A weights file is truncated, altered, or does not fit the model. The message names the file."""


class StageError(WeakSamError):
    """A stage ended without a complete result. Running the same command again goes on where it stopped."""


class ImageError(Exception):
    """One image cannot be used. Becomes that image's row: `status` and `message`, never an aborted job.

    Args:
        status: a short reason out of `schemas.FAILED_STATUSES`, e.g. `unreadable`.
        message: what is wrong with this image, for a person.
    """

    def __init__(self, status: str, message: str) -> None:
        self.status = status
        self.message = message
        super().__init__(status, message)  # as given, so that it survives pickling between processes

    def __str__(self) -> str:
        return f"{self.status}: {self.message}"
