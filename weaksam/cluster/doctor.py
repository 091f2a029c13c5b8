"""Whether the nodes of a cluster have what a run needs: seen from inside each, with a fix for each fault."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from weaksam import pipeline
from weaksam.core import storage
from weaksam.core.config import OutsideFile
from weaksam.core.object_stores import use_server
from weaksam.errors import ClusterError, WeakSamError
from weaksam.execution.connection import connect
from weaksam.execution.pools import PoolResources, fit_pool
from weaksam.masking import masked_url
from weaksam.sam.variants import VARIANTS
from weaksam.stages.proposal_settings import SamSettings

COMPARED = ("weaksam", "ray", "torch", "torchvision", "pyarrow", "numpy")

# Float32 bytes of SAM on a GPU, estimated: its weights twice (loading), the encoder's largest attention, and for each
# prompt of a chunk about six arrays as large as the image embedding (4096 tokens of 256).
_ENCODER_BYTES = 3e9
_PROMPT_BYTES = 6 * 4096 * 256 * 4
_CHUNK = 128


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `fix` says what to do where it is not well."""

    check: str
    node: str
    well: bool
    told: str
    fix: str = ""


def run_doctor(config: str, overrides: Sequence[str], *, as_json: bool = False) -> None:
    """Examines every node of the cluster that this process would run on, and prints what was found.

    Raises:
        ClusterError: something is not well.
    """
    run_file = pipeline.parse(config, overrides)
    use_server(run_file.server)
    findings = examine_cluster(run_file.run, [config for _, config in run_file.steps.values()])
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2), flush=True)
    else:
        for finding in findings:
            print(
                f"{'ok  ' if finding.well else 'BAD '} {finding.node:16} {finding.check:14} {finding.told}", flush=True
            )
            if finding.fix:
                print(f"{'':22}{'':14} -> {finding.fix}", flush=True)
    bad = [finding.check for finding in findings if not finding.well]
    if bad:
        raise ClusterError(f"{len(bad)} of {len(findings)} checks are not well: {', '.join(dict.fromkeys(bad))}")


def examine_cluster(run: str, settings: Sequence[Any]) -> list[Finding]:
    """Looks at every node, from a task that runs there."""
    connect()  # before Ray is imported
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    weights = weights_of(settings)
    examine = ray.remote(num_cpus=0, max_retries=1)(examine_node)
    waiting = {}
    for node in nodes:
        pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        name = node["NodeManagerHostname"]
        waiting[node["NodeID"]] = examine.options(scheduling_strategy=pinned).remote(
            name, run, weights, versions(), node["Resources"].get("object_store_memory", 0.0)
        )
    found = judge_pools(settings, [node["Resources"] for node in nodes])
    for node in nodes:
        try:
            found += ray.get(waiting[node["NodeID"]], timeout=1800)
        except Exception as error:  # whatever happens there, the other nodes are still to be told of
            told = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            found.append(
                Finding("answers", node["NodeManagerHostname"], False, told, "look at that node's log in /tmp/ray")
            )
    return found


def examine_node(
    node: str, run: str, weights: Sequence[dict[str, Any]], expected: Mapping[str, str], store_bytes: float
) -> list[Finding]:
    """What a node is like; runs on it.

    Args:
        node: its name.
        run: URI of the run folder.
        weights: from `weights_of`.
        expected: from `versions` on the driver.
        store_bytes: size of Ray's object store there.
    """
    found = [judge_versions(node, expected, versions()), probe_storage(node, run)]
    found += [check_weights(node, one) for one in weights]
    with suppress(OSError):
        found.append(judge_shared_memory(node, shutil.disk_usage("/dev/shm").total, store_bytes))
    models = [one["model"] for one in weights if one["model"]]
    found += [judge_gpu(node, name, total, models) for name, total in gpus()]
    return found


def versions() -> dict[str, str]:
    """Of Python and what must be the same everywhere, in this process."""
    found = {"python": platform.python_version()}
    for name in COMPARED:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def judge_versions(node: str, expected: Mapping[str, str], found: Mapping[str, str]) -> Finding:
    """Compares a node's versions with the driver's."""
    names = sorted(expected.keys() | found.keys())
    differing = [
        f"{name} {found.get(name, 'absent')}, driver {expected.get(name, 'absent')}"
        for name in names
        if expected.get(name) != found.get(name)
    ]
    if differing:
        return Finding("versions", node, False, "; ".join(differing), "run one image on every node: cluster/Dockerfile")
    return Finding("versions", node, True, ", ".join(f"{name} {found[name]}" for name in found))


