"""README and configs keep up with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from weaksam import pipeline
from weaksam.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
# What the header of each config says must come from the command line.
GIVEN = {"root": "s3://data/somewhere", "checkpoint": "s3://models/sam.pth"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_config_is_right_once_its_data_is_named(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# "), "a config opens with what it is and the command that runs it"
    assert f"weaksam run {path.relative_to(ROOT)}" in text
    header = re.match(r"(#.*\n)*", text)
    assert header
    named = re.findall(r"steps\.([\w.]+)\.(\w+)=", header.group())
    overrides = [f"steps.{step}.{key}={GIVEN[key]}" for step, key in named if key in GIVEN]
    _, parsed = pipeline.parse(str(path), overrides)
    assert parsed


def test_every_stage_is_in_the_readme_and_has_a_job() -> None:
    for name in STAGES:
        assert f"| `{name}` |" in README
        assert (ROOT / "jobs" / f"{name}.py").is_file()


def test_every_file_the_readme_names_is_there() -> None:
    named = re.findall(r"(?:configs|tests|benchmarks|docs|jobs)/[\w/.]+\.\w+", README)
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name


def test_every_override_in_the_readme_is_a_setting() -> None:
    for step, key in re.findall(r"steps\.(\w+)\.([\w.]+)=", README):
        config = STAGES[{"images": "index"}.get(step, step)].config
        for part in key.split("."):
            assert part in config.model_fields, f"steps.{step}.{key}"
            config = config.model_fields[part].annotation
