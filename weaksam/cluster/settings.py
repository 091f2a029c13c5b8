"""A cluster file: where `weaksam submit` sends jobs, what they are given there, and what its nodes can hold."""

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
    """What the driver of a job takes from the cluster; the stages reserve their own."""

    cpus: float = Field(default=0, ge=0)
    """CPUs reserved for it; a head that takes no work has none, so 0 runs there."""
    memory: int | None = Field(default=None, ge=1)
    """Bytes reserved for it."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom resources of the node it must run on."""


class ClusterSettings(Settings):
    """A cluster file: where jobs go, and what they are given there."""

    address: str = "http://127.0.0.1:8265"
    """URL of the cluster's dashboard."""
    send_code: bool = True
    """Whether the packages `weaksam` and `jobs` are sent; false when every node's image has them."""
    excludes: list[str] = Field(default_factory=list)
    """Files of them that are not sent, as in a .gitignore."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of the job and its workers; never credentials, which the nodes have."""
    pass_env: list[str] = Field(default_factory=list)
    """Names of variables that the job gets as they are here; never credentials."""
    entrypoint: Entrypoint = Field(default_factory=Entrypoint)
    """What the driver takes."""
    pools: PoolResources = PoolResources()
    """Laid over `resources` of every step with a pool of actors; the command line goes before."""
    trainings: TrainResources = TrainResources()
    """Laid over `resources` of every training; the command line goes before."""


def load_cluster(path: str | None, address: str | None) -> ClusterSettings:
    """A cluster file, or the defaults; the address given goes before that of the environment and of the file.

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
    """What is wrong with settings that have the right form, each fault named by its key."""
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


def resources_here(cluster: ClusterSettings, run_file: RunFile) -> list[str]:
    """What a cluster says of resources, as overrides of the steps of a run file."""
    found = []
    for name, (stage, _) in run_file.steps.items():
        field = stage.config.model_fields.get("resources")
        for here in (cluster.pools, cluster.trainings):
            if field and isinstance(field.annotation, type) and issubclass(field.annotation, type(here)):
                values = here.model_dump(mode="json", exclude_unset=True)
                if issubclass(field.annotation, CpuPoolResources):
                    values.pop("actor_gpus", None)  # it would wait for a GPU only to leave it idle
                found += [f"steps.{name}.resources.{key}={json.dumps(value)}" for key, value in values.items()]
    return found
