"""Plans the Ray job that runs a run file on a cluster.

The upload is small: the run file, and the packages `weaksam` and `jobs` unless the nodes have them. The job runs
`python -m jobs.pipeline`, so it resumes as every run does: submit the same again after a cluster was lost.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from weaksam import pipeline
from weaksam.cluster.settings import ClusterSettings, Entrypoint, resource_overrides
from weaksam.core import storage
from weaksam.core.config import places_of
from weaksam.core.proxies import is_loopback
from weaksam.errors import ConfigError
from weaksam.execution.pools import DRIVER_CPUS_VARIABLE
from weaksam.masking import holds_secret
from weaksam.pipeline import RunFile

log = logging.getLogger(__name__)

CODE = Path(__file__).resolve().parents[2]
PACKAGES = ("weaksam", "jobs")

_EXCLUDES = ("__pycache__", "*.pyc")


@dataclass(frozen=True)
class Job:
    """A job to submit."""

    id: str
    address: str
    entrypoint: str
    run: str
    runtime_env: dict[str, Any]
    driver: Entrypoint
    config: str
    overrides: list[str]
    sent: str

    @property
    def ray_line(self) -> str:
        """The `ray job submit` command that does the same; it sends the whole folder of the run file."""
        words = ["ray", "job", "submit", "--address", self.address, "--submission-id", self.id]
        if self.driver.cpus:
            words += ["--entrypoint-num-cpus", f"{self.driver.cpus:g}"]
        if self.driver.memory:
            words += ["--entrypoint-memory", str(self.driver.memory)]
        if self.driver.resources:
            words += ["--entrypoint-resources", json.dumps(self.driver.resources)]
        beside = self.runtime_env | {"working_dir": str(Path(self.config).resolve().parent)}
        words += ["--runtime-env-json", json.dumps(beside)]
        return f"{shlex.join(words)} -- {self.entrypoint}"


def plan_job(
    run_file: RunFile,
    cluster: ClusterSettings,
    folder: str,
    *,
    module: str = "jobs.pipeline",
    flags: Sequence[str] = (),
    name: str | None = None,
) -> Job:
    """Returns the job that runs a run file on a cluster, with the resources that the cluster file sets for its steps.

    Args:
        run_file: the run file that the job runs.
        cluster: settings of the cluster.
        folder: local folder that receives the files to send.
        module: Python module that the job runs.
        flags: arguments of the module, after the overrides.
        name: beginning of the job's id.

    Raises:
        ConfigError: the resources of the cluster do not fit a step, or an override holds a secret.
    """
    run_file = pipeline.with_defaults(run_file, resource_overrides(cluster, run_file))
    config, run, used = run_file.path, run_file.run, list(run_file.overrides)
    if faults := [_secret_fault(text) for text in used if holds_secret(text)]:
        raise ConfigError(*faults)
    places = _absolute_places(run_file)
    used += places
    if storage.is_local(run):
        used = [
            *(text for text in used if not text.startswith("run=")),
            f"run={run}",
        ]  # the job has another working folder
    if not is_loopback(urlsplit(cluster.address).hostname or ""):
        for place in [*([f"run={run}"] if storage.is_local(run) else []), *places]:
            log.warning("%s: every node of the cluster must see this folder: usually an s3:// URI is meant", place)
    shutil.copy(config, folder)
    runtime_env: dict[str, Any] = {"working_dir": folder, "env_vars": _environment(cluster, run_file)}
    sent = "the run file"
    if cluster.send_code:
        code = {"py_modules": [str(CODE / package) for package in PACKAGES]}
        runtime_env |= code | {"excludes": [*_EXCLUDES, *cluster.excludes]}
        sent += f" and the code, {_size_of_code() / 2**20:.1f} MiB before compression"
    words = ["python", "-m", module, Path(config).name, *used, *flags]
    chosen = name or f"weaksam-{re.sub(r'[^A-Za-z0-9]+', '-', Path(config).stem)}"
    return Job(
        id=f"{chosen}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}",
        address=cluster.address,
        entrypoint=shlex.join(words),
        run=run,
        runtime_env=runtime_env,
        driver=cluster.entrypoint,
        config=config,
        overrides=used,
        sent=sent,
    )


def _absolute_places(run_file: RunFile) -> list[str]:
    """Returns overrides with absolute paths for relative paths in steps, as the job has another working folder."""
    overrides = []
    for name, (_, config) in run_file.steps.items():
        for key, place in places_of(config):
            raw: Any = run_file.content["steps"].get(name)
            for part in key.split("."):
                raw = raw.get(part) if isinstance(raw, Mapping) else None
            if isinstance(raw, str) and storage.is_local(raw) and raw != (whole := storage.absolute(place)):
                overrides.append(f"steps.{name}.{key}={json.dumps(whole, ensure_ascii=False)}")
    return overrides


def _secret_fault(override: str) -> str:
    key = override.partition("=")[0]
    return (
        f"{key}: holds a URL with a password or signature, which would be readable in the job's description: put it in "
        "the run file, or name a place that the nodes can read by their own rights"
    )


def _environment(cluster: ClusterSettings, run_file: RunFile) -> dict[str, str]:
    """Returns the variables of the job and its workers that are added to the environment of the nodes."""
    env = {**cluster.env, **{key: os.environ[key] for key in cluster.pass_env if key in os.environ}}
    env |= run_file.server.variables
    if cluster.entrypoint.cpus:
        env[DRIVER_CPUS_VARIABLE] = f"{cluster.entrypoint.cpus:g}"
    env.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray logs an error for every actor pool, although none happened
    if commit := pipeline.git_commit():
        env.setdefault("WEAKSAM_GIT_COMMIT", commit)
    return env


def _size_of_code() -> int:
    files = [path for package in PACKAGES for path in (CODE / package).rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if "__pycache__" not in path.parts)


@contextmanager
def staged() -> Iterator[str]:
    """Creates a temporary folder for the files to send."""
    with tempfile.TemporaryDirectory(prefix="weaksam-") as folder:
        yield folder
