"""Submits a run file and this code as a Ray job, and returns its log and exit code.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from weaksam import pipeline
from weaksam.cluster.settings import ClusterSettings, Entrypoint, resource_overrides
from weaksam.core import storage
from weaksam.core.config import places_of
from weaksam.core.proxies import is_loopback, spare_loopback
from weaksam.errors import ClusterError, ConfigError
from weaksam.execution import ray_env
from weaksam.execution.pools import DRIVER_CPUS_VARIABLE
from weaksam.masking import holds_secret, masked, masked_values
from weaksam.pipeline import RunFile

log = logging.getLogger(__name__)

CODE = Path(__file__).resolve().parents[2]
PACKAGES = ("weaksam", "jobs")

_EXCLUDES = ("__pycache__", "*.pyc")
_POLL_SECONDS = 2.0
_LOST_SECONDS = 300.0  # after this time without an answer a cluster counts as lost; its job may still run


class NoJobError(ConfigError):
    """The cluster has no such job."""


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


class Cluster:
    """The jobs of a cluster; faults of the connection become ClusterError with a fix.

    Args:
        address: URL of its dashboard.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        spare_loopback()  # Ray's client uses the proxy of the environment for every address
        ray_env.prepare_client()
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
            logging.getLogger(name).setLevel(logging.WARNING)  # a line for each package sent
        self._client = self._asking(lambda: JobSubmissionClient(address))

    def submit(self, job: Job) -> None:
        """Sends a job; it runs when the cluster has room for its driver."""
        self._asking(
            lambda: self._client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=job.id,
                runtime_env=dict(job.runtime_env),  # a copy: Ray replaces folders in it by the URIs of the uploads
                metadata={"run": job.run, "weaksam": "1"},
                entrypoint_num_cpus=job.driver.cpus or None,
                entrypoint_memory=job.driver.memory,
                entrypoint_resources=job.driver.resources or None,
            )
        )

    def jobs(self) -> list[dict[str, Any]]:
        """Returns every job that this program submitted to the cluster, newest first."""
        listed = self._asking(self._client.list_jobs)
        ours = [details for details in listed if details.submission_id and (details.metadata or {}).get("weaksam")]
        return sorted(map(_described, ours), key=lambda job: job["started"] or "", reverse=True)

    def job(self, job_id: str) -> dict[str, Any]:
        """Returns a job's `job`, `state`, `exit_code`, `message`, `run`, `entrypoint`, `started` and `ended`."""
        return _described(self._asking(lambda: self._client.get_job_info(job_id), job_id))

    def log(self, job_id: str) -> str:
        """Returns the output of the job so far."""
        return self._asking(lambda: self._client.get_job_logs(job_id), job_id)

    def cancel(self, job_id: str) -> bool:
        """Ends a job; its parts are kept, and the same submission again resumes it. Returns False if it had ended."""
        if self.job(job_id)["state"] not in ("PENDING", "RUNNING"):
            return False
        return bool(self._asking(lambda: self._client.stop_job(job_id), job_id))

    def follow(self, job_id: str, show: Callable[[str], None], *, is_known: bool = False) -> dict[str, Any]:
        """Shows the log as it grows until the job has ended; returns its last state.

        Args:
            job_id: id of the job.
            show: receives each new part of the log.
            is_known: whether this program has seen the job on the cluster.

        Raises:
            ClusterError: the cluster did not answer for minutes, or has lost the job.
            ConfigError: the cluster never had such a job.
        """
        shown, answered = 0, time.monotonic()
        while True:
            try:
                state = self.job(job_id)  # read before the log, so the log of an ended job is complete
                text = self.log(job_id)
            except ClusterError:
                if time.monotonic() - answered > _LOST_SECONDS:
                    raise
                time.sleep(_POLL_SECONDS)
                continue
            except NoJobError as error:
                if not is_known:
                    raise
                raise ClusterError(
                    f"{self.address}: the cluster knows job {job_id} no more: its head was replaced, and the job ended "
                    "with it: submit the same again, which goes on where the job was"
                ) from error
            answered, is_known = time.monotonic(), True
            show(text[shown:])
            shown = max(shown, len(text))
            if state["state"] not in ("PENDING", "RUNNING"):
                return state
            time.sleep(_POLL_SECONDS if shown < 2**20 else 5 * _POLL_SECONDS)

    def _asking(self, question: Callable[[], Any], job_id: str | None = None) -> Any:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            return question()
        except AuthenticationError as error:
            raise ClusterError(
                f"{self.address}: the cluster does not let us in: put its token in RAY_AUTH_TOKEN, or the file that "
                "holds it in RAY_AUTH_TOKEN_PATH"
            ) from error
        except (ConnectionError, requests.RequestException) as error:
            raise ClusterError(
                f"{self.address}: no cluster answers: check the address, or open a way to its dashboard "
                "(`ray dashboard`, `kubectl port-forward`)"
            ) from error
        except RuntimeError as error:
            if job_id is not None and "does not exist" in str(error):
                raise NoJobError(f"{self.address}: there is no job {job_id!r}: `weaksam jobs` lists them") from error
            message = (str(error).strip().splitlines() or ["?"])[-1]
            if "No available agent" in message:
                message += ": the head has just started, or its agent did not: see dashboard_agent.log there"
            raise ClusterError(f"{self.address}: {message}") from error


def exit_code(state: Mapping[str, Any]) -> int:
    """Returns the exit code of an ended job; 4 when it was ended from outside or its node was lost."""
    if state["state"] == "SUCCEEDED":
        return 0
    return state["exit_code"] if state["state"] == "FAILED" and state["exit_code"] in (1, 2, 3, 4) else 4


def _described(details: Any) -> dict[str, Any]:
    return {
        "job": details.submission_id,
        "state": str(getattr(details.status, "value", details.status)),
        "exit_code": details.driver_exit_code,
        "message": " ".join((details.message or "").split(", last available logs")[0].split()),
        "run": masked_values((details.metadata or {}).get("run")),
        "entrypoint": masked(details.entrypoint or ""),
        "started": _when(details.start_time),
        "ended": _when(details.end_time),
    }


def _when(milliseconds: int | None) -> str | None:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(milliseconds / 1000)) if milliseconds else None
