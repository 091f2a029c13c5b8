"""Jobs on a real Ray head that read and write a real S3 server: submitted, followed, listed, cancelled, examined."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testing.places import ROOT
from testing.ray_head import RayHead
from testing.s3.server import CephServer, free_port
from weaksam import pipeline
from weaksam.cluster import settings, submit
from weaksam.core import storage
from weaksam.demo.scenes import write_scenes
from weaksam.errors import ConfigError

WEAKSAM = str(Path(sys.executable).parent / "weaksam")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

RUN_FILE = """
run: {bucket}/run
endpoint: {endpoint}
steps:
  images: {{stage: index, format: voc, root: {bucket}/data, splits: [trainval, test]}}
  proposals:
    stage: proposals
    images: images
    sam: {{model: vit_xs}}
    grid: {{points_per_side: 4}}
"""


@pytest.fixture(scope="module")
def head(s3_server: CephServer) -> Iterator[RayHead]:
    """Its nodes have the credentials of the store, as a node's role or secret would give them, and not its address."""
    given = {key: value for key, value in s3_server.environment.items() if "ENDPOINT" not in key}
    head = RayHead(given)
    yield head
    head.stop()


@pytest.fixture
def config(bucket: str, s3_server: CephServer, tmp_path: Path) -> str:
    """A run file on 12 scenes in a bucket."""
    write_scenes(tmp_path / "scenes", images=12, seed=3)
    for path in sorted((tmp_path / "scenes").rglob("*")):
        if path.is_file():
            storage.write_bytes(f"{bucket}/data/{path.relative_to(tmp_path / 'scenes')}", path.read_bytes())
    file = tmp_path / "scenes.yaml"
    file.write_text(RUN_FILE.format(bucket=bucket, endpoint=s3_server.endpoint))
    return str(file)


