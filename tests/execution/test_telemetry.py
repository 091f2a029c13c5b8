"""Numbers of a job on Ray's metrics port, and nothing at all where there is no Ray."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from tests.execution.pixel import PIXEL
from tests.stages.conftest import weights  # noqa: F401  (a fixture)
from tests.stages.test_proposals import jpeg
from weaksam import pipeline
from weaksam.core import schemas
from weaksam.execution import telemetry
from weaksam.execution.mapping import ImageMapper, Row
from weaksam.execution.rows import Worker, WorkerSpec
from weaksam.sam.build import build_sam
from weaksam.sam.engine import SamEngine
from weaksam.stages.sam_actor import SamWatch

IMAGES = 9


def on_the_metrics_ports() -> dict[str, float]:
    """Every weaksam series of the cluster, as `name{step,stage}`, summed over its processes; buckets left out."""
    import ray

    found: dict[str, float] = defaultdict(float)
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for line in urllib.request.urlopen(url, timeout=10).read().decode().splitlines():
            if line.startswith("ray_weaksam") and "_bucket{" not in line:
                name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()  # type: ignore[union-attr]
                tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
                found[f"{name}{{{tags['step']},{tags['stage']}}}"] += float(value)
    return found


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_proposals_step_is_on_the_metrics_port_with_the_right_numbers(tmp_path: Path, weights: Path) -> None:  # noqa: F811
    data = tmp_path / "data"
    data.mkdir()
    names = [f"{index}.jpg" for index in range(IMAGES)]
    for name in names:
        (data / name).write_bytes(jpeg(40, 60))
    (data / "3.jpg").write_bytes(b"no picture")
    (data / "labels.csv").write_text("file,labels\n" + "".join(f"{name},cat\n" for name in names))
    (tmp_path / "run.yaml").write_text(
        f"run: {tmp_path}/run\nsteps:\n  images: {{stage: index, format: folder, root: {data}}}\n"
        f"  watched: {{stage: proposals, images: images, sam: {{model: vit_xs, checkpoint: {weights}}},\n"
        "    grid: {points_per_side: 3, pred_iou_threshold: 0.0, stability_threshold: 0.0},\n"
        "    max_failed: 1.0, resources: {max_actors: 1, batch_size: 2}}\n"
    )
    steps = pipeline.load(str(tmp_path / "run.yaml"))
    pipeline.run_steps(steps)
    boxes = sum(len(row or []) for row in steps[-1].read(["boxes"]).column("boxes").to_pylist())
    wanted = {
        "ray_weaksam_images_done_total": IMAGES - 1,
        "ray_weaksam_images_failed_total": 1,
        "ray_weaksam_prompts_total": (IMAGES - 1) * 9,
        "ray_weaksam_boxes_kept_total": boxes,
        "ray_weaksam_encoder_seconds_count": IMAGES - 1,
        "ray_weaksam_decoder_seconds_count": IMAGES - 1,
    }
    end, found = time.monotonic() + 60, {}
    while time.monotonic() < end and not all(f"{name}{{watched,proposals}}" in found for name in wanted):
        time.sleep(1)
        found = on_the_metrics_ports()
    ours = {key.removesuffix("{watched,proposals}"): value for key, value in found.items() if "{watched," in key}
    assert {name: ours.get(name) for name in wanted} == wanted
    assert ours["ray_weaksam_encoder_seconds_sum"] > 0
    assert ours["ray_weaksam_wait_seconds_count"] >= 1
    assert set(ours) <= set(telemetry.SERIES)


def test_where_there_is_no_ray_nothing_is_counted_and_ray_is_not_loaded() -> None:
    check = (
        "import sys; from weaksam.execution import telemetry\n"
        "telemetry.count('weaksam_prompts', 3); telemetry.observe('weaksam_wait_seconds', lambda: 1 / 0)\n"
        "print('ray' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert told.stdout == "False\n"


def test_a_fault_of_a_metric_stays_with_the_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))  # type: ignore[arg-type]
    monkeypatch.setattr(telemetry, "_make", lambda name: None)
    telemetry.count("weaksam_prompts")
    telemetry.observe("weaksam_wait_seconds", lambda: 1 / 0)


def test_the_series_are_named_as_prometheus_knows_them() -> None:
    assert "ray_weaksam_images_done_total" in telemetry.SERIES
    assert "ray_weaksam_encoder_seconds_bucket" in telemetry.SERIES
    series = len(telemetry.COUNTERS) + 3 * len(telemetry.HISTOGRAMS)
    assert len(set(telemetry.SERIES)) == len(telemetry.SERIES) == series


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """What is told, by name, instead of telling it."""
    values: dict[str, list[float]] = defaultdict(list)
    monkeypatch.setattr(
        telemetry, "_record", lambda name, value: values[name].append(value() if callable(value) else value)
    )
    return values


def test_a_worker_tells_of_rows_and_of_waiting_but_not_before_its_first_batch(told: dict[str, list[float]]) -> None:
    class Half(ImageMapper):
        def make(self, image: np.ndarray, row: Row, prepared: object) -> Row:
            return {}

    worker = Worker(WorkerSpec(Half, schemas.HYGIENE, max_pixels=1, step="s", stage="t"))
    states = {"status": ["ok", "crash", "ok"], "message": ["", "why", ""]}
    for _ in range(2):
        worker(pa.table({"image_id": ["a", "b", "c"], "data": [PIXEL, None, PIXEL], **states}))
    assert told.pop("weaksam_wait_seconds")[0] < 1
    assert told == {"weaksam_images_done": [2, 2], "weaksam_images_failed": [1, 1]}
    assert telemetry._tags == {"step": "s", "stage": "t"}


def test_of_an_image_that_fails_on_the_way_only_what_was_done_is_told(told: dict[str, list[float]]) -> None:
    watch = SamWatch(SamEngine(build_sam("vit_xs")))
    watched = watch.encode(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="on the way"), watch.decoding(watched):  # noqa: PT012
        watch.engine.prompts_decoded += 5
        watch.engine._backoffs += 2
        raise ValueError("on the way")
    assert len(told.pop("weaksam_encoder_seconds")) == 1
    assert told == {"weaksam_prompts": [5], "weaksam_oom_backoffs": [2]}
