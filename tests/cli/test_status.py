"""The state and the figures of a run, as the command line shows them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.cli.commands import WEAKSAM, call
from weaksam.cli import main as cli
from weaksam.core import storage


def write_progress(folder: Path, *, state: str, seconds_ago: float, **others: object) -> None:
    updated = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    counts = {"done": 120, "total": 400, "unit": "images", "failed": 2, "rate": 3.11, "eta_seconds": 80.0}
    times = {"started": "", "updated": updated.isoformat()}
    progress = {"step": "x", "stage": "proposals", "state": state, **counts, **times, **others}
    storage.write_json(str(folder / "config.json"), {"stage": "proposals"})
    storage.write_json(str(folder / "progress.json"), progress)


def test_the_state_of_a_run_tells_what_runs_and_what_stopped(tmp_path: Path) -> None:
    write_progress(tmp_path / "a-00000000", state="running", seconds_ago=30)
    write_progress(tmp_path / "b-00000000", state="running", seconds_ago=3 * 3600)
    write_progress(tmp_path / "c-00000000", state="stopped", seconds_ago=20)
    training = {"stage": "train_wsod", "unit": "steps", "failed": 0, "loss": 0.5}
    write_progress(tmp_path / "d-00000000", state="running", seconds_ago=5, **training)
    write_progress(tmp_path / "e-00000000", state="finished", seconds_ago=9999)
    done = {"stage": "proposals", "rows": 400, "failed": 1, "seconds": 200.0, "rows_per_second": 2.0}
    storage.write_json(str(tmp_path / "e-00000000" / "manifest.json"), done)
    write_progress(tmp_path / "f-00000000", state="running", seconds_ago=5)
    (tmp_path / "f-00000000" / "progress.json").write_text("{half")
    result = call(WEAKSAM, "status", str(tmp_path)).stdout
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in result.splitlines()[1:]}
    assert lines["a"].startswith("running 120/400 images 3.11/s eta 80 s 2 failed 0 2 /")
    assert lines["b"].startswith("stopped at 120/400 (last sign 3.0 h ago): the same command goes on 0 2 /")
    assert lines["c"].startswith("stopped at 120/400 (last sign 2")
    assert lines["d"].startswith("running 120/400 steps 3.11/s eta 80 s loss 0.5 ")
    assert lines["e"].startswith("finished 400 1 200 2 /")
    assert lines["f"].startswith("unfinished 0 /")

    states = {state["step"]: state for state in json.loads(call(WEAKSAM, "status", str(tmp_path), "--json").stdout)}
    assert [states[step]["state"] for step in "abcdef"] == [
        *("running", "stopped", "stopped", "running", "finished", "unfinished")
    ]
    keys = ["step", "stage", "state", "rows", "failed", "seconds", "rows_per_second", "folder", "progress", "damage"]
    keys.append("reads")
    assert all(list(state) == keys for state in states.values())
    assert states["e"] == {
        **{"step": "e", "state": "finished", "folder": str(tmp_path / "e-00000000"), "progress": None},
        "damage": None,
        "reads": [],
        **done,
    }
    assert states["d"]["progress"]["loss"] == 0.5
    assert 10799 < states["b"]["progress"]["seconds_ago"] < 10900
    assert states["f"]["stage"] == "proposals"


def test_the_state_of_a_folder_without_steps_is_a_fault(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        result = call(WEAKSAM, "status", str(folder))
        assert result.returncode == 2
        assert f"error: {folder}: no step has been started there" in result.stderr


def test_metrics_shows_the_headlines_of_every_finished_evaluation(tmp_path: Path) -> None:
    figures = {"boxes_per_image": 31.66, "recall@0.5": 0.8514, "recall@0.75": 0.5, "AR": 0.4}
    report = {"task": "proposals", "split": None, "num_images": 80, "metrics": figures}
    storage.write_json(str(tmp_path / "recall-0123abcd" / "metrics.json"), report)
    others = {**figures, "recall@0.9": 0.25, "peaks_inside": 0.625}
    storage.write_json(
        str(tmp_path / "recall_other-0123abcd" / "metrics.json"), {**report, "split": "test", "metrics": others}
    )
    (tmp_path / "images-00000000").mkdir()
    done = call(WEAKSAM, "metrics", str(tmp_path))
    assert done.returncode == 0
    head, one, other = done.stdout.strip().splitlines()
    # headlines that neither has, such as the peaks of each kind, are no columns
    names = ["boxes_per_image", "recall@0.5", "recall@0.75", "recall@0.9", "AR", "peaks_inside"]
    assert head.split() == ["step", "split", "images", *names]
    assert one.split() == ["recall-0123abcd", "all", "80", "31.7", "85.1%", "50.0%", "40.0%"]  # no recall@0.9 in it
    assert other.split() == ["recall_other-0123abcd", "test", "80", "31.7", "85.1%", "50.0%", "25.0%", "40.0%", "62.5%"]


@pytest.mark.parametrize(
    "content", ["[]", "{}", "null", '{"task":"x"}', '{"task":"detection","metrics":{}}', '{"task":["x"]}']
)
def test_a_file_that_is_not_the_metrics_of_a_step_is_named(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "recall-0123abcd"
    folder.mkdir()
    (folder / "metrics.json").write_text(content)
    done = CliRunner().invoke(cli.app, ["metrics", str(tmp_path)])
    assert done.exit_code == 2
    assert f"{folder}/metrics.json: not the metrics of a step: remove the step's manifest {folder}/mani" in done.output


def test_metrics_of_a_run_without_any_is_a_fault(tmp_path: Path) -> None:
    done = call(WEAKSAM, "metrics", str(tmp_path))
    assert done.returncode == 2
    assert "no evaluate step is finished there" in done.stderr
