"""Checks the nodes of a cluster for the requirements of a run, from inside each node, with a fix for each fault."""

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
from weaksam.core.cache import fetch
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
    """The result of a check; `fix` says what to do when the check fails."""

    check: str
    node: str
    well: bool
    message: str
    fix: str = ""


def run_doctor(config: str, overrides: Sequence[str], *, as_json: bool = False) -> None:
    """Examines every node of the cluster that this process would run on, and prints the results.

    Raises:
        ClusterError: a check failed.
    """
    run_file = pipeline.parse(config, overrides)
    use_server(run_file.server)
    findings = examine_cluster(run_file.run, [config for _, config in run_file.steps.values()])
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2), flush=True)
    else:
        for finding in findings:
            print(
                f"{'ok  ' if finding.well else 'BAD '} {finding.node:16} {finding.check:14} {finding.message}",
                flush=True,
            )
            if finding.fix:
                print(f"{'':22}{'':14} -> {finding.fix}", flush=True)
    bad = [finding.check for finding in findings if not finding.well]
    if bad:
        raise ClusterError(f"{len(bad)} of {len(findings)} checks are not well: {', '.join(dict.fromkeys(bad))}")


def examine_cluster(run: str, settings: Sequence[Any]) -> list[Finding]:
    """Examines every node, from a task that runs on it."""
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
    findings = judge_pools(settings, [node["Resources"] for node in nodes])
    for node in nodes:
        try:
            findings += ray.get(waiting[node["NodeID"]], timeout=1800)
        except Exception as error:  # report the other nodes whatever happens on this node
            message = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            findings.append(
                Finding("answers", node["NodeManagerHostname"], False, message, "look at that node's log in /tmp/ray")
            )
    return findings


def examine_node(
    node: str, run: str, weights: Sequence[dict[str, Any]], expected: Mapping[str, str], store_bytes: float
) -> list[Finding]:
    """Returns the results of all checks of a node; runs on the node.

    Args:
        node: its name.
        run: URI of the run folder.
        weights: result of `weights_of`.
        expected: result of `versions` on the driver.
        store_bytes: size of Ray's object store on the node.
    """
    findings = [judge_versions(node, expected, versions()), probe_storage(node, run)]
    findings += [check_weights(node, file) for file in weights]
    with suppress(OSError):
        findings.append(judge_shared_memory(node, shutil.disk_usage("/dev/shm").total, store_bytes))
    models = [file["model"] for file in weights if file["model"]]
    findings += [judge_gpu(node, name, total, models) for name, total in gpus()]
    return findings


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that must match on all nodes, in this process."""
    installed = {"python": platform.python_version()}
    for name in COMPARED:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def judge_versions(node: str, expected: Mapping[str, str], installed: Mapping[str, str]) -> Finding:
    """Compares a node's versions with the driver's."""
    names = sorted(expected.keys() | installed.keys())
    differing = [
        f"{name} {installed.get(name, 'absent')}, driver {expected.get(name, 'absent')}"
        for name in names
        if expected.get(name) != installed.get(name)
    ]
    if differing:
        return Finding("versions", node, False, "; ".join(differing), "run one image on every node: cluster/Dockerfile")
    return Finding("versions", node, True, ", ".join(f"{name} {installed[name]}" for name in installed))


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
    """Returns the weights files that steps name, without repeats: `uri`, `model` of SAM or None, `sha256` or None."""
    files: dict[str, dict[str, Any]] = {}
    for config in settings:
        for name, info in type(config).model_fields.items():
            value = getattr(config, name)
            if isinstance(value, SamSettings):
                key = value.checkpoint or value.model
                files[key] = {"uri": value.checkpoint, "model": value.model, "sha256": value.sha256}
            elif name == "weights" and value and any(isinstance(mark, OutsideFile) for mark in info.metadata):
                files.setdefault(value, {"uri": value, "model": None, "sha256": None})
    return list(files.values())


def check_weights(node: str, weights: Mapping[str, Any]) -> Finding:
    """Fetches a weights file, as a step would, and compares its hash if one is known."""
    uri, model = weights["uri"], weights["model"]
    if uri is None:
        return Finding("weights", node, True, f"{model}: in the package")
    try:
        path = fetch(uri, sha256=weights["sha256"])
        if model is not None:
            from weaksam.sam.checkpoints import check_file

            check_file(path, model, sha256=weights["sha256"])
    except (WeakSamError, OSError) as error:
        return Finding("weights", node, False, str(error), "give the URI of a whole file that this node may read")
    known = "hash as promised" if weights["sha256"] or model else "no hash is known"
    return Finding("weights", node, True, f"{masked_url(uri)}: {path.stat().st_size / 2**20:.0f} MiB, {known}")


def judge_shared_memory(node: str, shared: float, store: float) -> Finding:
    """Checks that /dev/shm holds Ray's object store, which otherwise lies on disk."""
    sizes = f"/dev/shm {shared / 2**30:.1f} GiB, object store {store / 2**30:.1f} GiB"
    if shared < store:
        fix = "start the container with --shm-size, or mount an emptyDir of medium Memory at /dev/shm"
        return Finding("shared memory", node, False, f"{sizes}: images pass through the disk", fix)
    return Finding("shared memory", node, True, sizes)


def gpus() -> list[tuple[str, float]]:
    """Returns (name, bytes) of each GPU of this machine; empty if the driver reports none."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        output = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 1) for line in output.splitlines() if "," in line]
    return [(name.strip(), float(size) * 2**20) for name, size in rows]


def judge_gpu(node: str, name: str, total: float, models: Sequence[str]) -> Finding:
    """Checks by an estimate that SAM and a chunk of prompts fit a GPU; if not, a step halves the chunk by itself."""
    needed = {model: 2 * VARIANTS[model].weight_bytes + _ENCODER_BYTES + _CHUNK * _PROMPT_BYTES for model in models}
    message = f"{name}, {total / 2**30:.0f} GiB"
    worst = max(needed, key=needed.__getitem__, default=None)
    if worst is None:
        return Finding("gpu", node, True, message)
    message += f"; {worst} with {_CHUNK} prompts at a time needs about {needed[worst] / 2**30:.0f} GiB"
    if total < needed[worst]:
        return Finding("gpu", node, False, message, "use a larger GPU or a smaller SAM; smaller chunks are slower")
    return Finding("gpu", node, True, message)


def judge_pools(settings: Sequence[Any], nodes: Sequence[Mapping[str, float]]) -> list[Finding]:
    """Checks that the actors of each stage fit the nodes that are up now."""
    candidates = (getattr(config, "resources", None) for config in settings)
    pools = {repr(resources): resources for resources in candidates if isinstance(resources, PoolResources)}
    findings = []
    for resources in pools.values():
        try:
            pool = fit_pool(resources, nodes)
        except WeakSamError as error:
            fix = "if the cluster grows by itself, start its nodes first: `weaksam doctor` sees those that are up"
            findings.append(Finding("pool", "cluster", False, str(error), fix))
        else:
            message = f"{pool.actors} actors of {pool.actor_cpus:g} CPU and {pool.actor_gpus:g} GPU"
            findings.append(Finding("pool", "cluster", True, message))
    return findings
