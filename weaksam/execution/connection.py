"""How a run gets its Ray: it joins the cluster of RAY_ADDRESS, or starts one on this machine alone.

A cluster of our own listens on the loopback interface only, has a token that no other user can read, and needs neither
a home folder nor a name of the user.

Ray is imported by `connect`, after `ray_env.prepare`: what imports Ray at its top is imported after that.
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
from weaksam.execution.lost_cluster import end_when_lost, host_and_port, stop_watching

log = logging.getLogger(__name__)

_LOCAL = "local"
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
_REACH_SECONDS = 30.0  # for a head that is being replaced; Ray itself tries for a quarter of an hour
_CONNECT_SECONDS = 5.0


def connect() -> None:
    """Joins the cluster of `RAY_ADDRESS` (a submitted job has it set) or starts one on this machine.

    Does nothing where this process has joined one. The program's own handler of SIGTERM stays.

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
    if not address.startswith("ray://"):  # whose driver is a process of the cluster
        end_when_lost()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keeps the program's handler of SIGTERM, if it has one: Ray's core puts its own there, which dumps its stacks."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def check_cluster() -> None:
    """Looks whether `connect` has a cluster to join, which takes half a minute at most; nothing where it starts one.

    Raises:
        ConfigError: RAY_ADDRESS is no address.
        ClusterError: nothing answers there.
    """
    if not _has_joined() and (address := cluster_address(os.environ)) != _LOCAL:
        check_reachable(address)


def disconnect() -> None:
    """Leaves the cluster; ends it when `connect` started it."""
    import ray

    stop_watching()
    ray.shutdown()


def _has_joined() -> bool:
    """Whether Ray runs in this process; does not import it."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def cluster_address(environment: Mapping[str, str]) -> str:
    """`RAY_ADDRESS`, or `local` where it is not set.

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
    """Looks whether something listens at `host:port`, again and again for `seconds`: Ray would try for much longer.

    Raises:
        ClusterError: nothing does.
    """
    there = host_and_port(address)
    end, said = time.monotonic() + seconds, False
    while there is not None:
        try:
            socket.create_connection(there, timeout=_CONNECT_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ClusterError(
                    f"the cluster at {address} cannot be joined ({error}): check RAY_ADDRESS, or unset it to run on "
                    "this machine"
                ) from error
            if not said:
                log.info("the cluster at %s does not answer yet (%s)", address, error)
                said = True
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
    """What processes of a running cluster must know of this one's environment, unless their job has it."""
    job = json.loads(environment.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    of_job = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: environment[name] for name in VARIABLES if name in environment and name not in of_job}
