"""`weaksam plan` end to end, and what it makes of a pilot."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from weaksam import pipeline
from weaksam.cli import main as cli
from weaksam.core import storage, tables
from weaksam.core.storage import FileInfo
from weaksam.demo.scenes import write_scenes
from weaksam.execution.pools import PoolResources
from weaksam.execution.times import read_times
from weaksam.ops.roi_drop import RoiDropRules
from weaksam.plan.pilot import _for_pilot
from weaksam.plan.planning import Plan, Prices, StepPlan, as_json_of, project_bytes, sentences
from weaksam.plan.projection import Advice, Pace
from weaksam.plan.training_projection import Seconds, parts_of_steps
from weaksam.stages import STAGES

SCENES, IMAGES = 18, 6  # twelve of them are split trainval, six test

RUN = """
run: {base}/run
steps:
  images: {{stage: index, format: voc, root: {base}/scenes, splits: [trainval, test]}}
  proposals: {{stage: proposals, images: images, sam: {{model: vit_xs}}, grid: {{points_per_side: 4}},
    resources: {{max_actors: 1, batch_size: 2}}}}
  mist: {{stage: train_wsod, images: images, proposals: proposals, split: trainval, backbone: frozen_sam,
    dropblock: 'off',
    scales: [96], min_side: 2, steps: 400, batch_size: 2, lr: 1.0e-3, warmup: 0, milestones: null}}
  found: {{stage: detect, images: images, proposals: proposals, detector: mist, scales: [96],
    resources: {{max_actors: 1, batch_size: 2}}}}
  pgt: {{stage: pgt, images: images, detections: found, split: trainval}}
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("ray_cluster")
def test_a_plan_runs_a_pilot_and_tells_what_follows_from_what_that_took(tmp_path: Path) -> None:
    write_scenes(str(tmp_path / "scenes"), images=SCENES, seed=1, format="voc")
    config = tmp_path / "run.yaml"
    config.write_text(RUN.format(base=tmp_path))
    command = ["plan", str(config), "--images", str(IMAGES), "--gpu-price", "3", "--cpu-price", "0.5"]
    told = CliRunner().invoke(cli.app, [*command, "--json"])
    assert told.exit_code == 0, told.output
    assert "proposals  " in told.stderr
    assert "images/s" not in told.stderr  # rows of metrics
    plan = json.loads(told.stdout)
    assert plan["folder"] == str(tmp_path / "run" / "plan")
    assert os.listdir(tmp_path / "run") == ["plan"]
    manifests = {
        path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "run" / "plan").glob("*/manifest.json")
    }
    by_step = {one["step"]: one for one in plan["steps"]}
    assert list(by_step) == ["images", "proposals", "mist", "found", "pgt"]
    assert {name: one["rows"] for name, one in by_step.items()} == {
        "images": SCENES, "proposals": SCENES, "mist": 12, "found": SCENES, "pgt": 12,
    }  # fmt: skip
    done = {one["step"]: one for name, one in manifests.items() if one["step"] != "images"}
    assert {name: one["rows"] for name, one in done.items()} == {"proposals": 12, "mist": 6, "found": 12, "pgt": 6}

    assert done["proposals"]["cluster"] == {"nodes": 1, "CPU": 4.0, "GPU": 0.0}

    whole = next(path for path, one in manifests.items() if one["step"] == "images" and one["rows"] == SCENES)
    listed = [path for path in (tmp_path / "run" / "plan" / whole).rglob("*") if path.is_file()]
    assert by_step["images"]["bytes"] == sum(path.stat().st_size for path in listed)
    for name in ("proposals", "found"):
        planned, took = by_step[name], done[name]["seconds"]
        each = planned["pace"]["busy"] + planned["pace"]["waited"]
        assert planned["seconds"]["value"] == pytest.approx(max(took, 12 * each) + (SCENES - 12) * each, rel=0.01)
        (folder,) = (tmp_path / "run" / "plan").glob(f"{name}-*")
        assert sum(batch.rows for actor in read_times(str(folder)) for batch in actor.batches) == 12
        parts = sum((folder / part).stat().st_size for part in tables.list_parts(str(folder)))
        assert 1.5 * parts < planned["bytes"] < 1.5 * parts + 10_000
        assert planned["advice"]["actors"] == 1
    mist = by_step["mist"]
    (folder,) = (tmp_path / "run" / "plan").glob("mist-*")
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 16
    assert sum(row["seconds"] for row in rows) <= rows[-1]["at"] <= done["mist"]["seconds"]
    later = [row["seconds"] for row in rows[9:]]  # from the fourth round on most is remembered
    assert mist["seconds"]["value"] == pytest.approx(done["mist"]["seconds"] + 384 * sum(later) / len(later), rel=0.6)
    assert plan["total"]["seconds"]["value"] == pytest.approx(
        plan["start_seconds"] + sum(one["seconds"]["value"] for one in plan["steps"])
    )
    hours = sum(one["cpus"] * one["seconds"]["value"] / 3600 for one in plan["steps"])
    assert plan["total"]["cost"] == pytest.approx(0.5 * hours, rel=0.01)
    assert [line.split(":")[0] for line in plan["advice"]] == ["proposals", "found"]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    again = CliRunner().invoke(cli.app, [*command, "--json"])
    assert json.loads(again.stdout) == plan
    shown = CliRunner().invoke(cli.app, command)
    assert ["mist", "train_wsod", "12"] in [line.split()[:3] for line in shown.stdout.splitlines()]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def files(**sizes: int) -> list[FileInfo]:
    return [FileInfo("", path, size, None) for path, size in sizes.items()]


