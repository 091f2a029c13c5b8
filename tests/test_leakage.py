"""Training and proposals see image-level labels of the training split, and nothing else that a person drew or wrote.

And a classifier or detector whose driver or worker is killed ends with the weights of an undisturbed one.
"""

from __future__ import annotations

import os
import shutil
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


def write_run(base: Path, *, epochs: int = 1, steps: int = 3) -> str:
    """A run file from classifier to detectors of boxes and masks on ten noise images in two splits, with boxes."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 4)):
        (base / "data" / split).mkdir(parents=True)
        for i in range(count):
            path = base / "data" / split / f"{split}{i}.jpg"
            Image.fromarray(noise.integers(0, 255, (32, 48, 3), np.uint8)).save(path)
            path.with_suffix(".xml").write_text(XML.format(name=path.name, label=["cat", "dog"][i % 2]))
    path = base / "run.yaml"
    path.write_text(
        f"run: {base}/run\nsteps:\n"
        f"  images: {{stage: index, format: voc_folder, root: {base}/data}}\n"
        "  classifier: {stage: train_classifier, images: images, split: train, backbone: frozen_sam, image_size: 32, "
        f"epochs: {epochs}, batch_size: 3, lr: 1.0e-3, precision: fp32, held_out: 0.2, checkpoint_every: 4}}\n"
        "  proposals:\n    stage: proposals\n    images: images\n    classifier: classifier\n"
        "    resources: {max_actors: 1}\n    sam: {model: vit_xs}\n    grid: {points_per_side: 3}\n"
        "    peaks: {scales: [1.0], label_threshold: 0.5}\n"
        "  mist: {stage: train_wsod, images: images, proposals: proposals, split: train, backbone: frozen_sam, "
        f"dropblock: one_pass, scales: [32, 40], min_side: 4, steps: {steps}, batch_size: 3, lr: 1.0e-3, warmup: 0, "
        "checkpoint_every: 4, log_every: 2}\n"
        "  found: {stage: detect, images: images, proposals: proposals, detector: mist, scales: [32], "
        "resources: {max_actors: 1}}\n"
        "  pgt: {stage: pgt, images: images, detections: found, split: train}\n"
        "  net: {stage: train_detector, images: images, pgt: pgt, backbone: frozen_sam, scales: [32, 40], "
        f"batch_size: 3, steps: {max(steps // 3, 3)}, lr: 1.0e-3, warmup: 0, milestones: null, checkpoint_every: 4, "
        "log_every: 2}\n"
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


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_cluster")
def test_neither_boxes_nor_labels_of_the_test_split_reach_training_or_proposals(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    steps = pipeline.load(config)
    pipeline.run_steps(steps)
    images, classifier, proposals, mist, found, pgt, net, net_found, masks, mask_net, mask_found = steps
    made = (found, pgt, net_found, masks, mask_found)
    read = {step.name: step.read() for step in made}
    assert all(sum(map(len, one.column("boxes").to_pylist())) > 0 for one in read.values())
    table = proposals.read()
    assert set(table.column("status").to_pylist()) == {"ok"}
    used = [row["labels"] for row in table.to_pylist() if row["image_id"].startswith("train")]
    assert used == [[0], [1]] * 3  # known
    assert any(len(points) for points in table.column("points").to_pylist())
    trained = (classifier, mist, net, mask_net)
    weights = [load_file(Path(step.folder) / "checkpoint" / "model.safetensors") for step in trained]

    for step in steps[1:]:
        shutil.rmtree(step.folder)
    spoil(images)
    pipeline.run_steps(pipeline.load(config))
    assert proposals.read().equals(table)
    for step in made:
        assert step.read().equals(read[step.name])
    for before, step in zip(weights, trained, strict=True):
        again = load_file(Path(step.folder) / "checkpoint" / "model.safetensors")
        assert all(np.array_equal(value, again[key]) for key, value in before.items())


TRAINED = ("classifier", "mist", "net")
STEPS = ("images", "classifier", "proposals", "mist", "found", "pgt", "net")


@contextmanager
def driver_of(config: str, run: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A driver of the steps up to `net`, on a Ray of its own; what is left of both ends with the block."""
    only = [part for step in STEPS for part in ("--only", step)]
    command = [sys.executable, "-c", "from weaksam.cli.main import main; main()", "run", config, f"run={run}", *only]
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


def wait_for_checkpoint(run: Path, step: str, driver: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when the training of this driver has written a checkpoint."""

    def checkpoints() -> set[Path]:
        return set(run.glob(f"{step}-*/checkpoint/checkpoint_2*/state.pt"))

    # until there is a worker, what an earlier one wrote last may still appear
    wait_for(lambda: list(run.glob(f"{step}-*")) and actors_of(driver.pid, "RayTrainWorker"), driver, log, seconds=400)
    before = checkpoints()
    wait_for(lambda: checkpoints() - before, driver, log, seconds=400)


def check_unfinished(run: Path, step: str) -> None:
    assert not list(run.glob(f"{step}-*/manifest.json")), "the training ended before it was hit"


@pytest.mark.timeout(1500)
def test_trainings_that_are_killed_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Each training's driver is killed once, and a worker of one."""
    config = write_run(tmp_path, epochs=12, steps=45)
    calm, rough, log = (tmp_path / name for name in ("calm", "rough", "log"))
    with driver_of(config, calm, log) as driver:
        assert driver.wait(500) == 0, log.read_text()
    for step in TRAINED:
        with driver_of(config, rough, log) as driver:
            if step == "net":  # which goes on where the driver of `mist` was killed
                wait_for_checkpoint(rough, "mist", driver, log)
                os.kill(actors_of(driver.pid, "RayTrainWorker")[0], signal.SIGKILL)
                check_unfinished(rough, "mist")
            wait_for_checkpoint(rough, step, driver, log)
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            check_unfinished(rough, step)
    with driver_of(config, rough, log) as driver:
        assert driver.wait(400) == 0, log.read_text()
    for step in TRAINED:
        found = [load_file(next(run.glob(f"{step}-*/checkpoint/model.safetensors"))) for run in (calm, rough)]
        assert all(np.array_equal(value, found[1][key]) for key, value in found[0].items())