def probe_storage(node: str, run: str) -> Finding:
    """Writes, reads and deletes an object in the run folder."""
    uri = storage.join(run, f".doctor-{uuid.uuid4().hex}")
    content = uuid.uuid4().bytes
    try:
        storage.write_bytes(uri, content)
        if storage.read_bytes(uri) != content:
            return Finding("storage", node, False, f"{run}: what was written reads otherwise", "use another store")
        storage.delete(uri)
    except (WeakSamError, OSError) as error:
        return Finding("storage", node, False, str(error), "give the nodes' role or key reading, writing and deleting")
    return Finding("storage", node, True, f"{run}: written, read, deleted")


def weights_of(settings: Sequence[Any]) -> list[dict[str, Any]]:
    """The weights files that steps name, each once: `uri`, `model` of SAM or None, `sha256` or None."""
    found: dict[str, dict[str, Any]] = {}
    for config in settings:
        for name, info in type(config).model_fields.items():
            value = getattr(config, name)
            if isinstance(value, SamSettings):
                key = value.checkpoint or value.model
                found[key] = {"uri": value.checkpoint, "model": value.model, "sha256": value.sha256}
            elif name == "weights" and value and any(isinstance(mark, OutsideFile) for mark in info.metadata):
                found.setdefault(value, {"uri": value, "model": None, "sha256": None})
    return list(found.values())


def check_weights(node: str, weights: Mapping[str, Any]) -> Finding:
    """Fetches a weights file, as a step would, and compares its hash where one is known."""
    uri, model = weights["uri"], weights["model"]
    if uri is None:
        return Finding("weights", node, True, f"{model}: in the package")
    try:
        path = storage.fetch(uri, sha256=weights["sha256"])
        if model is not None:
            from weaksam.sam.checkpoints import check_file

            check_file(path, model, sha256=weights["sha256"])
    except (WeakSamError, OSError) as error:
        return Finding("weights", node, False, str(error), "give the URI of a whole file that this node may read")
    known = "hash as promised" if weights["sha256"] or model else "no hash is known"
    return Finding("weights", node, True, f"{masked_url(uri)}: {path.stat().st_size / 2**20:.0f} MiB, {known}")


def judge_shared_memory(node: str, shared: float, store: float) -> Finding:
    """Ray's object store lies in /dev/shm, or on disk where that is too small."""
    told = f"/dev/shm {shared / 2**30:.1f} GiB, object store {store / 2**30:.1f} GiB"
    if shared < store:
        fix = "start the container with --shm-size, or mount an emptyDir of medium Memory at /dev/shm"
        return Finding("shared memory", node, False, f"{told}: images pass through the disk", fix)
    return Finding("shared memory", node, True, told)


def gpus() -> list[tuple[str, float]]:
    """(name, bytes) of each GPU of this machine; empty where the driver knows none."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 1) for line in told.splitlines() if "," in line]
    return [(name.strip(), float(size) * 2**20) for name, size in rows]


def judge_gpu(node: str, name: str, total: float, models: Sequence[str]) -> Finding:
    """Whether SAM and a chunk of prompts fit a GPU, by an estimate; the chunk halves by itself where they do not."""
    needed = {model: 2 * VARIANTS[model].weight_bytes + _ENCODER_BYTES + _CHUNK * _PROMPT_BYTES for model in models}
    told = f"{name}, {total / 2**30:.0f} GiB"
    worst = max(needed, key=needed.__getitem__, default=None)
    if worst is None:
        return Finding("gpu", node, True, told)
    told += f"; {worst} with {_CHUNK} prompts at a time needs about {needed[worst] / 2**30:.0f} GiB"
    if total < needed[worst]:
        return Finding("gpu", node, False, told, "use a larger GPU or a smaller SAM; smaller chunks are slower")
    return Finding("gpu", node, True, told)


def judge_pools(settings: Sequence[Any], nodes: Sequence[Mapping[str, float]]) -> list[Finding]:
    """Whether the actors of each stage fit the nodes that are up now."""
    given = (getattr(config, "resources", None) for config in settings)
    wanted = {repr(resources): resources for resources in given if isinstance(resources, PoolResources)}
    found = []
    for resources in wanted.values():
        try:
            pool = fit_pool(resources, nodes)
        except WeakSamError as error:
            fix = "if the cluster grows by itself, start its nodes first: `weaksam doctor` sees those that are up"
            found.append(Finding("pool", "cluster", False, str(error), fix))
        else:
            told = f"{pool.actors} actors of {pool.actor_cpus:g} CPU and {pool.actor_gpus:g} GPU"
            found.append(Finding("pool", "cluster", True, told))
    return found
