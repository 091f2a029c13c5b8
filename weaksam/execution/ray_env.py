"""Environment variables that Ray and the processes of a local cluster read; no other module sets one for Ray.

Ray's core reads its variables once, when `ray` is imported; Ray Data and Ray Train read theirs at the first pass and
training. So `prepare` comes before the first import of Ray: `connect` and `run_steps` call it. The processes of a
cluster read theirs when they start, so `prepare_own_cluster` comes before `ray.init`.
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
    # A task whose worker is ended for want of memory is tried again for ever by default.
    "RAY_task_oom_retries": "5",
    # Ray Train looks at its workers every two seconds by default, and twice after the last step: the end of a training,
    # a report and a dead worker are noticed that much later.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
_OF_LOCAL_DRIVER = {
    "RAY_AUTH_MODE": "token",  # what a local cluster has anyway, without the notice
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # its complaint about every actor pool is no error
}
_OF_PROCESSES = {
    # glibc gives large buffers back to the system at once, and getting them again can cost more than the work on them:
    # elementwise operations of torch on a virtual machine were three times slower without these.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    # Where there are more workers than cores, Ray ends one that had no task for a second, and the next block of images
    # pays for another: some two seconds of a core. Small images on two cores took a fifth longer.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}
_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def starts_own_cluster() -> bool:
    """Whether this process starts Ray on this machine, because RAY_ADDRESS names no cluster."""
    return os.environ.get("RAY_ADDRESS", "local") == "local"


def prepare() -> None:
    """Sets what Ray must read in this process, where the environment does not say otherwise, before Ray is imported.

    A program that has imported Ray itself keeps how Ray was loaded: changed later, no local cluster starts any more.
    """
    _set_missing(_OF_DRIVER)
    if starts_own_cluster() and "ray" not in sys.modules:
        _set_missing(_OF_LOCAL_DRIVER)


def prepare_client() -> None:
    """The same for a program that only sends jobs to a cluster: a token is used where there is one."""
    named = any(os.environ.get(name) for name in _TOKEN_VARIABLES)
    has_token = named or os.path.exists(os.path.expanduser("~/.ray/auth_token"))
    _set_missing({"RAY_AUTH_MODE": "token" if has_token else "disabled"})


def prepare_own_cluster() -> None:
    """Sets what the processes of a cluster on this machine read, where the environment does not say otherwise.

    Among it are a name and a token of its user, where there is none.
    """
    _set_missing(_OF_PROCESSES)
    os.environ.update(missing_name())
    if os.environ.get("RAY_AUTH_MODE") == "token":
        os.environ.update(give_token(os.environ))


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


def _set_missing(variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)
