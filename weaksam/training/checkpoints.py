"""Reads the checkpoints of a training and finds one to resume from. Does not depend on Ray.

Ray Train writes a folder per checkpoint and `checkpoint_manager_snapshot.json`, which lists them. It starts only if
that file is intact and every listed checkpoint exists. Neither is certain after a full disk or a lost node. So the
folders decide, the newest intact checkpoint first, and a list that does not match them is written again.
"""

from __future__ import annotations

import json
import logging
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from weaksam.core import storage
from weaksam.errors import StageError

log = logging.getLogger(__name__)

STATE = "state.pt"  # the one file of a checkpoint
_SNAPSHOT, _PREFIX = "checkpoint_manager_snapshot.json", "checkpoint_"


class BrokenCheckpointError(Exception):
    """A checkpoint is missing, cut off or altered."""


def list_checkpoints(folder: str) -> list[str]:
    """Returns URIs of the checkpoints below `<folder>/checkpoint`, the newest first, without opening them."""
    below = storage.join(folder, "checkpoint")
    names = [name for name in storage.list_folders(below) if name.startswith(_PREFIX)]
    return [storage.join(below, name) for name in sorted(names, reverse=True)]  # a name is the time it was made


def drop_broken_list(folder: str, *, version: str) -> None:
    """Removes Ray Train's list of the checkpoints of `folder` if this `version` of Ray would not start from it.

    It would not if the list is damaged, lists missing checkpoints, or was written by another version.

    The list holds no information beyond the checkpoints.
    """
    uri = storage.join(folder, "checkpoint", _SNAPSHOT)
    try:
        listed = json.loads(storage.read_replaceable(uri))
        names = {result["checkpoint_dir_name"] for result in listed["checkpoint_results"]}
        latest = listed["latest_checkpoint_result"]
        names |= {latest["checkpoint_dir_name"]} if latest else set()
        problem = None if listed["ray_version"] == version else f"was written by Ray {listed['ray_version']}"
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError) as error:
        names, problem = set(), f"cannot be read ({type(error).__name__}: {error})"
    if missing := sorted(names - {path.rsplit("/", 1)[-1] for path in list_checkpoints(folder)}):
        problem = f"lists {missing[-1]}, which is gone"
    if problem is not None:
        log.warning("warning: %s %s: made anew from the checkpoints that are there", uri, problem)
        storage.delete(uri)


def load_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Loads a file of `torch.save`.

    Raises:
        BrokenCheckpointError: the file is missing, cut or altered.
    """
    try:
        # a cut file lacks its end; checksums, which torch does not check, reveal an altered file
        with zipfile.ZipFile(path) as records:
            if (altered := records.testzip()) is not None:
                raise BrokenCheckpointError(f"{altered} is altered")
        return torch.load(path, map_location=device, weights_only=True)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (zipfile.BadZipFile, zlib.error, FileNotFoundError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise BrokenCheckpointError(str(error)) from error


def check_same_step(step: int) -> None:
    """Raises StageError when workers resume from different checkpoints, since each worker reads its own.

    They would average gradients of different batches, and wait for each other at the end.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() < 2:
        return
    steps: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        listed = ", ".join(f"worker {rank} from step {worker_step}" for rank, worker_step in enumerate(steps))
        raise StageError(
            f"workers go on from different checkpoints ({listed}): not all of them can read the newest one. If this "
            "stays, look at the warnings of the workers, and remove the checkpoint that is not whole"
        )