def test_tables_grow_with_rows_and_weights_do_not() -> None:
    listed = {
        "part-0a-3.parquet": 100,
        "ground_truth/part-0b-3.parquet": 10,
        "config.json": 7,
        "export/labels/a.txt": 5,
    }
    assert project_bytes(files(**listed), 20.0, 1.0) == 20 * 115 + 7
    trained = {"checkpoint/model.safetensors": 50, "checkpoint/checkpoint_1/state.pt": 90, "times/a.json": 4000}
    assert project_bytes(files(**trained), 20.0, 2.0) == 50 + 180


@pytest.mark.parametrize("backbone", ["frozen_sam", "resnet50"])
@pytest.mark.parametrize("steps", [9, 700, 90_000])
def test_a_shortened_detector_sees_every_image_three_times_in_each_phase(backbone: str, steps: int) -> None:
    config = STAGES["train_detector"].config(
        images="images", pgt="pgt", backbone=backbone, steps=steps, batch_size=8, warmup=20, milestones=[600, 650],
        roi_drop=RoiDropRules("and", start=400),
    )  # fmt: skip
    short = config.shortened(64)
    course = short.course(64)
    parts = parts_of_steps(course)
    seen = [parts[:, 3 * number].sum() / 64 for number in range(len(course.phases))]
    assert short.steps <= steps
    assert len(course.phases) == (2 if backbone == "frozen_sam" else 1)
    assert steps == 9 or min(seen) >= 2.9
    assert short.warmup <= 20
    assert short.roi_drop.start == round(short.steps / steps * 400)
    assert parts[:, -1].sum() == 1


def test_a_shortened_classifier_is_valid_and_validates_more_than_once() -> None:
    config = STAGES["train_classifier"].config(images="images", split="train", backbone="frozen_sam", epochs=60)
    short = config.shortened(64)
    course = short.course(64)
    assert short.epochs < 60
    assert course.held_out == 16
    assert config.model_copy(update={"held_out": 0.0}).shortened(64).course(64).held_out == 0
    assert course.images * 3 <= course.steps * course.batch_size
    assert (parts_of_steps(course)[:, -2] > 0).sum() >= 2
    assert parts_of_steps(course)[:, -1].sum() == 1
    assert config.model_copy(update={"epochs": 2}).shortened(64).epochs == 2


def test_a_pilot_writes_no_export_where_the_run_will_and_fails_for_no_image() -> None:
    config = STAGES["export"].config(images="images", pgt="pgt", format="coco", to="s3://final/place")
    small = _for_pilot("export", config, 64, 64)
    assert (small.to, small.max_failed) == (None, 1.0)
    index = STAGES["index"].config(format="folder", root="data", sample=10)
    assert _for_pilot("index", index, 64, 64).sample == 10


def planned(bottleneck: str, *, actors: int, best: int, speedup: float, limit: int | None = None) -> Plan:
    advice = Advice(bottleneck, actors, best, speedup, limit, 2 * actors, 2.0)
    pace = Pace(0.5, 0.02, 0.0, 0.1, actors) if bottleneck == "actors" else Pace(0.1, 0.9, 0.0, 0.5, actors)
    seconds = Seconds(7210.0, 7000.0, 7400.0)
    step = StepPlan("proposals", "proposals", 5000, seconds, 2.0, 4.0, 1000, pace, 10.0, advice)
    return Plan(5.0, [step], 64, "somewhere")


MORE = "With 4 actors (steps.proposals.resources.max_actors=4) instead of 2: 60 min instead of 2.0 h"


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (planned("actors", actors=2, best=4, speedup=2.0, limit=12), ["busy 96 %", MORE, "from 12 on fetching"]),
        (planned("actors", actors=2, best=2, speedup=1.0), ["the best of this cluster", "a pool of 4: 60 min"]),
        (
            planned("fetching", actors=5, best=2, speedup=1.0),
            ["fetching is the bottleneck: actors wait 90 %", "With 2", "instead of 5"],
        ),
    ],
    ids=["more", "best", "fewer"],
)
def test_what_holds_a_pool_up_is_said_with_the_better_pool(plan: Plan, words: list[str]) -> None:
    (line,) = sentences(plan)
    for word in words:
        assert word in line


def test_money_is_that_of_reserved_gpus_and_processors() -> None:
    plan = planned("actors", actors=2, best=2, speedup=1.0)
    hours = 7210 / 3600
    assert Prices().of(plan.steps) is None
    assert Prices(gpu=2.5).of(plan.steps) == pytest.approx(2.5 * 4 * hours)
    assert as_json_of(plan, Prices(gpu=2.5, cpu=0.1))["total"]["cost"] == pytest.approx(10.2 * hours, rel=1e-3)
    assert as_json_of(plan, Prices())["total"]["gpu_hours"] == pytest.approx(4 * hours, rel=1e-3)


def test_a_pilot_that_stopped_in_a_step_measures_it_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weaksam.plan import pilot

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").write_bytes(b"not opened")
    (tmp_path / "data" / "labels.csv").write_text("file,labels\na.jpg,cat\n")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"run: {tmp_path}/run\nsteps:\n  images: {{stage: index, format: folder, root: {tmp_path}/data}}\n"
    )
    (step,) = pipeline.load(str(config))
    storage.write_bytes(storage.join(step.folder, "part-0123456789abcdef-9.parquet"), b"what was done before")
    monkeypatch.setattr(pilot, "connect", lambda: None)
    pilot._run([step])
    assert (step.manifest() or {})["rows"] == 1
    assert "part-0123456789abcdef-9.parquet" not in os.listdir(step.folder)


def test_pools_of_a_pilot_write_down_their_times_and_those_of_a_run_do_not() -> None:
    config = STAGES["detect"].config(images="images", detector="net")
    assert not config.resources.record_times
    small = _for_pilot("detect", config, 64, 64)
    assert small.resources == PoolResources(record_times=True)
