"""Reads the state of a run and of its steps from their files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from weaksam.core import step_files, storage, tables
from weaksam.core.step import Step, read_manifest
from weaksam.core.step_folders import name_lost
from weaksam.errors import ConfigError, DamagedError
from weaksam.execution.progress import read_progress, state_of

_STEP_FOLDER = re.compile(r".+-[0-9a-f]{8}")


def read_states(run: str) -> list[dict[str, Any]]:
    """Returns the steps of a run folder as their files describe them, each after the steps that it reads.

    `state` is finished, running, stopped, damaged, or unfinished if the files do not show which of running and stopped.
    `rows`, `failed`, `seconds` and `rows_per_second` are None if unknown; `progress` is the progress of an unfinished
    step, with its age in seconds; `damage` describes the problem and the fix.

    Raises:
        ConfigError: no step has been started in the folder.
        StorageError: the folder cannot be read, so the states are unknown.
    """
    states = []
    for name in storage.list_folders(run):
        folder = storage.join(run, name)
        # a folder without config.json is recognised by its name; others may hold whole runs, which are not listed
        if _STEP_FOLDER.fullmatch(name) or storage.exists(storage.join(folder, "config.json")):
            files = {file.path: file.size for file in storage.list_files(folder)}
            if "config.json" in files or "manifest.json" in files or any(map(step_files.is_lasting, files)):
                states.append(_read_state(name.rsplit("-", 1)[0], folder, files))
    if not states:
        raise ConfigError(f"{run}: no step has been started there: check the folder, or run a config first")
    return _in_order(states)


def _in_order(states: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the states in the order of the pipeline: a step follows all steps it reads, else the order is kept."""
    by_folder = {state["folder"].rsplit("/", 1)[-1]: state for state in states}
    ordered: dict[str, dict[str, Any]] = {}

    def add(folder: str, above: tuple[str, ...] = ()) -> None:
        if folder in by_folder and folder not in ordered and folder not in above:
            for read in by_folder[folder]["reads"]:
                add(read, (*above, folder))
            ordered[folder] = by_folder[folder]

    for folder in by_folder:
        add(folder)
    return list(ordered.values())


def _read_state(step: str, folder: str, files: Mapping[str, int]) -> dict[str, Any]:
    counts = dict.fromkeys(("rows", "failed", "seconds", "rows_per_second"))
    state = {"step": step, "stage": None, "state": "damaged", **counts, "folder": folder, "progress": None}
    config = _read_config(folder) if "config.json" in files else {}
    inputs = config.get("inputs")
    state |= {"damage": None, "reads": list(inputs.values()) if isinstance(inputs, dict) else []}
    try:
        done = read_manifest(folder) if "manifest.json" in files else None
        if done is None:
            return state | _unfinished_state(folder, files) | {"stage": config.get("stage")}
        state |= {"stage": done.get("stage"), **{key: done.get(key) for key in counts}}
        if lost := step_files.lost_files(folder, done, files):
            return state | {"damage": f"{name_lost(lost)}: the same command makes the missing again"}
    except (DamagedError, FileNotFoundError) as error:  # missing: removed since it was listed
        return state | {"damage": str(error)}
    return state | {"state": "finished"}


def _unfinished_state(folder: str, files: Mapping[str, int]) -> dict[str, Any]:
    progress = read_progress(folder)
    rows = sum(tables.rows_in(path) for path in files if "/" not in path and step_files.is_lasting(path))
    state: dict[str, Any] = {"state": "unfinished", "rows": rows}
    if progress is not None:
        state |= {"state": state_of(progress), "failed": progress["failed"], "progress": progress}
    return state


def _read_config(folder: str) -> dict[str, Any]:
    """Returns config.json of a step's folder; empty if it is damaged, because the next run writes it again."""
    try:
        config = storage.read_json(storage.join(folder, "config.json"))
    except (FileNotFoundError, DamagedError):
        return {}
    return config if isinstance(config, dict) else {}


def describe_state(step: Step) -> tuple[str, DamagedError | None]:
    """Returns the text of `check` for a step: `finished` or `to do` with the reason; or a fault that stops a run."""
    try:
        manifest = step.manifest()
    except DamagedError as error:
        return "damaged", error
    if manifest is None:
        return "to do", None
    lost = step_files.lost_files(step.folder, manifest)
    return (f"to do: {name_lost(lost)}" if lost else "finished"), None
