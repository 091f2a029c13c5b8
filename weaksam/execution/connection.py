"""Connects a run to Ray: joins the cluster of RAY_ADDRESS, or starts a local cluster.

A local cluster listens on the loopback interface only, has a token that no other user can read, and needs neither a
home folder nor a user name.

`connect` imports Ray after it has called `ray_env.prepare`. Modules that import Ray at their top are imported later.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from weaksam.core.object_stores import VARIABLES
from weaksam.errors import ClusterError, ConfigError
from weaksam.execution import ray_env
from weaksam.execution.lost_cluster import end_when_lost, host_and_port

log = logging.getLogger(__name__)

_LOCAL = "local"
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
_REACH_SECONDS = 30.0  # long enough for a head that is being replaced; Ray itself tries for a quarter of an hour
_CONNECT_SECONDS = 5.0


def connect() -> None:
    """Joins the cluster of `RAY_ADDRESS` (a submitted job has it set) or starts one on this machine.

    Does nothing if this process has joined a cluster already. Keeps the program's own SIGTERM handler.

    Raises:
        ConfigError: RAY_ADDRESS is no address, or Ray cannot start with these folders or this little memory.
        ClusterError: the cluster cannot be reached.
    """
    ray_env.prepare()
    if _has_joined():
        return
    from weaksam.execution import own_cluster

    address = cluster_address(os.environ)
    with _own_sigterm():
        if address == _LOCAL:
            own_cluster.start(_QUIET)
        else:
            _join(address)
    if not address.startswith("ray://"):  # with a Ray client, the driver is a process of the cluster
        end_when_lost()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keeps the program's SIGTERM handler, if it has one: Ray's core installs its own, which dumps its stacks."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def check_cluster() -> None:
    """Checks that `connect` can reach the cluster it will join; takes at most half a minute.

    Does nothing if `connect` will start a local cluster.

    Raises:
        ConfigError: RAY_ADDRESS is no address.
        ClusterError: nothing answers at the address.
    """
    if not _has_joined() and (address := cluster_address(os.environ)) != _LOCAL:
        check_reachable(address)


def _has_joined() -> bool:
    """Returns whether Ray runs in this process; does not import it."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def cluster_address(environment: Mapping[str, str]) -> str:
    """Returns `RAY_ADDRESS`, or `local` if it is not set.

    Raises:
        ConfigError: it cannot be the address of a cluster.
    """
    address = environment.get("RAY_ADDRESS", _LOCAL)
    if not address.strip():
        raise ConfigError("RAY_ADDRESS is empty: unset it to run on this machine, or name a cluster as host:6379")
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS={address}: the URL of a dashboard is for `weaksam submit --address`: name the head as "
            "host:6379, or unset RAY_ADDRESS to run on this machine"
        )
    if address not in (_LOCAL, "auto") and host_and_port(address) is None:
        raise ConfigError(
            f"RAY_ADDRESS={address}: no address of a cluster: host:6379, auto or local were expected: correct it, or "
            "unset it to run on this machine"
        )
    return address


def check_reachable(address: str, *, seconds: float = _REACH_SECONDS) -> None:
    """Waits up to `seconds` until a process listens at `host:port`; Ray would wait much longer.

    Raises:
        ClusterError: no process listens.
    """
    endpoint = host_and_port(address)
    end, is_logged = time.monotonic() + seconds, False
    while endpoint is not None:
        try:
            socket.create_connection(endpoint, timeout=_CONNECT_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ClusterError(
                    f"the cluster at {address} cannot be joined ({error}): check RAY_ADDRESS, or unset it to run on "
                    "this machine"
                ) from error
            if not is_logged:
                log.info("the cluster at %s does not answer yet (%s)", address, error)
                is_logged = True
        time.sleep(1.0)


def _join(address: str) -> None:
    import ray
    import ray.exceptions

    check_reachable(address)
    try:
        ray.init(address=address, runtime_env={"env_vars": _variables_of_workers(os.environ)}, **_QUIET)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        reason = (str(error).strip().splitlines() or ["?"])[0]
        raise ClusterError(
            f"the cluster at {address} cannot be joined ({reason}): check RAY_ADDRESS and RAY_AUTH_TOKEN"
        ) from error


def _variables_of_workers(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables to forward to workers, unless their job already sets them."""
    job = json.loads(environment.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    of_job = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: environment[name] for name in VARIABLES if name in environment and name not in of_job}
