"""Interrupted runs: whatever is killed and whenever, the same command again ends with the table of a calm run.

And a run that nobody disturbs never looks at ground truth.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from testing.places import ROOT
from testing.processes import actors_of
from tests.execution import resume_child
from tests.execution.pixel import PIXEL
from weaksam import pipeline
from weaksam.core import storage, tables
from weaksam.core.step import Step
from weaksam.execution.mapping import map_batch
from weaksam.execution.rows import Fetch
from weaksam.pipeline import run_file
from weaksam.sam.build import build_sam

IMAGES = 120

pytestmark = [pytest.mark.ray, pytest.mark.slow]


class Run:
    """A run file on small files, and the driver processes that work on it."""

    def __init__(self, base: Path, ray_folder: str) -> None:
        self.base = base
        self.ray_folder = ray_folder
        self.config = str(base / "run.yaml")
        data = base / "data"
        data.mkdir()
        for index in range(IMAGES):
            (data / f"{index:03}.jpg").write_bytes(PIXEL + bytes(range(index % 250)) * 2)
        lines = [f"{index:03}.jpg,cat" for index in range(IMAGES)]
        (data / "labels.csv").write_text("\n".join(["file,labels", *lines]) + "\n")
        (data / "007.jpg").write_bytes(PIXEL)
        Path(self.config).write_text(
            f"run: {base}/run\nsteps:\n"
            f"  images: {{stage: index, format: folder, root: {data}}}\n"
            "  sums: {stage: measure, images: images}\n"
        )
        self.drivers: list[subprocess.Popen[str]] = []

    def start(self, *, seconds: float = 0.03) -> subprocess.Popen[str]:
        """A driver, working on its own Ray, that takes so long for each image."""
        log = str(self._log(len(self.drivers)))
        own = {"RESUME_CHILD_LOG": log, "RESUME_CHILD_SECONDS": str(seconds), "TMPDIR": self.ray_folder}
        environment = {**os.environ, **own}
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.execution.resume_child", self.config],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.drivers.append(driver)
        return driver

    def _log(self, driver: int) -> Path:
        return self.base / f"log-{driver}"

    def calls(self) -> list[str]:
        """Images that the mappers of the last driver worked on."""
        log = self._log(len(self.drivers) - 1)
        return log.read_text().split() if log.exists() else []

    def step(self) -> Step:
        return pipeline.load(self.config)[-1]

    def done(self) -> set[str]:
        return {image_id for ids in tables.done_ids(self.step().folder).values() for image_id in ids}

    def wait_for(self, reached: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
        end = time.monotonic() + 120
        while not reached():
            assert driver.poll() is None, f"ended too early: {driver.communicate()[1]}"
            assert time.monotonic() < end, "no progress in 120 s"
            time.sleep(0.02)

    def interrupt(self, how: signal.Signals, *, after_rows: int, later: float = 0.0) -> tuple[int, str, set[str]]:
        """Starts a driver, sends it a signal once that many rows more are there; its exit code, words, rows done."""
        wanted = len(self.done()) + after_rows
        driver = self.start(seconds=0.1)  # what is left must take longer than a signal
        self.wait_for(lambda: len(self.done()) >= wanted, driver)
        time.sleep(later)
        done = self.done()
        driver.send_signal(how)
        told = driver.communicate(timeout=60)[1]
        assert self.step().manifest() is None, "the run ended before it was hit"
        return driver.returncode, told, done

    def finish(self, driver: subprocess.Popen[str]) -> str:
        told = driver.communicate(timeout=180)[1]
        assert driver.returncode == 0, told
        return told

    def rows(self) -> list[dict]:
        return self.step().read().to_pylist()

    def calm_rows(self) -> list[dict]:
        """What the table must be: the mapper on all images, without Ray."""
        images = pipeline.load(self.config)[0].read(["uri"]).select(["image_id", "uri"])
        mapper, schema = resume_child.AddBytes("", 0.0), resume_child.SCHEMA
        return map_batch(mapper, Fetch()(images), schema=schema, max_pixels=1).sort_by("image_id").to_pylist()


def clear_up(ray_folder: str) -> None:
    """Ends what drivers killed while Ray started could not end, and removes its folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if ray_folder.encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue  # it is gone
    shutil.rmtree(ray_folder, ignore_errors=True)


@pytest.fixture
def a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setattr(run_file, "STAGES", {**run_file.STAGES, "measure": resume_child.MEASURE})
    ray_folder = tempfile.mkdtemp(prefix="ws", dir="/tmp")  # short: sockets live there
    run = Run(tmp_path, ray_folder)
    yield run
    for driver in run.drivers:
        if driver.poll() is None:
            driver.kill()
            driver.wait()
    clear_up(ray_folder)


