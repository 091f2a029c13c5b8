"""Training and proposals see image-level labels of the training split, and nothing else that a person drew or wrote.

And a classifier or detector whose driver or worker is killed ends with the weights of an undisturbed one. One pair of
runs shows both: one is left alone; of the other, ground truth and the labels of the test split are spoiled, and its
trainings are killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file

from testing.processes import actors_of
from tests.execution.test_nodes import wait_for
from tests.execution.test_resume import ROOT, clear_up
from weaksam import pipeline
from weaksam.core import tables
from weaksam.core.step import Step

pytestmark = [pytest.mark.ray, pytest.mark.slow]

XML = """<annotation><filename>{name}</filename><size><width>48</width><height>32</height><depth>3</depth></size>
<object><name>{label}</name><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>30</xmax><ymax>25</ymax></bndbox></object>
</annotation>"""


def write_data(base: Path) -> None:
    """Ten noise images in two splits, with boxes."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 4)):
        (base / "data" / split).mkdir(parents=True)
        for i in range(count):
            path = base / "data" / split / f"{split}{i}.jpg"
            Image.fromarray(noise.integers(0, 255, (32, 48, 3), np.uint8)).save(path)
            path.with_suffix(".xml").write_text(XML.format(name=path.name, label=["cat", "dog"][i % 2]))


def write_run(base: Path, name: str) -> str:
    """A run file from classifier to detectors of boxes and masks."""
    path = base / f"{name}.yaml"
    path.write_text(
        f"run: {base}/{name}\nsteps:\n"
        f"  images: {{stage: index, format: voc_folder, root: {base}/data}}\n"
        "  classifier: {stage: train_classifier, images: images, split: train, backbone: frozen_sam, image_size: 32, "
        "epochs: 12, batch_size: 3, lr: 1.0e-3, precision: fp32, held_out: 0.2, checkpoint_every: 4}\n"
        "  proposals:\n    stage: proposals\n    images: images\n    classifier: classifier\n"
        "    resources: {max_actors: 1}\n    sam: {model: vit_xs}\n    grid: {points_per_side: 3}\n"
        "    peaks: {scales: [1.0], label_threshold: 0.5}\n"
        "  mist: {stage: train_wsod, images: images, proposals: proposals, split: train, backbone: frozen_sam, "
        "dropblock: one_pass, scales: [32, 40], min_side: 4, steps: 45, batch_size: 3, lr: 1.0e-3, warmup: 0, "
        "checkpoint_every: 4, log_every: 2}\n"
        "  found: {stage: detect, images: images, proposals: proposals, detector: mist, scales: [32], "
        "resources: {max_actors: 1}}\n"
        "  pgt: {stage: pgt, images: images, detections: found, split: train}\n"
        "  net: {stage: train_detector, images: images, pgt: pgt, backbone: frozen_sam, scales: [32, 40], "
        "batch_size: 3, steps: 15, lr: 1.0e-3, warmup: 0, milestones: null, checkpoint_every: 4, log_every: 2}\n"
        "  net_found: &found {stage: detect, images: images, detector: net, scales: [32], score_threshold: 0.0, "
        "resources: {max_actors: 1}}\n"
        "  masks: {stage: pseudo_masks, images: images, pgt: pgt, sam: {model: vit_xs}, resources: {max_actors: 1}}\n"
        "  mask_net: {stage: train_detector, images: images, pgt: masks, model: mask_rcnn, backbone: frozen_sam, "
        "scales: [32], batch_size: 3, steps: 4, first_stage: 0.5, lr: 1.0e-3, warmup: 0, milestones: null}\n"
        "  mask_found: {<<: *found, detector: mask_net}\n"
    )
    return str(path)


