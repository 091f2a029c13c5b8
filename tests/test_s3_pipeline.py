"""The pipeline from bucket to bucket through the faulty proxy: what a local folder gets, and all of it told later."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors.torch import load

from testing.s3.proxy import Faults, FaultyProxy
from testing.s3.server import CephServer
from testing.s3.world import write_scenes_small
from tests.execution.test_resume import ROOT, clear_up
from weaksam import pipeline
from weaksam.core import storage

IMAGES = 24
CONFIG = """
run: {root}/runs/x
steps:
  images: {{stage: index, format: folder, root: {root}/data}}
  proposals: {{stage: proposals, images: images, sam: {{model: vit_xs}}, grid: {{points_per_side: 3}}, masks: true}}
  mist: {{stage: train_wsod, images: images, proposals: proposals, split: train, backbone: frozen_sam, dropblock: "off",
    scales: [48], min_side: 4, steps: 12, batch_size: 4, lr: 1.0e-3, warmup: 0, checkpoint_every: 2, log_every: 4}}
  found: {{stage: detect, images: images, proposals: proposals, detector: mist, scales: [48], flip: false}}
  coco: {{stage: export, images: images, detections: found, format: coco_results}}
"""


def weaksam(*arguments: str, environment: dict[str, str]) -> str:
    """What a command says; it must succeed."""
    command = [sys.executable, "-c", "from weaksam.cli.main import main; main()", *arguments]
    ray_folder = tempfile.mkdtemp(prefix="ws", dir="/tmp")  # short: sockets live there
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**environment, "RAY_TMPDIR": ray_folder},
            capture_output=True,
            text=True,
            timeout=280,
        )
    finally:
        clear_up(ray_folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_run(root: str, path: Path) -> str:
    write_scenes_small(f"{root}/data", IMAGES, seed=3)
    path.write_text(CONFIG.format(root=root))
    return str(path)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_from_bucket_to_bucket_through_faults_is_what_a_folder_gets(
    bucket: str, s3_server: CephServer, tmp_path: Path
) -> None:
    local = write_run(str(tmp_path), tmp_path / "local.yaml")
    remote = write_run(bucket, tmp_path / "remote.yaml")
    weaksam("run", local, environment=dict(os.environ))
    proxy = FaultyProxy(tmp_path / "proxy", s3_server.port, Faults())
    proxy.start()
    through_faults = {**os.environ, "AWS_ENDPOINT_URL_S3": proxy.endpoint}
    try:
        weaksam("run", remote, environment=through_faults)
        told = weaksam("status", f"{bucket}/runs/x", environment=through_faults)
        report = weaksam("report", f"{bucket}/runs/x", "--images", "2", environment=through_faults).strip()
    finally:
        proxy.stop()

    assert [line.split()[:3] for line in told.splitlines()[1:6]] == [
        [name, "finished", str(IMAGES)] for name in ("images", "proposals", "mist", "found", "coco")
    ]
    page = storage.read_bytes(report).decode()
    assert report == f"{bucket}/runs/x/report.html"
    assert "data:image/jpeg" in page
    assert 'data-step="found"' in page
    images, proposals, mist, found, coco = zip(pipeline.load(local), pipeline.load(remote), strict=True)
    for one, other in (proposals, found):
        assert one.read().equals(other.read())
    one, other = (step.read() for step in images)
    assert one.drop_columns("uri").equals(other.drop_columns("uri"))
    assert all(uri.startswith(bucket) for uri in other.column("uri").to_pylist())
    weights = [load(storage.read_bytes(storage.join(step.folder, "checkpoint", "model.safetensors"))) for step in mist]
    assert all(value.equal(weights[1][key]) for key, value in weights[0].items())
    exported = [storage.list_files(storage.join(step.folder, "export")) for step in coco]
    assert [file.path for file in exported[0]] == [file.path for file in exported[1]] != []
    for one, other in zip(*exported, strict=True):
        told = storage.read_bytes(one.uri).replace(coco[0].fingerprint.encode(), coco[1].fingerprint.encode())
        assert told == storage.read_bytes(other.uri)
