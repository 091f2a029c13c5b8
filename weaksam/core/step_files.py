"""The files that a finished step needs, which are parts of tables and trained weights, and those it has lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weaksam.core import storage, tables
from weaksam.core.parquet_files import read_parquet
from weaksam.errors import DamagedError

_WEIGHTS = "checkpoint/model.safetensors"  # in the folder of a training


def weights_uri(folder: str) -> str:
    """Returns the URI of a step's trained weights, which are written once, when the training ends."""
    return storage.join(folder, _WEIGHTS)


def is_lasting(path: str) -> bool:
    """Whether a path in a step's folder is a part or the trained weights."""
    return path == _WEIGHTS or (tables.is_part(path.rpartition("/")[2]) and ".." not in path.split("/"))


def lasting_files(folder: str) -> dict[str, int]:
    """Returns the sizes in bytes of a step's essential files, by path in its folder: parts and trained weights."""
    return {file.path: file.size for file in storage.list_files(folder) if is_lasting(file.path)}


def lost_files(folder: str, manifest: Mapping[str, Any], existing: Mapping[str, int] | None = None) -> dict[str, str]:
    """Returns the missing or truncated files of a finished step, each with its fault; empty if all are complete.

    Args:
        folder: the step's folder.
        manifest: its manifest; manifests of older versions have no sizes.
        existing: result of `lasting_files`; None: list the folder. A part of another size is read to check it.
    """
    listed = manifest.get("files") or dict.fromkeys(manifest.get("parts", []))
    expected = {path: size for path, size in listed.items() if is_lasting(path)}  # an edited manifest may list others
    if not expected:
        return {}
    existing = lasting_files(folder) if existing is None else existing
    lost = {path: "is gone" for path in expected if path not in existing}
    for path, size in expected.items():
        if path in existing and size is not None and existing[path] != size:
            if path != _WEIGHTS and _is_whole(storage.join(folder, path)):
                continue  # the same rows, rewritten by a task that was presumed dead
            lost[path] = f"has {existing[path]} bytes, {size} were written"
    return lost


def _is_whole(uri: str) -> bool:
    try:
        read_parquet(uri)
    except DamagedError:
        return False
    return True