@pytest.mark.timeout(900)
def test_whatever_is_killed_the_same_command_again_gives_the_calm_table(a_run: Run) -> None:
    code, _, _ = a_run.interrupt(signal.SIGKILL, after_rows=0, later=1.0)  # while it starts
    assert code == -signal.SIGKILL

    code, _, done = a_run.interrupt(signal.SIGKILL, after_rows=1, later=0.2)  # while parts are written
    assert code == -signal.SIGKILL
    folder = Path(a_run.step().folder)
    (folder / ".part-0123456789abcdef-64.parquet.0.tmp").write_bytes(b"PAR1 and then the disk was full")
    (folder / "part-of-nothing").mkdir()

    code, told, done_later = a_run.interrupt(signal.SIGTERM, after_rows=1, later=0.3)
    assert code != 0
    assert "Traceback" not in told
    assert not done & set(a_run.calls()), "rows that were there were computed again"
    assert done <= done_later

    driver = a_run.start()
    a_run.wait_for(lambda: bool(a_run.calls()), driver)
    actors = actors_of(driver.pid)
    assert actors
    os.kill(actors[0], signal.SIGKILL)
    assert "sums: 120 rows" in a_run.finish(driver)
    assert not done_later & set(a_run.calls())

    manifest = a_run.step().manifest()
    assert manifest is not None
    assert (manifest["rows"], manifest["failed"]) == (IMAGES, 0)
    assert a_run.rows() == a_run.calm_rows()
    assert len({row["image_id"] for row in a_run.rows()}) == IMAGES


@pytest.mark.timeout(900)
def test_two_drivers_at_once_give_every_id_once_and_ctrl_c_ends_one_politely(a_run: Run) -> None:
    for driver in [a_run.start(), a_run.start()]:
        a_run.finish(driver)
    assert a_run.rows() == a_run.calm_rows()

    storage.local_path(a_run.step().manifest_uri).unlink()
    for part in tables.list_parts(a_run.step().folder):
        storage.local_path(storage.join(a_run.step().folder, part)).unlink()
    code, told, _ = a_run.interrupt(signal.SIGINT, after_rows=1)
    assert code == 130
    assert "interrupted: the same command goes on from here" in told
    assert "Traceback" not in told


XML = """<annotation><filename>{name}</filename><size><width>48</width><height>32</height><depth>3</depth></size>
<object><name>cat</name><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>30</xmax><ymax>25</ymax></bndbox></object></annotation>
"""


@pytest.fixture
def labelled(tmp_path: Path) -> str:
    """A run file of proposals by a tiny random SAM on four noise images that have boxes."""
    (tmp_path / "data" / "train").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for name in "abcd":
        pixels = noise.integers(0, 255, (32, 48, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "train" / f"{name}.jpg")
        (tmp_path / "data" / "train" / f"{name}.xml").write_text(XML.format(name=f"{name}.jpg"))
    torch.manual_seed(0)
    save_file(build_sam("vit_xs").state_dict(), tmp_path / "random.safetensors")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run: {tmp_path}/run\nsteps:\n"
        f"  images: {{stage: index, format: voc_folder, root: {tmp_path}/data}}\n"
        "  proposals:\n    stage: proposals\n    images: images\n    resources: {max_actors: 1}\n"
        f"    sam: {{model: vit_xs, checkpoint: {tmp_path}/random.safetensors}}\n"
        "    grid: {points_per_side: 3, pred_iou_threshold: 0.0, stability_threshold: 0.0}\n"
    )
    return str(path)


@pytest.mark.usefixtures("ray_cluster")
def test_proposals_never_look_at_ground_truth_and_a_lost_manifest_costs_nothing(labelled: str) -> None:
    images, proposals = pipeline.load(labelled)
    pipeline.run_steps([images, proposals])
    table = proposals.read()
    assert table.column("status").to_pylist() == ["ok"] * 4
    assert all(len(boxes) for boxes in table.column("boxes").to_pylist())

    truth = Path(images.folder, tables.GROUND_TRUTH)
    assert len(list(truth.iterdir())) == 1
    shutil.rmtree(truth)
    truth.mkdir()
    (truth / "part-0-4.parquet").write_bytes(b"garbage")
    shutil.rmtree(proposals.folder)
    pipeline.run_steps(pipeline.load(labelled))
    assert proposals.read().equals(table)

    Path(proposals.folder, "manifest.json").unlink()  # as if killed between the last part and the manifest
    parts = {path: path.stat().st_mtime_ns for path in Path(proposals.folder).glob("part-*")}
    pipeline.run_steps(pipeline.load(labelled))
    manifest = proposals.manifest()
    assert manifest is not None
    assert (manifest["rows"], manifest["rows_computed"]) == (4, 0)
    assert {path: path.stat().st_mtime_ns for path in Path(proposals.folder).glob("part-*")} == parts
