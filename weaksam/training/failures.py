"""Classifies failures of Ray Train: whether a retry can help, and what the user must do.

Light to import: the controller of Ray Train imports it without the packages of networks.
"""

from __future__ import annotations

import ray.train
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import RayTrainError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

from weaksam.errors import ConfigError, StageError, TaskError, WeakSamError

# Errors of a lost worker, a lost connection, a busy device or a full disk; gloo and NCCL raise RuntimeError.
_MAY_PASS = (RayError, RayTrainError, RuntimeError, OSError, MemoryError)


class TrainingPolicy(DefaultFailurePolicy):
    """Ray Train's policy, without retries of errors that would be raised again."""

    def make_decision(self, training_failed_error: ray.train.TrainingFailedError) -> FailureDecision:
        """Returns whether the workers are restarted."""
        if any(map(is_lasting, causes_of(training_failed_error))):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


def causes_of(error: ray.train.TrainingFailedError) -> list[BaseException]:
    """Returns the errors of workers, or the error that ended Ray Train's controller."""
    if isinstance(error, ray.train.WorkerGroupError):
        return list(error.worker_failures.values())
    return [getattr(error, "controller_failure", error)]


def is_lasting(cause: BaseException) -> bool:
    """Returns whether each retry of the same training would end with this error."""
    if isinstance(cause, WeakSamError):
        return cause.exit_code != StageError.exit_code
    return isinstance(cause, TaskError) or not isinstance(cause, _MAY_PASS)


def explain(folder: str, error: ray.train.TrainingFailedError) -> Exception:
    """Returns the error to raise for a failed training, with the exit code of its cause (see `errors`).

    For a bug it is Ray's error, which has the traceback of the worker.
    """
    causes = causes_of(error)
    lasting = [cause for cause in causes if is_lasting(cause)]
    ours = next((cause for cause in lasting or causes if isinstance(cause, WeakSamError)), None)
    if ours is not None and is_lasting(ours):
        return type(ours)(f"{folder}: {ours}")
    if lasting:
        return error
    if any(type(cause).__name__ == "OutOfMemoryError" and not isinstance(cause, RayError) for cause in causes):
        return ConfigError(
            f"{folder}: the memory of the device does not hold a batch ({causes[0]}): set resources.micro_batch_size, "
            "which changes nothing that is learnt, and run the same command again: it goes on from its checkpoint"
        )
    return StageError(
        f"{folder}: training stopped ({error if ours is None else ours}): the same command goes on from its checkpoint"
    )
