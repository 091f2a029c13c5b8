"""The jobs of a cluster: sends, lists, follows and ends them, and returns their logs and exit codes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from weaksam.cluster.submit import Job
from weaksam.core.proxies import spare_loopback
from weaksam.errors import ClusterError, ConfigError
from weaksam.execution import ray_env
from weaksam.masking import masked, masked_values

_POLL_SECONDS = 2.0
_LOST_SECONDS = 300.0  # after this time without an answer a cluster counts as lost; its job may still run


class NoJobError(ConfigError):
    """The cluster has no such job."""


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
