"""Finished steps stay finished when a stage gets another setting."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import create_model

from testing.places import ROOT
from weaksam.core.config import Added, StageConfig, parse_settings, result_settings
from weaksam.core.yaml_files import load_run_file
from weaksam.stages import STAGES


def settings_by_stage() -> dict[str, dict[str, Any]]:
    """A step's settings for each stage, from the run files of configs/; two stages are in none of them."""
    steps: dict[str, dict[str, Any]] = {
        "import_detections": {"images": "images", "results": "results.json"},
        "export": {"images": "images", "pgt": "pgt", "format": "coco"},
    }
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        for raw in load_run_file(str(path))["steps"].values():
            settings = {key: value for key, value in raw.items() if key != "stage"}
            settings |= {"root": "images"} if raw["stage"] == "index" else {}
            settings |= {"sam": {"model": "vit_xs"}} if "sam" in settings else {}
            steps.setdefault(raw["stage"], settings)
    return steps


SETTINGS = settings_by_stage()


def read(config: type[StageConfig], settings: dict[str, Any]) -> dict[str, Any]:
    parsed, faults = parse_settings(config, settings, where="step")
    assert parsed is not None, faults
    return result_settings(parsed)


@pytest.mark.parametrize("name", STAGES)
def test_a_new_setting_at_its_default_leaves_fingerprints_as_they_were(name: str) -> None:
    old: Any = STAGES[name].config
    new = create_model("New", __base__=old, later=(Annotated[int, Added()], 3))
    settings = SETTINGS[name]
    assert read(new, settings) == read(new, settings | {"later": 3}) == read(old, settings)
    assert read(new, settings | {"later": 4}) == read(old, settings) | {"later": 4}
