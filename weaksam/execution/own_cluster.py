"""Starts Ray on this machine for any user, and explains why it does not start: memory, a CPU, short paths."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants

from weaksam.core.memory import available_memory, cpu_quota, memory_limit
from weaksam.errors import ClusterError, ConfigError, WeakSamError
from weaksam.execution import ray_env

log = logging.getLogger(__name__)

# An estimate: Ray up to 1.0 GiB, a driver 0.4, a worker with torch and a small SAM 0.6.
LEAST_MEMORY = 2 * 2**30


def start(options: Mapping[str, Any]) -> None:
    """Starts Ray on this machine, on the loopback interface only.

    Raises:
        ConfigError: it cannot start with this memory or these folders.
        ClusterError: it did not start, and may do so later.
    """
    check_memory(available_memory(), memory_limit())
    # Without the dashboard, which a local run does not need: its nine processes take seconds to start, and memory.
    settings: dict[str, Any] = {"include_dashboard": False}
    if (cpus := cpu_quota()) is not None and cpus < 1:
        log.info("this container has %g CPU: it counts as one, the least that Ray works with", cpus)
        settings["num_cpus"] = 1
    ray_env.prepare_own_cluster()
    try:
        with _on_loopback():
            ray.init(address="local", **options, **settings)
    except Exception as error:  # Ray has no classes for these
        if user_error := explain(error, os.environ):
            raise user_error from error
        raise


def check_memory(available: int, limit: int) -> None:
    """Raises when Ray and one worker do not fit: the system, or Ray, would end workers again and again.

    Args:
        available: bytes that can be used now.
        limit: bytes of the machine or of the container.
    """
    if limit < LEAST_MEMORY:
        raise ConfigError(
            f"this machine (or container) has {limit / 2**30:.1f} GiB of memory, Ray and one worker need about "
            f"{LEAST_MEMORY / 2**30:g}: give it more"
        )
    if available < LEAST_MEMORY:
        raise ClusterError(
            f"{available / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB of memory are free, Ray and one worker need about "
            f"{LEAST_MEMORY / 2**30:g}: end other programs, or give the machine (or container) more"
        )


def explain(error: Exception, environment: Mapping[str, str]) -> WeakSamError | None:
    """Returns the error for the user when Ray did not start; None when Ray's own error says it best."""
    folder = environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp"
    if "timed out during startup" in str(error):
        return ClusterError(
            "Ray did not start in time on this machine: it is busy, or its disk is full (/tmp/ray, or RAY_TMPDIR): "
            "the same command goes on"
        )
    if "AF_UNIX path length" in str(error):
        return ConfigError(f"{folder}: too long a path for Ray's sockets: set RAY_TMPDIR to a short one, such as /tmp")
    if isinstance(error, OSError) and str(error.filename or "").startswith(folder):
        return ConfigError(
            f"{error.filename}: Ray cannot write there ({error.strerror}): set RAY_TMPDIR to a folder of your own with "
            "a short path"
        )
    return None


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Starts Ray with 127.0.0.1 as its only address within the block, as on macOS and Windows.

    On those systems this is the default (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER). On others Ray replaces a loopback address
    and listens on every interface.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
