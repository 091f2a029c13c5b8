"""Turns a run file into steps: parses it, resolves references between steps, reports all faults at once.

`parse` reads one file and returns a value; it changes no environment and starts nothing. `resolve_steps` reads
outside files.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from weaksam.core import storage
from weaksam.core.config import StageConfig, parse_settings, place_texts, with_absolute_files
from weaksam.core.fingerprints import resolve
from weaksam.core.object_stores import S3Server, read_server, use_server
from weaksam.core.step import Stage, Step
from weaksam.core.uris import fault_of, fault_of_folder, fault_of_text, is_uri
from weaksam.core.yaml_files import load_run_file, with_overrides
from weaksam.errors import ConfigError, DamagedError, MissingFileError, StorageError, WeakSamError
from weaksam.stages import STAGES
from weaksam.stages.renamed import RENAMED

_KEYS = ("run", "endpoint", "addressing", "steps")

_LONGEST_NAME = 200  # a folder's name has at most 255 bytes and ends with the fingerprint

ParsedSteps = Mapping[str, tuple[Stage, StageConfig]]  # step name -> stage and settings


@dataclass(frozen=True)
class RunFile:
    """A parsed and checked run file, overrides included.

    Attributes:
        path: path of the file.
        overrides: `key=value` texts that override the file, in order.
        run: absolute URI of the folder of the run.
        server: S3 server that the file names.
        steps: stage and settings of each step, by name.
        content: the raw content of the file with the overrides applied.
    """

    path: str
    overrides: tuple[str, ...]
    run: str
    server: S3Server
    steps: ParsedSteps
    content: Mapping[str, Any]


def load(path: str, overrides: Sequence[str] = ()) -> list[Step]:
    """Returns the steps of a run file, in an order in which they can run: `parse`, then `resolve_steps`.

    Raises:
        ConfigError: with every fault of the file and the overrides, each named by its key.
    """
    return resolve_steps(parse(path, overrides))


def parse(path: str, overrides: Sequence[str] = ()) -> RunFile:
    """Reads a run file and checks the settings of every step; reads no outside file.

    Raises:
        ConfigError: with every fault of the file and the overrides, each named by its key.
    """
    return _check(path, overrides, with_overrides(load_run_file(path), overrides))


def with_defaults(run_file: RunFile, defaults: Sequence[str]) -> RunFile:
    """Returns the run file with `defaults` as further overrides; its own overrides take precedence.

    Raises:
        ConfigError: as `parse`.
    """
    overrides = (*defaults, *run_file.overrides)
    return _check(run_file.path, overrides, with_overrides(run_file.content, overrides))


def _check(path: str, overrides: Sequence[str], content: Mapping[str, Any]) -> RunFile:
    """Checks raw content with the overrides applied, and returns its run file."""
    faults = [f"{key}: unknown key: a run file has {', '.join(_KEYS)}" for key in content if key not in _KEYS]
    run, endpoint, addressing, raw_steps = (content.get(key) for key in _KEYS)
    if not isinstance(run, str) or not run:
        faults.append("run: required: the URI where everything of this run lives")
    elif (fault := fault_of(run) or fault_of_folder(run)) is not None:
        faults.append(f"run: {fault}")
    server, server_faults = read_server(endpoint, addressing)
    faults += server_faults
    if not isinstance(raw_steps, dict) or not raw_steps:
        raise ConfigError(*faults, "steps: required: a mapping of step names to settings")
    steps, step_faults = _parse_steps({str(name): raw for name, raw in raw_steps.items()})
    if faults or step_faults:
        raise ConfigError(*faults, *step_faults)
    return RunFile(path, tuple(overrides), storage.absolute(str(run)), server, steps, content)


def _parse_steps(raw_steps: Mapping[str, Any]) -> tuple[ParsedSteps, list[str]]:
    """Returns stage and settings of each step, and all faults; if there are faults, steps may be missing."""
    stages: dict[str, Stage] = {}
    parsed: dict[str, tuple[Stage, StageConfig]] = {}
    faults: list[str] = []
    for name, raw in raw_steps.items():
        stage, config, step_faults = _parse_step(name, raw)
        faults += step_faults
        if stage is None:
            continue
        stages[name] = stage
        named: list[str] = []
        if config is not None:
            parsed[name] = (stage, config)
            places = ((key, fault_of(text)) for key, text in place_texts(config))
            named = [f"steps.{name}.{key}: {fault}" for key, fault in places if fault is not None]
        faults += dict.fromkeys([*_uri_faults(raw, f"steps.{name}"), *named])
    configs = {name: config for name, (_, config) in parsed.items()}
    return parsed, faults + _reference_faults(stages, configs, raw_steps)


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
    config, faults = parse_settings(stage.config, settings, where=where, renamed=RENAMED.get(stage.name, {}))
    return stage, config and with_absolute_files(config), faults


def _uri_faults(raw: Any, where: str) -> list[str]:
    """Returns the faults of every text in raw settings, keys included; texts that are URIs are checked as URIs."""
    if isinstance(raw, Mapping):
        keys = [
            f"{where}: {fault}" for key in raw if isinstance(key, str) and (fault := fault_of_text(key)) is not None
        ]
        return keys + [fault for key, value in raw.items() for fault in _uri_faults(value, f"{where}.{key}")]
    if isinstance(raw, list):
        return [fault for value in raw for fault in _uri_faults(value, where)]
    if isinstance(raw, str) and (fault := (fault_of if is_uri(raw) else fault_of_text)(raw)) is not None:
        return [f"{where}: {fault}"]
    return []


def _reference_faults(
    stages: Mapping[str, Stage], configs: Mapping[str, StageConfig], raw_steps: Mapping[str, Any]
) -> list[str]:
    """Returns the faults of references between steps: a missing step, a step of the wrong table kind, a cycle."""
    faults, graph = [], {}
    for name, stage in stages.items():
        graph[name], kinds = [], {}
        references = stage.references(raw_steps[name])
        for key, (target, needed) in references.items():
            if target not in raw_steps:
                close = difflib.get_close_matches(target, raw_steps, n=1)
                hint = f": did you mean '{close[0]}'?" if close else f": steps are {', '.join(raw_steps)}"
                faults.append(f"steps.{name}.{key}: there is no step '{target}'{hint}")
            elif target in stages:
                graph[name].append(target)
                if (kind := stages[target].writes) in needed:
                    kinds[key] = kind
                else:
                    faults.append(
                        f"steps.{name}.{key}: needs a step that writes {' or '.join(needed)}, '{target}' writes {kind}"
                    )
        if name in configs and kinds.keys() == references.keys():
            faults += [f"steps.{name}.{fault}" for fault in stage.input_faults(configs[name], kinds)]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        faults.append(f"steps: {' -> '.join(error.args[1])}: the steps wait for each other")
    return faults


def resolve_steps(run_file: RunFile) -> list[Step]:
    """Returns the steps in an order in which they can run, each with its folder.

    Reads outside files as far as fingerprints need them; starts nothing and writes nothing. After the call this process
    reads `s3://` URIs from the server that the run file names.

    Raises:
        ConfigError: an outside file is missing, or a step would write into a dataset's folder.
        StorageError: only the storage is at fault.
    """
    use_server(run_file.server)
    parsed = run_file.steps
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
            steps[name] = resolve(run_file.run, name, stage, config, inputs)
        except WeakSamError as error:
            faults[name] = error
            if isinstance(error, StorageError):
                break  # the same store would keep every other step waiting as long
    if faults:
        raise _joined({f"steps.{name}": error for name, error in faults.items()})
    return list(steps.values())


def _joined(faults: Mapping[str, WeakSamError]) -> WeakSamError:
    """Joins several errors; the result is a StorageError, which a later try may fix, if all of them are."""
    texts = [f"{where}: {fault}" for where, error in faults.items() for fault in error.faults]
    by_storage = all(isinstance(error, StorageError) for error in faults.values())
    return (StorageError if by_storage else ConfigError)(*texts)


def select(steps: Sequence[Step], only: Sequence[str]) -> list[Step]:
    """Returns the steps named in `only` (all when empty), in order.

    Raises:
        ConfigError: a name is unknown, or a step that is left out is needed and not finished.
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
    """Returns the result of `Stage.warnings` for each step, in order; starts nothing and writes nothing."""
    texts = []
    for step in steps:
        texts += _unnoticed(step)
        try:
            texts += step.stage.warnings(step)
        except (StorageError, DamagedError, MissingFileError):
            continue  # nothing is known about an unreadable file; the step that needs it reports the fault
    return texts


def _unnoticed(step: Step) -> list[str]:
    return [
        f"steps.{step.name}: {where}: the store knows neither when a file was written nor an ETag of it: a file "
        "replaced by one of the same size is not noticed. Write changed files under new names"
        for where, identity in step.outside.items()
        if str(identity).endswith(storage.SIZES_ALONE)
    ]
