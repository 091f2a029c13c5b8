"""Environment variables that Ray and the processes of a local cluster read; no other module sets variables for Ray.

Ray's core reads its variables once, when `ray` is imported; Ray Data and Ray Train read theirs at the first pass and
training. So `connect` and `run_steps` call `prepare` before the first import of Ray. The processes of a cluster read
their variables when they start, so `prepare_own_cluster` is called before `ray.init`.
"""

from __future__ import annotations

import getpass
import logging
import os
import secrets
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

_OF_DRIVER = {
    # A killed driver's reservation in Ray Data's coordinator starves the next one until it expires (default 180 s).
    "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "30",
    # By default, a task whose worker ends for lack of memory is retried for ever.
    "RAY_task_oom_retries": "5",
    # By default, Ray Train checks its workers every two seconds, and twice after the last step: it notices the end of a
    # training, a report and a dead worker that much later.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # By default, each training starts a process that announces the end of a node to workers that ask; none asks here,
    # because a training goes on from its last checkpoint.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
_OF_LOCAL_DRIVER = {
    "RAY_AUTH_MODE": "token",  # the mode of a local cluster anyway; set, it avoids a notice
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # its message about every actor pool is no error
}
_OF_PROCESSES = {
    # glibc returns large buffers to the system at once, and allocating them again can cost more than the work on them:
    # elementwise operations of torch on a virtual machine were three times slower without these variables.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    # With more workers than cores, Ray ends a worker that had no task for a second, and the next block of images has to
    # wait for a new worker: about two seconds of a core. Small images on two cores took a fifth longer.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}
_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def starts_own_cluster() -> bool:
    """Returns whether this process starts Ray on this machine, because RAY_ADDRESS names no cluster."""
    return os.environ.get("RAY_ADDRESS", "local") == "local"


def prepare() -> None:
    """Sets the variables that Ray reads in this process, unless they are set, before Ray is imported.

    A program that has imported Ray itself keeps the variables of the local driver as they were: if they change after
    the import, no local cluster starts any more.
    """
    _set_missing(_OF_DRIVER)
    if starts_own_cluster() and "ray" not in sys.modules:
        _set_missing(_OF_LOCAL_DRIVER)


def prepare_client() -> None:
    """Sets the variables of a program that only sends jobs to a cluster: a token is used if there is one."""
    named = any(os.environ.get(name) for name in _TOKEN_VARIABLES)
    has_token = named or os.path.exists(os.path.expanduser("~/.ray/auth_token"))
    _set_missing({"RAY_AUTH_MODE": "token" if has_token else "disabled"})


def prepare_own_cluster() -> None:
    """Sets the variables that the processes of a cluster on this machine read, unless they are set.

    These include a name and a token for a user who has none.
    """
    _set_missing(_OF_PROCESSES)
    os.environ.update(missing_name())
    if os.environ.get("RAY_AUTH_MODE") == "token":
        os.environ.update(give_token(os.environ))


def missing_name() -> dict[str, str]:
    """Returns a name as an environment variable if the user has none (a container with any user id); else nothing."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        return {"USER": f"user{os.getuid()}"}
    return {}


def give_token(environment: Mapping[str, str]) -> dict[str, str]:
    """Writes the token of Ray's clusters on this machine, or makes an existing file readable by its user alone.

    Returns:
        Environment variables with a token for this cluster alone if the home folder cannot hold one; else none.
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


def _set_missing(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)
