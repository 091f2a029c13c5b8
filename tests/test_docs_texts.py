"""What docs/ quotes is there: texts of errors, settings with their defaults, files.

`docs/troubleshooting.md` has an entry for each text: a heading of level 3 that quotes it in backticks, with `...` for
what varies, and ends with (Ray) where the text is not ours. `docs/departures.md` writes settings as `stage.key: value`;
the column "here" tells defaults, the last one other values.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import pytest
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from testing.places import ROOT
from weaksam import errors
from weaksam.cluster import doctor
from weaksam.core.schemas import FAILED_STATUSES
from weaksam.core.yaml_files import read_value
from weaksam.stages import STAGES
from weaksam.stages.proposal_settings import ProposalResources
from weaksam.training.settings import TrainResources

DEPARTURES = (ROOT / "docs" / "departures.md").read_text()
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.compile(r"`([^`]+)`")
SETTING = re.compile(rf"((?:{'|'.join(STAGES)})(?:\.\w+)+)(?:: (.+))?")
LEAST = 8  # letters of a text's longest piece: fewer could be anywhere

HEADINGS = [line for line in TROUBLE.splitlines() if line.startswith("### ")]
FRAGMENTS = [(fragment, line.endswith(" (Ray)")) for line in HEADINGS for fragment in QUOTED.findall(line)]
ROWS = [re.split(r"\s*\|\s*", line)[1:-1] for line in DEPARTURES.splitlines() if line.startswith("| ")]
CELLS = [(cell, column) for row in ROWS for column, cell in enumerate(row)]
SETTINGS = [
    (*found.groups(), column)
    for cell, column in CELLS
    for text in QUOTED.findall(cell)
    if (found := SETTING.fullmatch(text))
]
HERE, PUBLISHED = 2, 4  # columns


def text_of(node: ast.AST) -> str | None:
    """A string as it is written, with "..." for what is put in; literals that stand or are added together as one."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(text_of(part) or "..." for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return (text_of(left) or "...") + (text_of(right) or "...")
        case ast.IfExp(body=body):
            return text_of(body)
    return None


def files_of(is_rays: bool) -> Iterator[Path]:
    if not is_rays:
        yield from (ROOT / "weaksam").rglob("*.py")
        return
    spec = importlib.util.find_spec("ray")
    assert spec
    assert spec.origin
    yield from (Path(spec.origin).parent / name for name in ("exceptions.py", "_private/node.py"))


@cache
def literals(is_rays: bool) -> frozenset[str]:
    """Every string of the sources but docstrings."""
    nodes = [node for path in files_of(is_rays) for node in ast.walk(ast.parse(path.read_text()))]
    documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return frozenset(text for node in nodes if id(node) not in documentation and (text := text_of(node)))


def pattern_of(fragment: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, fragment.split("..."))), re.DOTALL)


def field_of(config: Any, key: str) -> Any:
    """The field that a dotted key names."""
    *outer, last = key.split(".")
    for part in outer:
        assert part in fields_of(config), f"{key}: {config.__name__} has no {part}"
        config = fields_of(config)[part].annotation
    assert last in fields_of(config), f"{key}: {config.__name__} has no {last}"
    return fields_of(config)[last]


def fields_of(config: Any) -> dict[str, FieldInfo]:
    """The fields of settings, or of rules that settings hold."""
    if not is_dataclass(config):
        return config.model_fields
    hints = get_type_hints(config)
    return {
        field.name: FieldInfo.from_annotated_attribute(hints[field.name], field.default) for field in fields(config)
    }


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


@pytest.mark.parametrize(("fragment", "is_rays"), FRAGMENTS)
def test_every_text_is_printed_by_the_code(fragment: str, is_rays: bool) -> None:
    assert max(len(re.sub(r"\W", "", piece)) for piece in fragment.split("...")) >= LEAST, "too short to tell anything"
    assert any(pattern_of(fragment).search(text) for text in literals(is_rays)), f"no source has this text: {fragment}"


def test_every_heading_quotes_a_text_of_its_own() -> None:
    quoted = [fragment for fragment, _ in FRAGMENTS]
    assert len(quoted) == len(set(quoted)) >= 25
    assert all(QUOTED.search(line) for line in HEADINGS)


def test_exit_codes_are_those_of_the_errors() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")]
    codes = {0, 1, 130} | {kind.exit_code for kind in kinds}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", TROUBLE, re.MULTILINE)} == codes


def test_every_status_of_a_failed_row_is_explained() -> None:
    assert all(f"`{status}`" in TROUBLE for status in FAILED_STATUSES)


def test_checks_of_the_doctor_are_its_own() -> None:
    tree = ast.parse(Path(doctor.__file__).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    names = {str(text_of(call.args[0])) for call in calls if getattr(call.func, "id", "") == "Finding"}
    assert set(re.findall(r"^\| `([\w ]+)` \|", TROUBLE, re.MULTILINE)) == names


@pytest.mark.parametrize("key", sorted(set(re.findall(r"`resources\.(\w+)", TROUBLE))))
def test_every_resource_is_a_setting(key: str) -> None:
    assert key in ProposalResources.model_fields or key in TrainResources.model_fields


@pytest.mark.parametrize(
    "key", sorted(set(re.findall(r"`((?:steps\.)?(?:" + "|".join(STAGES) + r")\.[\w.]+)", TROUBLE)))
)
def test_every_key_that_names_its_stage_is_a_setting(key: str) -> None:
    stage, _, inner = key.removeprefix("steps.").partition(".")
    field_of(STAGES[stage].config, inner)


@pytest.mark.parametrize(("key", "value", "column"), SETTINGS)
def test_every_setting_is_there_with_its_default(key: str, value: str | None, column: int) -> None:
    stage, _, inner = key.partition(".")
    field = field_of(STAGES[stage].config, inner)
    if value is None:
        return
    default = None if field.is_required() else as_json(field.get_default(call_default_factory=True))
    told = read_value(value)
    assert (told == default) is (column == HERE), f"{key}: the default is {default!r}"
    TypeAdapter(Annotated[field.annotation, field]).validate_json(json.dumps(told))


def test_settings_stand_where_they_are_understood() -> None:
    assert len(SETTINGS) > 80
    assert {column for _, value, column in SETTINGS if value is not None} == {HERE, PUBLISHED}
    assert {len(row) for row in ROWS} == {5}


@pytest.mark.parametrize("name", ["departures", "troubleshooting"])
def test_every_file_that_is_named_is_there(name: str) -> None:
    text = {"departures": DEPARTURES, "troubleshooting": TROUBLE}[name]
    named = re.findall(r"(?:configs|docs|benchmarks|cluster|weaksam|jobs)/[\w/.]+\.\w+", text)
    assert named
    for path in named:
        assert (ROOT / path).is_file(), path
