"""A run file becomes steps, and steps are run in order: finished ones are skipped, unfinished ones go on."""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from weaksam import storage, tables
from weaksam.config import StageConfig, load_run_file, parse_settings, result_settings, with_absolute_files
from weaksam.errors import ConfigError, DamagedError, FailedRowsError, MissingFileError, StorageError, WeakSamError
from weaksam.object_stores import use_s3_addressing, use_s3_endpoint
from weaksam.stage import Outcome, Stage, Step, describe, resolve
from weaksam.stages import STAGES
from weaksam.step_folders import keep_config, whole_manifest
from weaksam.uris import fault_of, fault_of_folder, is_uri

log = logging.getLogger(__name__)

_VERSIONED = ("weaksam", "ray", "torch", "torchvision", "segment-anything", "pyarrow", "numpy", "pillow")

_KEYS = ("run", "endpoint", "addressing", "steps")

_SHOWN_FAILURES = 3
_LONGEST_NAME = 200  # of 255 bytes for a folder's, which has the fingerprint behind it

Parsed = dict[str, tuple[Stage, Any]]  # step name -> stage and settings


def load(path: str, overrides: Sequence[str] = ()) -> list[Step]:
    """The steps of a run file, in an order in which they can run.

    Reads outside files as far as fingerprints need them; starts nothing and writes nothing.

    Raises:
        ConfigError: with every fault of the file and the overrides, each named by its key.
    """
    run, parsed = parse(path, overrides)
    return resolve_steps(run, parsed)


def parse(path: str, overrides: Sequence[str] = ()) -> tuple[str, Parsed]:
    """The run folder and the checked settings of every step, as `load` but without a look at outside files."""
    content = load_run_file(path, overrides)
    faults = [f"{key}: unknown key: a run file has {', '.join(_KEYS)}" for key in content if key not in _KEYS]
    run, endpoint, addressing, raw_steps = (content.get(key) for key in _KEYS)
    if not isinstance(run, str) or not run:
        faults.append("run: required: the URI where everything of this run lives")
    elif (fault := fault_of(run) or fault_of_folder(run)) is not None:
        faults.append(f"run: {fault}")
    if endpoint is not None:
        faults += use_s3_endpoint(endpoint)
    if addressing is not None:
        faults += use_s3_addressing(addressing)
    if not isinstance(raw_steps, dict) or not raw_steps:
        raise ConfigError(*faults, "steps: required: a mapping of step names to settings")
    raw_steps = {str(name): raw for name, raw in raw_steps.items()}
    parsed: Parsed = {}
    for name, raw in raw_steps.items():
        stage, config, step_faults = _parse_step(name, raw)
        faults += step_faults
        if stage is not None:
            parsed[name] = (stage, config)
            faults += _uri_faults(raw, f"steps.{name}")
    faults += _reference_faults(parsed, raw_steps)
    if faults:
        raise ConfigError(*faults)
    return storage.absolute(str(run)), parsed


