"""A cluster file: the cluster to which `weaksam submit` sends jobs, their environment, and the pools of its nodes."""

from __future__ import annotations

import json
import os
from urllib.parse import urlsplit

from pydantic import Field

from weaksam.core.config import Settings, parse_settings
from weaksam.core.yaml_files import load_run_file
from weaksam.errors import ConfigError
from weaksam.execution.pools import CpuPoolResources, PoolResources
from weaksam.masking import is_secret
from weaksam.pipeline import RunFile
from weaksam.training.settings import TrainResources


class Entrypoint(Settings):
    """Resources that the driver of a job reserves; the stages reserve their own."""

    cpus: float = Field(default=0, ge=0)
    """CPUs reserved for the driver; with 0 it also runs on a head node that takes no work and so has no CPUs."""
    memory: int | None = Field(default=None, ge=1)
    """Bytes reserved for the driver."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom resources of the node on which the driver must run."""


class ClusterSettings(Settings):
    """A cluster file: the address of a cluster, and the environment and resources of its jobs."""

    address: str = "http://127.0.0.1:8265"
    """URL of the cluster's dashboard."""
    send_code: bool = True
    """Whether the packages `weaksam` and `jobs` are sent; false when every node's image has them."""
    excludes: list[str] = Field(default_factory=list)
    """Files of these packages that are not sent, as in a .gitignore."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of the job and its workers; never credentials, which the nodes have."""
    pass_env: list[str] = Field(default_factory=list)
    """Names of variables that the job gets from the environment of `weaksam submit`; never credentials."""
    entrypoint: Entrypoint = Field(default_factory=Entrypoint)
    """Resources of the driver."""
    pools: PoolResources = PoolResources()
    """Overrides `resources` of every step with a pool of actors; the command line overrides both."""
    trainings: TrainResources = TrainResources()
    """Overrides `resources` of every training; the command line overrides both."""


def load_cluster(path: str | None, address: str | None) -> ClusterSettings:
    """Reads a cluster file, or returns the defaults; `address` overrides the environment, which overrides the file.

    Raises:
        ConfigError: the file or the address is wrong.
    """
    raw = load_run_file(path) if path else {}
    settings, faults = parse_settings(ClusterSettings, raw, where=path or "cluster")
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if settings is not None:
        settings = settings.model_copy(update={"address": address or settings.address})
        faults += cluster_faults(settings, path or "cluster")
    if faults or settings is None:
        raise ConfigError(*faults)
    return settings


def cluster_faults(settings: ClusterSettings, where: str) -> list[str]:
    """Returns the faults of settings that have the right form, each with its key."""
    faults = []
    if not settings.address.startswith(("http://", "https://")):
        faults.append(f"{where}.address: must be the URL of a dashboard, http://..., got {settings.address!r}")
    elif "@" in urlsplit(settings.address).netloc:
        faults.append(f"{where}.address: holds credentials, which would be shown: put the token in RAY_AUTH_TOKEN")
    passed = {name: os.environ.get(name, "") for name in settings.pass_env}
    for key, values in (("env", settings.env), ("pass_env", passed)):
        faults += [
            f"{where}.{key}.{name}: looks like a credential, which would be readable in the job's description: "
            "give it to the nodes, by the role or service account they run as, or in the environment that Ray is "
            "started with there (on Kubernetes a Secret under envFrom)"
            for name, value in values.items()
            if is_secret(name, value)
        ]
    return faults


def resource_overrides(cluster: ClusterSettings, run_file: RunFile) -> list[str]:
    """Returns the resources of a cluster file as overrides of the steps of a run file."""
    overrides = []
    for name, (stage, _) in run_file.steps.items():
        field = stage.config.model_fields.get("resources")
        for defaults in (cluster.pools, cluster.trainings):
            if field and isinstance(field.annotation, type) and issubclass(field.annotation, type(defaults)):
                values = defaults.model_dump(mode="json", exclude_unset=True)
                if issubclass(field.annotation, CpuPoolResources):
                    values.pop("actor_gpus", None)  # the stage would wait for a GPU and leave it idle
                overrides += [f"steps.{name}.resources.{key}={json.dumps(value)}" for key, value in values.items()]
    return overrides
