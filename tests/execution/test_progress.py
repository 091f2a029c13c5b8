"""How far a step is, told while it runs and after it was killed; and never at the cost of the work."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from testing.places import ROOT
from tests.execution.test_runtime import CountBytes, a_step, images, run
from weaksam.core import schemas, storage, tables
from weaksam.errors import StorageError
from weaksam.execution import progress
from weaksam.execution.progress import (
    Progress,
    count_up,
    is_due,
    part_counter,
    read_progress,
    report_progress,
    words_of,
)
from weaksam.pipeline import states
from weaksam.stages.training_run import progress_of
from weaksam.training.settings import TrainSettings


def test_the_file_is_written_every_ten_seconds_and_a_line_logged_after_five_and_then_every_minute() -> None:
    due = {tick * progress.TICK: is_due(tick) for tick in range(30)}
    assert [seconds for seconds, (to_file, _) in due.items() if to_file] == list(range(0, 150, 10))
    assert [seconds for seconds, (_, to_log) in due.items() if to_log] == [5, 65, 125]


def test_what_is_left_takes_as_long_as_what_was_done() -> None:
    told = count_up(Progress(100, failed=2), 400, "images", 3.0)
    assert told == {"done": 100, "total": 400, "unit": "images", "failed": 2, "rate": 3.0, "eta_seconds": 100.0}
    assert words_of(told) == ["100/400 images", "3/s", "eta 2 min", "2 failed"]


def test_before_anything_moves_there_is_no_guess() -> None:
    told = count_up(Progress(0), 400, "images", 0.0)
    assert told["eta_seconds"] is None
    assert words_of(told) == ["0/400 images", "0 failed"]


def test_rows_written_twice_are_not_more_than_all() -> None:
    assert count_up(Progress(70), 64, "images", 1.0)["done"] == 64


def test_a_training_tells_its_loss_and_the_speed_of_its_last_row() -> None:
    settings = TrainSettings(steps=100, batch_size=4, lr=0.1)
    seen = progress_of({"step": 20, "loss": 0.5, "lr": 0.1, "images_per_second": 8.0}, settings)
    told = count_up(seen, settings.steps, "steps", seen.rate or 0)
    assert words_of(told) == ["20/100 steps", "2/s", "eta 40 s", "loss 0.5"]


def test_failed_rows_are_counted_and_each_part_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = schemas.with_metadata(schemas.DETECTIONS, fingerprint="f", class_names=["a"])
    folder, read = str(tmp_path), []
    real = tables.read_parts
    monkeypatch.setattr(tables, "read_parts", lambda f, parts, **k: [read.extend(parts), real(f, parts, **k)][1])
    look = part_counter(folder)
    assert look() == Progress(0)
    for ids, status in (("ab", "ok"), ("cde", "crash")):
        tables.write_part(folder, schemas.to_table([{"image_id": i, "status": status} for i in ids], schema))
        look()
    storage.write_json(storage.join(folder, progress.FILE), {})  # lies beside the parts and is none
    assert look() == Progress(5, failed=3)
    assert len(read) == 2


def test_the_log_has_a_line_with_all_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "TICK", 0.1)
    looks = iter(range(0, 1000, 10))
    with (
        caplog.at_level(logging.INFO, logger="weaksam"),
        report_progress(a_step(tmp_path), total=1000, unit="images", look=lambda: Progress(next(looks), failed=1)),
    ):
        time.sleep(0.3)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("count  10/1000 images  ")
    assert line.endswith("1 failed")
    assert "/s  eta " in line


def test_work_that_ends_well_is_finished_and_work_that_does_not_has_stopped(tmp_path: Path) -> None:
    step = a_step(tmp_path)
    with report_progress(step, total=3, unit="images", look=lambda: Progress(3)):
        pass
    told = json.loads((tmp_path / "count-f" / "progress.json").read_text())
    keys = "step stage state done total unit failed rate eta_seconds started updated"
    assert " ".join(told) == keys
    assert (told["step"], told["stage"], told["state"], told["done"]) == ("count", "count", "finished", 3)
    assert told["started"].endswith("+00:00")
    with pytest.raises(KeyboardInterrupt), report_progress(step, total=3, unit="images", look=lambda: Progress(1)):
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "count-f" / "progress.json").read_text())["state"] == "stopped"


@pytest.mark.parametrize("error", [StorageError("down"), OSError("disk full"), ZeroDivisionError("a bug")])
def test_what_goes_wrong_in_telling_stays_there(tmp_path: Path, error: Exception, monkeypatch) -> None:
    def fail(*_: object) -> Progress:
        raise error

    with report_progress(a_step(tmp_path), total=3, unit="images", look=fail):
        pass
    monkeypatch.setattr(storage, "write_json", fail)
    with report_progress(a_step(tmp_path), total=3, unit="images", look=lambda: Progress(3)):
        pass
    assert not (tmp_path / "count-f" / "progress.json").exists()


class CountSlowly(CountBytes):
    """Takes its time."""

    def make(self, image, row, prepared):
        time.sleep(0.075)
        return super().make(image, row, prepared)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_step_tells_how_far_it_is_while_it_runs_and_that_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "TICK", 0.1)
    monkeypatch.setattr("tests.execution.test_runtime.CountBytes", CountSlowly)
    source = images(tmp_path / "images", {f"{i:03}": b"x" for i in range(40)})
    (tmp_path / "images" / "007").unlink()
    seen: list[dict] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            if told := read_progress(a_step(tmp_path).folder):
                seen.append(told)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        outcome, rows = run(tmp_path, source)
    finally:
        ended.set()
        thread.join()
    assert (outcome.rows, outcome.failed, len(rows)) == (40, 1, 40)
    assert {told["state"] for told in seen[:-1]} >= {"running"}
    assert any(0 < told["done"] < 40 and told["rate"] > 0 and told["eta_seconds"] > 0 for told in seen)
    last = read_progress(a_step(tmp_path).folder)
    assert last
    assert [last[key] for key in ("state", "done", "total", "failed", "unit")] == ["finished", 40, 40, 1, "images"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_storage_that_refuses_the_file_does_not_stop_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "TICK", 0.05)
    (tmp_path / "count-f" / "progress.json").mkdir(parents=True)  # cannot be replaced by a file
    source = images(tmp_path / "images", {f"{i:03}": b"x" for i in range(8)})
    outcome, rows = run(tmp_path, source)
    assert (outcome.rows, outcome.failed, len(rows)) == (8, 0, 8)


def test_a_killed_driver_leaves_a_step_that_runs_until_its_last_sign_is_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tests.execution.test_runtime import a_step\n"
        "from weaksam.execution.progress import Progress, report_progress\n"
        f"step = a_step(Path({str(tmp_path)!r}))\n"
        "with report_progress(step, total=400, unit='images', look=lambda: Progress(120)):\n"
        "    time.sleep(60)\n"
    )
    storage.write_json(str(tmp_path / "count-f" / "config.json"), {"stage": "count"})
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "count-f" / "progress.json").exists():
            assert driver.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    (state,) = states.read_states(str(tmp_path))
    assert (state["state"], state["stage"], state["progress"]["done"]) == ("running", "count", 120)
    told = storage.read_json(str(tmp_path / "count-f" / "progress.json"))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + progress.FRESH + 1)
    (state,) = states.read_states(str(tmp_path))
    assert (told["state"], state["state"]) == ("running", "stopped")
