"""What is judged of a node, and that each fault comes with its fix."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from weaksam.cluster import doctor
from weaksam.execution import connection
from weaksam.stages.proposal_settings import ProposalResources, SamSettings
from weaksam.stages.proposals import ProposalsConfig
from weaksam.stages.train_wsod import TrainWsodConfig


def test_differing_versions_are_named_with_both() -> None:
    here = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.15.0"}
    assert doctor.judge_versions("one", here, here).well
    found = doctor.judge_versions("one", here, {"python": "3.12.1", "ray": "2.60.0"})
    assert not found.well
    assert found.message == "python 3.12.1, driver 3.11.7; torch absent, driver 2.15.0"
    assert "cluster/Dockerfile" in found.fix


def test_storage_is_written_read_and_left_clean(tmp_path: Path) -> None:
    found = doctor.probe_storage("one", str(tmp_path / "run"))
    assert found.well
    assert os.listdir(tmp_path / "run") == []
    (tmp_path / "file").write_text("no folder")
    found = doctor.probe_storage("one", str(tmp_path / "file" / "run"))
    assert not found.well
    assert found.fix


def test_small_shared_memory_is_told_with_its_mend() -> None:
    assert doctor.judge_shared_memory("one", 8e9, 4e9).well
    found = doctor.judge_shared_memory("one", 64 * 2**20, 4e9)
    assert not found.well
    assert "--shm-size" in found.fix


def test_a_gpu_must_hold_the_largest_sam_that_is_used() -> None:
    assert doctor.judge_gpu("one", "A GPU", 80 * 2**30, ["vit_h"]).well
    assert doctor.judge_gpu("one", "A GPU", 8 * 2**30, ["vit_b"]).well
    assert doctor.judge_gpu("one", "A GPU", 1 * 2**30, []).well
    found = doctor.judge_gpu("one", "A GPU", 8 * 2**30, ["vit_b", "vit_h"])
    assert not found.well
    assert "vit_h with 128 prompts" in found.message


def test_weights_of_all_steps_are_looked_at_once(tmp_path: Path) -> None:
    sam = SamSettings(model="vit_b", checkpoint="s3://bucket/sam_vit_b_01ec64.pth")
    settings = [
        ProposalsConfig(images="images", sam=sam),
        ProposalsConfig(images="images", sam=sam),
        ProposalsConfig(images="images", sam=SamSettings(model="vit_xs")),
        TrainWsodConfig(images="images", proposals="p", split="train", weights="s3://bucket/vgg16.pth"),
    ]
    found = doctor.weights_of(settings)
    assert [one["uri"] for one in found] == ["s3://bucket/sam_vit_b_01ec64.pth", None, "s3://bucket/vgg16.pth"]
    assert doctor.check_weights("one", found[1]).well

    cut = tmp_path / "sam_vit_b_01ec64.pth"
    cut.write_bytes(b"half of a download")
    found = doctor.check_weights("one", {"uri": str(cut), "model": "vit_b", "sha256": None})
    assert not found.well
    assert "sam_vit_b_01ec64.pth" in found.message


def test_pools_that_do_not_fit_are_told_once() -> None:
    large = ProposalResources(actor_cpus=16)
    settings = [ProposalsConfig(images="images", sam=SamSettings(model="vit_xs"), resources=large)] * 2
    (found,) = doctor.judge_pools(settings, [{"CPU": 4.0}])
    assert not found.well
    assert "does not fit" in found.message


@pytest.mark.parametrize(
    ("job", "told"),
    [
        (None, {"AWS_ENDPOINT_URL_S3": "http://store"}),
        ({"runtime_env": {"env_vars": {"OTHER": "x"}}}, {"AWS_ENDPOINT_URL_S3": "http://store"}),
        ({"runtime_env": {"env_vars": {"AWS_ENDPOINT_URL_S3": "http://store"}}}, {}),  # Ray refuses to be told twice
    ],
)
def test_workers_of_a_cluster_are_told_the_endpoint_once(job: dict | None, told: dict[str, str]) -> None:
    environment = {"AWS_ENDPOINT_URL_S3": "http://store", "AWS_SECRET_ACCESS_KEY": "secret"}
    if job is not None:
        environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps(job)
    assert connection._variables_of_workers(environment) == told
