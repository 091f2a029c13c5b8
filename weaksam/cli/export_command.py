"""Exports one step of a run folder without the run file: the functions of `weaksam export`.

The export is a step like any other, `export_<step>_<format>`, in the same run folder.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import yaml

from weaksam.core import storage
from weaksam.core.config import parse_settings
from weaksam.core.fingerprints import check_outside, resolve
from weaksam.core.step import Step
from weaksam.core.yaml_files import read_value
from weaksam.data.writers import EXPORT_FORMATS
from weaksam.errors import ConfigError, DamagedError
from weaksam.stages.export import STAGE, folder_of, marker_uri
from weaksam.stages.export_config import ExportConfig
from weaksam.stages.started_steps import Started, read_started

FORMATS = tuple(kind.name for kind in EXPORT_FORMATS)
# table kind -> the export's key for a step that writes it
KEYS = {kind: key for key, kinds in STAGE.reads.items() for kind in kinds if key != "images"}

_COMMAND_OPTIONS = {"to": "--to", "format": "--format", **dict.fromkeys(STAGE.reads, "--step")}


def plan_export(run: str, name: str, *, format: str, to: str | None, settings: Sequence[str]) -> Step:
    """Returns the step that exports a finished step of a run; writes nothing.

    Args:
        run: URI of the run's folder.
        name: a step's name, or the name of its folder if there are several variants.
        format: one of `FORMATS`, or labelstudio.
        to: URI of the folder to write to; None: a folder of the run.
        settings: `key=value` texts, keys of `ExportConfig`.

    Raises:
        ConfigError: an argument is wrong.
    """
    format_name = find_format(format)  # first, as it does not read the run
    return make_export(choose_step(run, name), format_name, to, settings)


# --- the step to export


def find_exportable(run: str) -> list[Started]:
    """Returns the finished steps of a run that can be exported; skips damaged steps."""
    steps = []
    for title in storage.list_folders(run):
        try:
            step = read_started(run, title)
        except (ConfigError, DamagedError):
            continue
        if step is not None and step.stage.writes in KEYS and step.is_finished:
            steps.append(step)
    return steps


def choose_step(run: str, name: str) -> Started:
    """Returns the finished step of a run with this name.

    Raises:
        ConfigError: there is no such step, it cannot be exported, it is not finished, or there are several variants.
    """
    run = storage.absolute(run)
    titles = storage.list_folders(run)
    named = [title for title in titles if name in (title, title.rpartition("-")[0])]
    started = [step for title in named if (step := read_started(run, title)) is not None]
    if not started:
        raise ConfigError(_no_such_step(run, titles, name))
    exportable = [step for step in started if step.stage.writes in KEYS]
    if not exportable:
        stage = started[0].stage
        raise ConfigError(
            f"--step {name}: is of stage {stage.name}, which writes {stage.writes}: only {' and '.join(KEYS)} can "
            f"be exported: {_name(find_exportable(run))}"
        )
    finished = [step for step in exportable if step.is_finished]
    if not finished:
        raise ConfigError(
            f"--step {name}: is not finished ({exportable[0].folder} has no manifest.json): run its run file again, "
            f"it goes on where it stopped; {_name(find_exportable(run))}"
        )
    if len(finished) > 1:
        listed = "\n  ".join(_describe_variants(finished))
        raise ConfigError(f"--step {name}: is finished in {len(finished)} variants: name one of them:\n  {listed}")
    return finished[0]


def _no_such_step(run: str, titles: Sequence[str], name: str) -> str:
    if not any(storage.exists(storage.join(run, title, "config.json")) for title in titles):
        return f"{run}: no step has been started there: check the folder, or run a config first"
    exportable = find_exportable(run)
    close = difflib.get_close_matches(name.partition("-")[0], [step.name for step in exportable], n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"--step {name}: there is no such step in {run}: {hint}{_name(exportable)}"


def _name(steps: Iterable[Started]) -> str:
    names = ", ".join(dict.fromkeys(step.name for step in steps))
    return f"finished steps that can be exported are {names}" if names else "no step that can be exported is finished"


def _describe_variants(steps: Sequence[Started]) -> list[str]:
    """Returns a line for each variant: its folder, the time at which it finished, and the settings that differ."""
    settings = [{**step.config_json["settings"], **step.config_json["inputs"]} for step in steps]
    keys = [key for key in settings[0] if key not in ("resources", "max_failed")]
    keys = [key for key in keys if any(other.get(key) != settings[0][key] for other in settings)]
    lines = []
    for step, own in zip(steps, settings, strict=True):
        differences = ", ".join(f"{key}={own.get(key)!r}" for key in keys) or "other files or another weaksam"
        lines.append(f"{step.title}: {_format_date(step)}{differences}")
    return lines


def _format_date(step: Started) -> str:
    """Returns the time at which a step finished; empty if the storage does not know it."""
    for file in storage.list_files(step.folder, recursive=False):
        if file.path == "manifest.json" and file.modified is not None:
            return f"{datetime.fromtimestamp(file.modified, UTC):%Y-%m-%d %H:%M} UTC, "
    return ""


# --- the export step


def make_export(source: Started, format: str, to: str | None, settings: Sequence[str]) -> Step:
    """Returns the export of a finished step as a step of the same run.

    Raises:
        ConfigError: a setting is wrong, or the images of the step are gone.
    """
    values, faults = _read_settings(settings)
    key, images = KEYS[source.stage.writes], _read_images(source)
    if (allowed := source.config_json["settings"].get("max_failed")) is not None:
        values.setdefault("max_failed", allowed)  # the export allows as many failures as the step
    # An absolute path, so that the fingerprint does not depend on the working folder.
    to = storage.absolute(to) if to is not None else None
    fixed = {"images": images.name, key: source.name, "format": format, "to": to}
    config, more = parse_settings(ExportConfig, values | fixed, where="export")
    if faults or config is None:
        raise ConfigError(*faults, *more)
    if to is not None:
        listed, _ = parse_settings(images.stage.config, images.config_json["settings"], where="")
        check_outside({"--to": to}, images.stage.listed(listed) if listed is not None else [])
    inputs = {"images": images.to_step({})}
    inputs[key] = source.to_step(inputs)
    return resolve(source.run, f"export_{source.name}_{format}", STAGE, config, inputs)


def find_format(text: str) -> str:
    """Returns the name of a format in `FORMATS`, with or without underscores: label_studio or labelstudio."""
    format_name = {name.replace("_", ""): name for name in FORMATS}.get(text.replace("_", ""))
    if format_name is None:
        raise ConfigError(f"--format {text}: there is no such format: formats are {', '.join(FORMATS)}")
    return format_name


def _read_images(source: Started) -> Started:
    """Returns the index step that `source` was made from."""
    title = source.config_json["inputs"].get("images", "")
    images = read_started(source.run, title) if title else None
    if images is None or not images.is_finished:
        raise ConfigError(
            f"--step {source.title}: was made from the images of {title or 'no step'}, which is not finished in "
            f"{source.run}: run its run file again"
        )
    return images


def _read_settings(texts: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Returns settings from `key=value` texts, and their faults."""
    values: dict[str, Any] = {}
    faults = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            faults.append(f"{text}: a setting has the form <key>=<value>: `weaksam stages export` lists the keys")
        elif key in _COMMAND_OPTIONS:
            faults.append(f"{text}: say it by {_COMMAND_OPTIONS[key]}")
        elif key in values:
            faults.append(f"{text}: {key} is given twice")
        else:
            try:
                values[key] = read_value(value)
            except (yaml.YAMLError, ValueError) as error:
                faults.append(f"{text}: the value is not YAML: {' '.join(str(error).split())}")
    return values, faults


