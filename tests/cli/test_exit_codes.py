"""Each exit code of a command, provoked: the cause decides, and the page that explains them lists them all."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.test_docs_texts import TROUBLE
from weaksam.cli.main import app
from weaksam.core.config import StageConfig
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import (
    ClusterError,
    ConfigError,
    DataError,
    DivergedError,
    StageError,
    StorageError,
    TaskError,
    WeightsError,
)
from weaksam.pipeline import run_file


class NothingConfig(StageConfig):
    """Does nothing."""


def raises(error: BaseException) -> Callable[[Step], Outcome]:
    def run(step: Step) -> Outcome:
        raise error

    return run


ENDS: list[tuple[int, Callable[[Step], Outcome]]] = [
    (0, lambda step: Outcome(rows=1000, failed=1)),
    (1, raises(KeyError("a bug"))),
    (1, raises(TaskError("loss: RuntimeError: a bug"))),
    (2, raises(ConfigError("the run file is wrong"))),
    (2, raises(DataError("the data are wrong"))),
    (2, raises(WeightsError("the weights are wrong"))),
    (2, raises(DivergedError("step 3: the loss is nan"))),
    (3, lambda step: Outcome(rows=1000, failed=2, failures=["a: unreadable: empty"])),
    (4, raises(StorageError("the bucket does not answer"))),
    (4, raises(ClusterError("the cluster is gone"))),
    (4, raises(StageError("workers were lost"))),
    (130, raises(KeyboardInterrupt())),
]


@pytest.mark.parametrize(("code", "run"), ENDS)
def test_the_cause_decides_the_exit_code(
    code: int, run: Callable[[Step], Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage("nothing", 1, NothingConfig, run, writes="nothing")
    monkeypatch.setattr(run_file, "STAGES", {"nothing": stage})
    monkeypatch.setattr("weaksam.cli.main.set_up_logging", lambda: None)
    config = tmp_path / "run.yaml"
    config.write_text(f"run: {tmp_path}/run\nsteps: {{net: {{stage: nothing}}}}\n")
    assert CliRunner().invoke(app, ["run", str(config)]).exit_code == code


def test_a_run_file_that_is_not_there_is_the_commands_fault(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["run", str(tmp_path / "none.yaml")]).exit_code == 2


def test_every_code_of_the_page_is_provoked() -> None:
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", TROUBLE, re.MULTILINE)} == {code for code, _ in ENDS}
