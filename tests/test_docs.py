"""README and configs keep up with the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.stages.test_proposals import jpeg
from weaksam import pipeline, tables
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


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_run_file_of_the_readme_makes_proposals_and_masks_of_a_folder(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    data, config = tmp_path / "mine", tmp_path / "alone.yaml"
    (data / "beach").mkdir(parents=True)
    (data / "beach" / "0001.jpg").write_bytes(jpeg(60, 80))
    (data / "labels.csv").write_text("file,labels\nbeach/0001.jpg,dog;cat\n")
    (given,) = re.findall(r"`({\"image_id\".*?})`", README)
    given = given.replace("left, top, width, height", "8, 4, 40, 30")
    (data / "boxes.json").write_text(json.dumps([json.loads(given)]))
    config.write_text(block.replace("/data/mine", str(data)).replace("runs/alone", str(tmp_path / "run")))
    steps = {step.name: step for step in pipeline.load(str(config))}
    pipeline.run_steps(list(steps.values()))
    (found,) = tables.read_step(steps["proposals"], columns=["status"]).to_pylist()
    (drawn,) = tables.read_step(steps["masks"], columns=["status", "classes", "masks"]).to_pylist()
    assert (found["status"], drawn["status"], drawn["classes"], len(drawn["masks"])) == ("ok", "ok", [0], 1)