# --- its report


def read_report(step: Step) -> dict[str, Any]:
    """Returns the export.json of a finished export, with the name of the step that it exports.

    Raises:
        ConfigError: files of the export are missing or were replaced by another export.
    """
    report = storage.read_json(storage.join(step.folder, "export.json"))
    to = folder_of(step)  # not the path in export.json: the run may have moved since
    try:
        mark = storage.read_json(marker_uri(to, report["format"])).get("fingerprint")
    except FileNotFoundError:
        mark = None
    if mark not in (None, step.fingerprint):
        raise ConfigError(f"{to}: another export was written there since: name another folder by --to")
    gone = [name for name in report["contents"] if not storage.exists(storage.join(to, name))]
    if gone or mark is None:
        what = " and ".join(gone) or "the mark that this export wrote it"
        raise ConfigError(
            f"{to}: the export was finished, but {what} is gone from there: remove {step.manifest_uri} and run the "
            "same command again"
        )
    source = step.inputs["pgt" if step.config.pgt is not None else "detections"]
    return {"step": f"{source.name}-{source.fingerprint}", "folder": step.folder, **report, "to": to}


def explain(report: Mapping[str, Any], *, was_finished: bool) -> list[str]:
    """Returns a report as lines for a terminal."""
    counts = ", ".join(f"{report[key]} {key}" for key in ("files", "images", "boxes", "masks"))
    rows = {
        "written": f"{counts} -> {report['to']}",
        "contents": ", ".join(report["contents"]),
        "splits": ", ".join(f"{name} {count}" for name, count in report["splits"].items()),
        "pictures": f"not copied, they are below {report['image_root']}",
        "verified": f"everything was read back and compared: {report['verified']}",
    }
    if "mask_iou" in report:
        rows["mask IoU"] = _describe_masks(report["mask_iou"])
    rows |= {"left out": _describe_counts(report["left_out"]), "lost": _describe_counts(report["lost"])}
    end = ", which was finished before: nothing was written" if was_finished else ""
    head = f"{report['format']} export of {report['step']}{end}"
    return [head, *(f"  {heading:<10}{text}" for heading, text in rows.items())]


def _describe_masks(mask_iou: Mapping[str, Any]) -> str:
    """Returns the mask IoU of a report in words."""
    where = f" (image {mask_iou['worst_image']})" if mask_iou["worst_image"] is not None else ""
    return f"{mask_iou['mean']:.4f} on average, {mask_iou['worst']:.4f} at worst{where}"


def _describe_counts(counts: Mapping[str, int]) -> str:
    """Returns counts in words; `nothing` if all are 0."""
    return ", ".join(f"{count} {key.replace('_', ' ')}" for key, count in counts.items() if count) or "nothing"
