"""The manifest of a finished step: counts, time, versions, cluster."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from weaksam.core import step_files, tables
from weaksam.core.step import Outcome, Step

_VERSIONED = ("weaksam", "ray", "torch", "torchvision", "segment-anything", "pyarrow", "numpy", "pillow")


def manifest_of(step: Step, outcome: Outcome, seconds: float) -> dict[str, Any]:
    """Returns the content of manifest.json for a step that ended with `outcome` after `seconds`."""
    computed = outcome.rows if outcome.computed is None else outcome.computed
    return {
        "step": step.name,
        "stage": step.stage.name,
        "fingerprint": step.fingerprint,
        "inputs": {key: other.fingerprint for key, other in step.inputs.items()},
        "rows": outcome.rows,
        "ok": outcome.rows - outcome.failed,
        "failed": outcome.failed,
        "failures": outcome.failures,
        "seconds": round(seconds, 2),
        "rows_computed": computed,  # by the run that finished the step; earlier runs computed the rest
        "rows_per_second": round(computed / max(seconds, 1e-9), 2),
        "versions": _versions(),
        "git_commit": git_commit(),
        "cluster": _cluster(),
        **_class_names(step, outcome),
        "parts": outcome.parts,
        "excluded": outcome.excluded,
        "files": step_files.lasting_files(step.folder),
        **({"places": dict(step.places)} if step.places else {}),
    }


def _class_names(step: Step, outcome: Outcome) -> dict[str, list[str]]:
    """Returns the class names that the parts carry, so that readers of the table need not open a part."""
    return {"class_names": tables.read_class_names(step.folder, {"parts": outcome.parts})} if outcome.parts else {}


def _cluster() -> dict[str, float] | None:
    """Returns the resources of the cluster at the end of the step; None if no cluster was joined.

    Idle resources count too, because they cost the same.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    resources = ray.cluster_resources()
    return {
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        **{kind: resources.get(kind, 0.0) for kind in ("CPU", "GPU")},
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """Returns the git commit of this code; `WEAKSAM_GIT_COMMIT` sets it for code that is copied without repository."""
    if commit := os.environ.get("WEAKSAM_GIT_COMMIT"):
        return commit
    command, folder = ["git", "rev-parse", "HEAD"], Path(__file__).parent
    try:
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None if process.returncode == 0 else None