def _parse_step(name: str, raw: Any) -> tuple[Stage | None, StageConfig | None, list[str]]:
    where = f"steps.{name}"
    if not name.replace("_", "").isalnum() or not name.isascii():
        return None, None, [f"{where}: a step's name has letters, digits and '_' only"]
    if len(name) > _LONGEST_NAME:
        return None, None, [f"{where}: a step's name has {_LONGEST_NAME} letters at most, it is the name of a folder"]
    if not isinstance(raw, dict) or "stage" not in raw:
        return None, None, [f"{where}.stage: required: one of {', '.join(STAGES)}"]
    stage = STAGES.get(str(raw["stage"]))
    if stage is None:
        close = difflib.get_close_matches(str(raw["stage"]), STAGES, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"one of {', '.join(STAGES)}"
        return None, None, [f"{where}.stage: there is no stage '{raw['stage']}': {hint}"]
    settings = {key: value for key, value in raw.items() if key != "stage"}
    config, faults = parse_settings(stage.config, settings, where=where)
    config = config and with_absolute_files(config)
    return stage, config, faults  # type: ignore[return-value]  (parse_settings returns what it was asked for)


def _uri_faults(raw: Any, where: str) -> list[str]:
    """Faults of every text of raw settings that is a URI."""
    if isinstance(raw, Mapping):
        return [fault for key, value in raw.items() for fault in _uri_faults(value, f"{where}.{key}")]
    if isinstance(raw, str) and is_uri(raw) and (fault := fault_of(raw)) is not None:
        return [f"{where}: {fault}"]
    return []


def _reference_faults(
    parsed: Mapping[str, tuple[Stage, StageConfig | None]], raw_steps: Mapping[str, Any]
) -> list[str]:
    """Faults of references between steps: to nothing, to a step that writes something else, in a circle."""
    faults, graph = [], {}
    for name, (stage, _) in parsed.items():
        graph[name] = []
        for key, (target, noun) in stage.references(raw_steps[name]).items():
            if target not in raw_steps:
                close = difflib.get_close_matches(target, raw_steps, n=1)
                hint = f": did you mean '{close[0]}'?" if close else f": steps are {', '.join(raw_steps)}"
                faults.append(f"steps.{name}.{key}: there is no step '{target}'{hint}")
            elif target in parsed:
                graph[name].append(target)
                if (found := parsed[target][0].writes) != noun:
                    faults.append(f"steps.{name}.{key}: needs a step that writes {noun}, '{target}' writes {found}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        faults.append(f"steps: {' -> '.join(error.args[1])}: the steps wait for each other")
    return faults


def resolve_steps(run: str, parsed: Parsed) -> list[Step]:
    """The steps in an order in which they can run, with folders below `run`; looks at outside files."""
    references = {name: stage.references(dict(config)) for name, (stage, config) in parsed.items()}
    graph = {name: [target for target, _ in named.values()] for name, named in references.items()}
    steps: dict[str, Step] = {}
    faults: dict[str, WeakSamError] = {}
    for name in TopologicalSorter(graph).static_order():
        stage, config = parsed[name]
        if any(target not in steps for target in graph[name]):
            continue  # its input has a fault, which is reported
        inputs = {key: steps[target] for key, (target, _) in references[name].items()}
        try:
            steps[name] = resolve(run, name, stage, config, inputs)
        except WeakSamError as error:
            faults[name] = error
            if isinstance(error, StorageError):
                break  # the same store would keep every other step waiting as long
    if faults:
        raise _joined({f"steps.{name}": error for name, error in faults.items()})
    return list(steps.values())


def _joined(faults: Mapping[str, WeakSamError]) -> WeakSamError:
    """One error for several; only if storage alone is at fault can the same command help later."""
    texts = [f"{where}: {fault}" for where, error in faults.items() for fault in error.faults]
    by_storage = all(isinstance(error, StorageError) for error in faults.values())
    return (StorageError if by_storage else ConfigError)(*texts)


def select(steps: Sequence[Step], only: Sequence[str]) -> list[Step]:
    """The steps named in `only` (all when empty), in order.

    Raises:
        ConfigError: a name is unknown, or a step left out is needed and not finished.
    """
    names = [step.name for step in steps]
    faults = [
        f"--only {name}: there is no step '{name}': steps are {', '.join(names)}" for name in only if name not in names
    ]
    chosen = [step for step in steps if not only or step.name in only]
    for step in chosen:
        for key, needed in step.inputs.items():
            if needed not in chosen and needed.manifest() is None:
                faults.append(
                    f"steps.{step.name}.{key}: step '{needed.name}' is not finished: run it first or name it too"
                )
    if faults:
        raise ConfigError(*faults)
    return chosen


def warnings_of(steps: Sequence[Step]) -> list[str]:
    """What `Stage.warnings` gives for each step, in order; starts nothing and writes nothing."""
    texts = []
    for step in steps:
        texts += _unnoticed(step)
        try:
            texts += step.stage.warnings(step)
        except (StorageError, DamagedError, MissingFileError):
            continue  # nothing is known, so nothing is wrong yet; a step that needs the file reports the fault
    return texts


def _unnoticed(step: Step) -> list[str]:
    return [
        f"steps.{step.name}: {where}: the store knows neither when a file was written nor an ETag of it: a file "
        "replaced by one of the same size is not noticed. Write changed files under new names"
        for where, identity in step.outside.items()
        if str(identity).endswith(storage.SIZES_ALONE)
    ]


def run_steps(steps: Sequence[Step]) -> None:
    """Runs steps in order; the ones that are finished are skipped and say so.

    Raises:
        WeakSamError: a step could not finish, or too many of its rows failed.
    """
    for step in steps:
        manifest = whole_manifest(step)
        if manifest is not None:
            keep_config(step)
            log.info("%s: finished, skipped (%s)", step.name, step.folder)
        else:
            manifest = _run_step(step)
        _check_failed(step, manifest)


def _run_step(step: Step) -> dict[str, Any]:
    _tell_what_changed(step)
    keep_config(step)
    log.info("%s: %s -> %s", step.name, step.stage.name, step.folder)
    started = time.time()
    outcome = step.stage.run(step)
    seconds = time.time() - started
    manifest = _manifest(step, outcome, seconds)
    storage.write_json(step.manifest_uri, manifest)
    log.info(
        "%s: %s in %.0f s%s", step.name, _counts(outcome), seconds, f": {outcome.summary}" if outcome.summary else ""
    )
    return manifest


def _counts(outcome: Outcome) -> str:
    return f"{outcome.rows} rows" + (f", {outcome.failed} failed" if outcome.failed else "")


def _manifest(step: Step, outcome: Outcome, seconds: float) -> dict[str, Any]:
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
        "rows_computed": computed,  # by the run that finished it; earlier ones did the rest
        "rows_per_second": round(computed / max(seconds, 1e-9), 2),
        "versions": _versions(),
        "git_commit": git_commit(),
        "cluster": _cluster(),
        "parts": outcome.parts,
        "excluded": outcome.excluded,
        "files": tables.lasting_files(step.folder),
        **({"places": dict(step.places)} if step.places else {}),
    }


def _cluster() -> dict[str, float] | None:
    """What the cluster had when the step ended: its price does not ask what was idle. None: none had been joined."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    held = ray.cluster_resources()
    return {
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        **{kind: held.get(kind, 0.0) for kind in ("CPU", "GPU")},
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit this code is at; `WEAKSAM_GIT_COMMIT` says it where the code travels without its repository."""
    if told := os.environ.get("WEAKSAM_GIT_COMMIT"):
        return told
    try:
        here = Path(__file__).parent
        told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None if told.returncode == 0 else None


def _check_failed(step: Step, manifest: Mapping[str, Any]) -> None:
    allowed = math.ceil(step.config.max_failed * manifest["rows"])
    if manifest["failed"] > allowed:
        listed = "\n  ".join(manifest["failures"])
        raise FailedRowsError(
            f"step {step.name}: {manifest['failed']} of {manifest['rows']} rows failed, {allowed} may "
            f"(steps.{step.name}.max_failed={step.config.max_failed:g}). The rows are kept in {step.folder}; "
            f"raise max_failed to go on with them, or remove that folder to try again (images that were not found are "
            f"tried again where they are back).{_tolerance_of_inputs(step)} The first:\n  {listed}"
        )
    if manifest["failed"]:
        shown = "; ".join(manifest["failures"][:_SHOWN_FAILURES])
        log.warning("%s: %d of %d rows failed: %s", step.name, manifest["failed"], manifest["rows"], shown)


def _tolerance_of_inputs(step: Step) -> str:
    """Which input may fail in more rows, and how the step may: rows that failed there fail here too."""
    more = [
        (other.config.max_failed, other.name)
        for other in step.inputs.values()
        if isinstance(other.config, StageConfig) and other.config.max_failed > step.config.max_failed
    ]
    if not more:
        return ""
    share, name = max(more)
    return (
        f" Step {name}, which it reads, may fail in more (steps.{name}.max_failed={share:g}): rows that failed there "
        f"fail here too, and steps.{step.name}.max_failed={share:g} accepts as many."
    )


def _tell_what_changed(step: Step) -> None:
    """Logs which keys differ from each other result of the same step name."""
    run = step.folder.rsplit("/", 1)[0]
    others = [name for name in storage.list_folders(run) if name.rsplit("-", 1)[0] == step.name]
    if not others or storage.exists(storage.join(step.folder, "config.json")):
        return
    before = {}
    for name in others:
        try:
            before[name] = storage.read_json(storage.join(run, name, "config.json"))
        except (FileNotFoundError, WeakSamError):
            continue
    now = _flat(describe(step))
    left_out = {
        f"settings.{key}" for key in type(step.config).model_fields.keys() - result_settings(step.config).keys()
    }
    for name, config in before.items():
        old = _flat(config)
        keys = [k for k in sorted(now.keys() | old.keys()) if now.get(k) != old.get(k) and not _irrelevant(k, left_out)]
        told = ", ".join(f"{key} {old.get(key)!r} -> {now.get(key)!r}" for key in keys)
        log.info("%s: a new folder beside %s, because of %s", step.name, name, told or "another weaksam")


def _irrelevant(key: str, left_out: Collection[str]) -> bool:
    """Whether a key of config.json does not decide the folder; `left_out` are the settings that are not looked at."""
    return key == "fingerprint" or ".resources" in key or ".".join(key.split(".")[:2]) in left_out


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
