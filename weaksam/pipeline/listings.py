"""Tables for the terminal: the state of a run and its figures, read from its files; the stages and their settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from rich.table import Table

from weaksam.core import storage
from weaksam.core.config import Choice, Matching
from weaksam.core.rules import sentences_of
from weaksam.errors import ConfigError, DamagedError
from weaksam.execution.progress import duration, words_of


def states_of_steps(states: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the result of `read_states` as a table, one line per step."""
    table = Table("step", "state", "rows", "failed", "seconds", "rows/s", "folder", box=None)
    for state in states:
        counts = [state[key] for key in ("rows", "failed", "seconds", "rows_per_second")]
        texts = ("" if count is None else f"{count:g}" for count in counts)
        table.add_row(state["step"], _describe(state), *texts, state["folder"])
    return table


def _describe(state: Mapping[str, Any]) -> str:
    progress = state["progress"]
    if state["state"] == "damaged":
        return f"damaged: {state['damage']}"
    if state["state"] == "running":
        return " ".join(["running", *words_of(progress)])
    if state["state"] == "stopped":
        count, age = f"{progress['done']}/{progress['total']}", duration(progress["seconds_ago"])
        return f"stopped at {count} (last sign {age} ago): the same command goes on"
    return state["state"]


def figures_of_steps(run: str) -> list[Table]:
    """Returns the figures of every finished evaluate step of a run folder: one table per task, one line per step.

    Figures that no step has are left out.

    Raises:
        ConfigError: the run has no finished evaluate step.
        DamagedError: a metrics.json is not one that an evaluate step writes.
    """
    from weaksam.stages.evaluate import HEADLINES

    by_folder = [(name, read_figures(storage.join(run, name))) for name in storage.list_folders(run)]
    reports = [(name, report) for name, report in by_folder if report is not None]
    if not reports:
        raise ConfigError(f"{run}: no evaluate step is finished there: check the folder, or run a config first")
    listed = []
    for task in dict.fromkeys(report["task"] for _, report in reports):
        of_task = [(name, report) for name, report in reports if report["task"] == task]
        keys = [key for key in HEADLINES[task] if any(key in report["metrics"] for _, report in of_task)]
        table = Table("step", "split", "images", *keys, box=None)
        for name, report in of_task:
            figures = [figure(key, report["metrics"]) for key in keys]
            table.add_row(name, report["split"] or "all", str(report["num_images"]), *figures)
        listed.append(table)
    return listed


def read_figures(folder: str) -> dict[str, Any] | None:
    """Returns the content of an evaluate step's metrics.json; None if there is no such file.

    Raises:
        DamagedError: the file is not one that an evaluate step writes.
    """
    uri = storage.join(folder, "metrics.json")
    try:
        report = storage.read_json(uri)
    except FileNotFoundError:
        return None
    if not _are_figures(report):
        manifest = storage.join(folder, "manifest.json")
        raise DamagedError(
            f"{uri}: not the metrics of a step: remove the step's manifest {manifest}, and the same command makes them "
            "anew"
        )
    return report


def _are_figures(report: Any) -> bool:
    from weaksam.stages.evaluate import HEADLINES

    if not isinstance(report, dict) or not isinstance(report.get("task"), str) or report["task"] not in HEADLINES:
        return False
    split, figures = report.get("split", ...), report.get("metrics")
    if not (split is None or isinstance(split, str)) or not isinstance(report.get("num_images"), int):
        return False
    return isinstance(figures, dict) and all(isinstance(value, (int, float)) for value in figures.values())


def figure(name: str, figures: Mapping[str, Any]) -> str:
    """Returns a figure as text: a fraction in percent, a count as it is, "" for a missing figure.

    The standard deviation follows if there were several runs.
    """
    value = figures.get(name)
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    if "_per_image" in name:
        return f"{value:.1f}"
    spread = figures.get(f"{name}_std")
    return f"{100 * value:.1f}" + ("%" if spread is None else f" ± {100 * spread:.1f}%")


def all_stages() -> Table:
    """Returns a table of the stages with their inputs, outputs and descriptions."""
    from weaksam.stages import STAGES

    table = Table("stage", "reads", "writes", "what it does", box=None)
    for stage in STAGES.values():
        table.add_row(stage.name, ", ".join(stage.read_kinds), stage.writes, stage.summary)
    return table


def settings_of_stage(name: str) -> tuple[str, Table]:
    """Returns the description of a stage with its recipes, and a table of its keys with type, default and meaning.

    Raises:
        ConfigError: there is no such stage.
    """
    from weaksam.stages import STAGES

    if name not in STAGES:
        raise ConfigError(f"there is no stage '{name}': stages are {', '.join(STAGES)}")
    stage = STAGES[name]
    table = Table(box=None)
    for title in ("key", "type", "default", "meaning"):
        table.add_column(title, no_wrap=title == "type")  # a type is searched for in one piece
    for row in settings_rows(stage.config):
        table.add_row(*row)
    about = [f"{name} -> {stage.writes}", inspect.cleandoc(stage.config.__doc__ or "")]
    recipes = recipe_lines(stage.config)
    return "\n".join([*about, *(["", "Other defaults:", *recipes] if recipes else []), ""]), table


def settings_rows(config: Any, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Returns (key, type, default, sentence) of every setting, with nested settings as `outer.inner`."""
    rows = []
    for name, info in config.model_fields.items() if prefix else _own_first(config):
        inner = info.annotation
        if isinstance(inner, type) and hasattr(inner, "model_fields"):
            rows += settings_rows(inner, f"{prefix}{name}.")
            continue
        if is_dataclass(inner):
            rows += _rule_rows(inner, f"{prefix}{name}.")
            continue
        kind = next((str(mark) for mark in info.metadata if isinstance(mark, Choice)), _type_name(inner))
        default = "required" if info.is_required() else _shortly(info.get_default(call_default_factory=True))
        rows.append((prefix + name, kind, default, " ".join((info.description or "").split())))
    return rows


def recipe_lines(config: Any) -> list[str]:
    """Returns a line for each recipe of a stage: when it applies, and its defaults as in a run file."""
    lines = []
    for recipe in getattr(config, "recipes", ()):
        where, defaults = (_as_keys(values) for values in (recipe.when, recipe.defaults))
        lines += [f"with {where}: {defaults}"] if recipe.defaults else []
    return lines


def _as_keys(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}: {_as_value(value)}`" for key, value in values.items())


def _as_value(value: Any) -> str:
    return "null" if value is None else str(value) if isinstance(value, Matching) else _shortly(value)


def _own_first(config: Any) -> list[tuple[str, Any]]:
    """Returns the fields of a stage in the order of its class; fields of its bases come last."""
    own = list(vars(config).get("__annotations__", {}))
    return sorted(config.model_fields.items(), key=lambda field: own.index(field[0]) if field[0] in own else len(own))


def _rule_rows(rules: Any, prefix: str) -> list[tuple[str, str, str, str]]:
    """Returns the rows for a dataclass of rules, whose docstring describes its attributes."""
    hints, sentences = get_type_hints(rules), sentences_of(rules)
    return [
        (prefix + field.name, _type_name(hints[field.name]), _shortly(field.default), sentences[field.name])
        for field in fields(rules)
    ]


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def _shortly(value: Any) -> str:
    """Returns the `repr` of a value; for a long list, its beginning and its end."""
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(map(repr, value[:2]))}, ..., {value[-1]!r}]"
    return repr(value)
