"""What Ray needs to start on this machine, whoever runs it: memory, a CPU, a name of the user, a token, short paths."""

from __future__ import annotations

import getpass
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from weaksam.core.memory import available_memory, cpu_quota, memory_limit
from weaksam.errors import ClusterError, ConfigError, WeakSamError

log = logging.getLogger(__name__)

# An estimate: Ray up to 1.0 GiB, a driver 0.4, a worker with torch and a small SAM 0.6.
LEAST_MEMORY = 2 * 2**30

_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def start(options: Mapping[str, Any]) -> None:
    """Starts Ray on this machine, on the loopback interface only.

    Raises:
        ConfigError: it cannot start with this memory or these folders.
        ClusterError: it did not start, and may do so later.
    """
    check_memory(available_memory(), memory_limit())
    # Without the dashboard, which nobody opens here: its nine processes take seconds to start, and memory.
    given: dict[str, Any] = {"include_dashboard": False}
    if (cpus := cpu_quota()) is not None and cpus < 1:
        log.info("this container has %g CPU: it counts as one, the least that Ray works with", cpus)
        given["num_cpus"] = 1
    os.environ.update(missing_name())
    if os.environ.get("RAY_AUTH_MODE") == "token":
        os.environ.update(give_token(os.environ))
    try:
        with _on_loopback():
            ray.init(address="local", **options, **given)
    except Exception as error:  # Ray has no classes for these
        if found := explain(error, os.environ):
            raise found from error
        raise


def check_memory(available: int, limit: int) -> None:
    """Raises when Ray and one worker would not fit: the system, or Ray, would end workers again and again.

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


def missing_name() -> dict[str, str]:
    """A name for a user who has none (a container with any user id), as an environment variable; else nothing."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        return {"USER": f"user{os.getuid()}"}
    return {}


def give_token(environment: Mapping[str, str]) -> dict[str, str]:
    """Makes the token of Ray's clusters on this machine, readable by its user alone, or makes the file so.

    Returns:
        Environment variables with a token for this cluster alone, where the home folder cannot hold one; else none.
    """
    if any(environment.get(name) for name in _TOKEN_VARIABLES):
        return {}
    try:
        path = Path.home() / ".ray" / "auth_token"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError), open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
        path.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        log.debug("no token in the home folder (%s): this cluster has one of its own", error)
        return {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return {}


def explain(error: Exception, environment: Mapping[str, str]) -> WeakSamError | None:
    """The error for the user where Ray did not start; None where its own is the best there is."""
    place = environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp"
    if "timed out during startup" in str(error):
        return ClusterError(
            "Ray did not start in time on this machine: it is busy, or its disk is full (/tmp/ray, or RAY_TMPDIR): "
            "the same command goes on"
        )
    if "AF_UNIX path length" in str(error):
        return ConfigError(f"{place}: too long a path for Ray's sockets: set RAY_TMPDIR to a short one, such as /tmp")
    if isinstance(error, OSError) and str(error.filename or "").startswith(place):
        return ConfigError(
            f"{error.filename}: Ray cannot write there ({error.strerror}): set RAY_TMPDIR to a folder of your own with "
            "a short path"
        )
    return None


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Within it Ray starts with 127.0.0.1 as its only address, as it does on macOS and Windows.

    There it is the default (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER); elsewhere Ray replaces an address of loopback that it
    is given, and listens on every interface.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