def call(head: RayHead | None, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command on a machine whose environment does not name the S3 server."""
    own = {key: value for key, value in os.environ.items() if "ENDPOINT" not in key and key != "RAY_ADDRESS"}
    given = {**own, **(head.client | {"RAY_API_SERVER_ADDRESS": head.address} if head else {}), **environment}
    told = subprocess.run([WEAKSAM, *args], capture_output=True, text=True, cwd=ROOT, env=given, timeout=240)
    assert "Traceback" not in told.stderr, told.stderr
    return told


def test_a_job_reads_from_and_writes_to_the_bucket_and_tells_how_it_ended(
    head: RayHead, config: str, bucket: str, s3_server: CephServer
) -> None:
    told = call(head, "submit", config, "--wait")
    assert told.returncode == 0, told.stdout + told.stderr
    job = told.stdout.splitlines()[0]
    assert job.startswith("weaksam-scenes-")
    assert "MiB" in told.stderr
    assert "proposals: 12 rows" in told.stdout

    assert storage.list_folders(f"{bucket}/run")
    status = call(None, "status", f"{bucket}/run", AWS_ENDPOINT_URL_S3=s3_server.endpoint)
    assert [line.split()[:3] for line in status.stdout.splitlines()[1:]] == [
        ["images", "finished", "12"],
        ["proposals", "finished", "12"],
    ]

    listed = json.loads(call(head, "jobs", "--json").stdout)
    (ours,) = [one for one in listed if one["job"] == job]
    assert (ours["state"], ours["exit_code"], ours["run"]) == ("SUCCEEDED", 0, f"{bucket}/run")
    logged = json.loads(call(head, "logs", job, "--json").stdout)
    assert any("proposals: 12 rows" in line for line in logged["log"])
    assert call(head, "cancel", job).stdout == f"{job}: had ended already\n"

    everything = told.stdout + told.stderr + json.dumps(listed) + json.dumps(logged)
    for folder in storage.list_folders(f"{bucket}/run"):
        for name in ("config.json", "manifest.json"):
            everything += json.dumps(storage.read_json(f"{bucket}/run/{folder}/{name}"))
    assert s3_server.secret_key not in everything
    assert s3_server.access_key not in everything

    again = call(head, "submit", config, "--wait")  # the same again finds everything
    assert again.returncode == 0
    assert again.stdout.count("finished, skipped") == 2


def test_the_equal_command_of_ray_does_the_same(head: RayHead, config: str, bucket: str) -> None:
    told = call(head, "submit", config, f"run={bucket}/first", "steps.proposals.grid.points_per_side=2", "--json")
    # Both at once: on four CPUs they would starve each other if their steps did not take turns.
    submitted = json.loads(told.stdout)
    words = shlex.split(submitted["ray"].replace(submitted["job"], "by-hand").replace("/first", "/second"))
    environment = {**os.environ, **head.client}
    ray = str(Path(sys.executable).parent / "ray")
    by_hand = subprocess.run([ray, *words[1:]], capture_output=True, text=True, env=environment, timeout=240)
    assert by_hand.returncode == 0, by_hand.stdout + by_hand.stderr
    assert call(head, "logs", submitted["job"], "--follow").returncode == 0
    assert storage.list_folders(f"{bucket}/first") == storage.list_folders(f"{bucket}/second")


def test_a_job_is_cancelled_and_the_same_command_goes_on(head: RayHead, config: str, bucket: str) -> None:
    submitted = json.loads(call(head, "submit", config, "steps.proposals.grid.points_per_side=24", "--json").stdout)
    job = submitted["job"]
    end = time.monotonic() + 120
    while "proposals: proposals ->" not in call(head, "logs", job).stdout:
        assert time.monotonic() < end
    assert json.loads(call(head, "cancel", job, "--json").stdout)["cancelled"]
    followed = call(head, "logs", job, "--follow")
    assert followed.returncode == 4
    assert "STOPPED" in followed.stderr
    assert not any(storage.exists(f"{bucket}/run/{name}/manifest.json") for name in _proposals(bucket))
    told = call(head, "submit", config, "steps.proposals.grid.points_per_side=24", "--wait")
    assert told.returncode == 0
    assert "images: finished, skipped" in told.stdout
    assert any(storage.exists(f"{bucket}/run/{name}/manifest.json") for name in _proposals(bucket))


def _proposals(bucket: str) -> list[str]:
    return [name for name in storage.list_folders(f"{bucket}/run") if name.startswith("proposals")]


def test_exit_codes_say_whose_turn_it_is(head: RayHead, config: str, bucket: str, tmp_path: Path) -> None:
    told = call(head, "submit", config, "steps.proposals.grid.points_per_sid=4", "--wait")
    assert told.returncode == 2  # before anything is sent
    assert "did you mean 'points_per_side'?" in told.stderr
    assert call(head, "logs", "weaksam-no-such-job").returncode == 2

    storage.write_bytes(f"{bucket}/data/VOC2007/JPEGImages/000001.jpg", b"no picture")
    told = call(head, "submit", config, f"run={bucket}/broken", "steps.proposals.max_failed=0", "--wait")
    assert told.returncode == 3, told.stdout + told.stderr
    assert "max_failed" in told.stdout

    nobody = f"http://127.0.0.1:{free_port()}"
    told = call(None, "jobs", "--address", nobody)
    assert told.returncode == 4
    assert "no cluster answers" in told.stderr
    wrong = tmp_path / "token"
    wrong.write_text("f" * 64)
    told = call(head, "jobs", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert told.returncode == 4
    assert "RAY_AUTH_TOKEN" in told.stderr


def test_doctor_examines_the_nodes_from_inside(head: RayHead, config: str, bucket: str, tmp_path: Path) -> None:
    told = call(head, "doctor", config)
    assert told.returncode == 0, told.stdout + told.stderr
    for check in ("versions", "storage", "weights", "shared memory", "pool"):
        assert check in told.stdout
    assert "BAD" not in told.stdout

    weights = f"{bucket}/models/sam_vit_b_01ec64.pth"
    storage.write_bytes(weights, b"half of a download")
    sam = ["steps.proposals.sam.model=vit_b", f"steps.proposals.sam.checkpoint={weights}"]
    told = call(
        head, "doctor", config, *sam, "run=s3://no-such-bucket-of-ours/run", "steps.proposals.resources.actor_cpus=99"
    )
    assert told.returncode == 4
    bad = {line.split()[2] for line in told.stdout.splitlines() if line.startswith("BAD")}
    assert bad == {"storage", "weights", "pool"}
    assert told.stdout.count(" -> ") == 3


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("env: {AWS_SECRET_ACCESS_KEY: x}", "env.AWS_SECRET_ACCESS_KEY: looks like a credential"),
        ("pass_env: [HF_TOKEN]", "pass_env.HF_TOKEN: looks like a credential"),
        ("env: {DATABASE_URL: 'postgresql://me:word@host/db'}", "env.DATABASE_URL: looks like a credential"),
        ("address: http://me:word@head:8265", "address: holds credentials"),
        ("address: 127.0.0.1", "address: must be the URL of a dashboard"),
        ("pools: {max_actor: 8}", "pools.max_actor: unknown key: did you mean 'max_actors'?"),
        ("pools: {grow: true}", "grow needs max_actors and actor_gpus"),
        ("adress: http://x", "did you mean 'address'?"),
    ],
)
def test_faults_of_a_cluster_file_are_told_by_key(text: str, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        settings.load_cluster(str(file), None)
    assert fault in str(caught.value)


def test_what_everybody_on_the_cluster_could_read_holds_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("addressing: virtual\n" + RUN_FILE.format(bucket="s3://bucket", endpoint="http://127.0.0.1:1"))
    cluster = settings.ClusterSettings()
    weights = (
        "steps.proposals.sam.model=vit_b",
        "steps.proposals.sam.checkpoint=https://host/sam.pth?X-Amz-Signature=hid",
    )
    with submit.staged() as folder, pytest.raises(ConfigError, match=r"sam\.checkpoint: holds a URL with a") as caught:
        submit.plan_job(pipeline.parse(str(file), weights), cluster, folder)
    assert "hid" not in str(caught.value)
    with submit.staged() as folder:
        job = submit.plan_job(pipeline.parse(str(file)), cluster, folder)
    assert job.runtime_env["env_vars"]["AWS_S3_ADDRESSING_STYLE"] == "virtual"


def test_a_cluster_sets_resources_by_kind_of_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("REGION_OF_TEST", "somewhere")
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        "address: http://head:8265\nsend_code: false\npass_env: [REGION_OF_TEST, ABSENT]\n"
        "pools: {max_actors: 8, actor_gpus: 1}\ntrainings: {grow: true}\n"
    )
    file = tmp_path / "run.yaml"
    classifier = "  classifier: {stage: train_classifier, images: images, split: train, resources: {workers: 2}}\n"
    hygiene = "  hygiene: {stage: hygiene, images: images}\n"  # has no use for a GPU
    file.write_text(RUN_FILE.format(bucket="s3://bucket", endpoint="http://127.0.0.1:1") + classifier + hygiene)
    run_file = pipeline.parse(str(file), ["steps.images.splits=[test]"])
    with submit.staged() as folder:
        job = submit.plan_job(run_file, settings.load_cluster(str(cluster), None), folder)
        assert os.listdir(folder) == ["run.yaml"]
    assert job.address == "http://head:8265"
    given = "steps.proposals.resources.max_actors=8 steps.proposals.resources.actor_gpus=1.0 "
    given += "steps.classifier.resources.grow=true steps.hygiene.resources.max_actors=8 'steps.images.splits=[test]'"
    assert job.entrypoint == f"python -m jobs.pipeline run.yaml {given}"
    assert "py_modules" not in job.runtime_env
    assert job.runtime_env["env_vars"]["REGION_OF_TEST"] == "somewhere"
    assert job.runtime_env["env_vars"]["AWS_ENDPOINT_URL_S3"] == "http://127.0.0.1:1"
    assert "ABSENT" not in job.runtime_env["env_vars"]
