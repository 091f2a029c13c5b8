"""What tests of run files share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.pipeline.made_steps import CALLS, MakeConfig, UseConfig, work
from weaksam import pipeline
from weaksam.core.step import Stage, Step
from weaksam.pipeline import run_file


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    make = Stage("make", 1, MakeConfig, work, writes="things")
    use = Stage("use", 1, UseConfig, work, writes="results")
    monkeypatch.setattr(run_file, "STAGES", {"make": make, "use": use})


@pytest.fixture
def load(tmp_path: Path, stages: None) -> Callable[..., list[Step]]:
    def inner(steps: object, *overrides: str, **top: object) -> list[Step]:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({"run": str(tmp_path / "run"), "steps": steps, **top}))
        return pipeline.load(str(path), overrides)

    return inner