def spoil(images: Step) -> None:
    """Makes ground truth unreadable and gives the images of the test split the labels of the other class."""
    truth = Path(images.folder, tables.GROUND_TRUTH)
    parts = list(truth.glob("part-*"))
    assert parts
    for part in parts:
        part.write_bytes(b"whoever opens this fails")
    for part in Path(images.folder).glob("part-*.parquet"):
        table = pq.read_table(part)
        rows = zip(table.column("split").to_pylist(), table.column("labels").to_pylist(), strict=True)
        labels = [[1 - one for one in present] if split == "test" else present for split, present in rows]
        place = table.schema.get_field_index("labels")
        pq.write_table(
            table.set_column(place, table.schema.field(place), pa.array(labels, table.schema.types[place])), part
        )


TRAINED = ("classifier", "mist", "net", "mask_net")
KILLED = TRAINED[:3]


@contextmanager
def driver_of(config: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A driver of the run, on a Ray of its own; what is left of both ends with the block."""
    command = [sys.executable, "-c", "from weaksam.cli.main import main; main()", "run", config]
    ray_folder = tempfile.mkdtemp(prefix="ws", dir="/tmp")  # short: sockets live there
    with open(log, "wb") as lines:
        driver = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "RAY_TMPDIR": ray_folder}, stderr=lines, start_new_session=True
        )
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()
        clear_up(ray_folder)


def run_to_the_end(config: str, log: Path) -> dict[str, Step]:
    """Runs the steps in a driver, and returns them."""
    with driver_of(config, log) as driver:
        assert driver.wait(900) == 0, log.read_text()
    return {step.name: step for step in pipeline.load(config)}


def wait_for_checkpoint(step: Step, driver: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when the training of this driver has written a checkpoint."""

    def checkpoints() -> set[Path]:
        return set(Path(step.folder).glob("checkpoint/checkpoint_2*/state.pt"))

    def is_training() -> bool:
        return Path(step.folder).exists() and bool(actors_of(driver.pid, "RayTrainWorker"))

    wait_for(is_training, driver, log, seconds=400)  # until then, what an earlier one wrote last may still appear
    before = checkpoints()
    wait_for(lambda: checkpoints() - before, driver, log, seconds=400)
    assert step.manifest() is None, "the training ended before it was hit"


def kill_trainings(config: str, log: Path) -> None:
    """Kills each training's driver once, and a worker of one."""
    steps = {step.name: step for step in pipeline.load(config)}
    for name in KILLED:
        with driver_of(config, log) as driver:
            if name == "net":  # which goes on where the driver of `mist` was killed
                wait_for_checkpoint(steps["mist"], driver, log)
                os.kill(actors_of(driver.pid, "RayTrainWorker")[0], signal.SIGKILL)
                assert steps["mist"].manifest() is None
            wait_for_checkpoint(steps[name], driver, log)
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            assert steps[name].manifest() is None


@pytest.mark.timeout(2400)
def test_spoiled_truth_and_killed_trainings_change_nothing(tmp_path: Path) -> None:
    """Neither boxes nor labels of the test split reach training or proposals, and no kill changes a weight."""
    log = tmp_path / "log"
    write_data(tmp_path)
    calm = run_to_the_end(write_run(tmp_path, "calm"), log)
    table = calm["proposals"].read()
    assert set(table.column("status").to_pylist()) == {"ok"}
    used = [row["labels"] for row in table.to_pylist() if row["image_id"].startswith("train")]
    assert used == [[0], [1]] * 3  # known
    assert any(len(points) for points in table.column("points").to_pylist())

    config = write_run(tmp_path, "rough")
    images, *_ = pipeline.load(config)
    pipeline.run_steps([images])
    spoil(images)
    kill_trainings(config, log)
    rough = run_to_the_end(config, log)
    assert rough["proposals"].read().equals(table)
    for name in ("found", "pgt", "net_found", "masks", "mask_found"):
        before = calm[name].read()
        assert sum(map(len, before.column("boxes").to_pylist())) > 0
        assert rough[name].read().equals(before)
    for name in TRAINED:
        before, after = (
            load_file(Path(run[name].folder) / "checkpoint" / "model.safetensors") for run in (calm, rough)
        )
        assert all(np.array_equal(value, after[key]) for key, value in before.items())
