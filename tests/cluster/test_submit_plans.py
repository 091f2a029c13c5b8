"""What is submitted, and what becomes of a job, without a cluster."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from weaksam import pipeline
from weaksam.cluster import jobs, submit
from weaksam.cluster.settings import ClusterSettings
from weaksam.errors import ClusterError, ConfigError

RUN_FILE = """
run: s3://bucket/run
steps:
  images: {stage: index, format: folder, root: photos}
  proposals: {stage: proposals, images: images, sam: {model: vit_b, checkpoint: weights/sam_vit_b_01ec64.pth}}
  more: {stage: index, format: folder, root: s3://bucket/more}
"""


def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, address: str) -> submit.Job:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN_FILE)
    with submit.staged() as folder:
        return submit.plan_job(pipeline.parse("run.yaml", overrides), ClusterSettings(address=address), folder)


def test_places_of_this_machine_are_absolute_in_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "weaksam"):
        job = plan(tmp_path, monkeypatch, address="http://head:8265")
    assert job.overrides == [
        f'steps.images.root="{tmp_path}/photos"',
        f'steps.proposals.sam.checkpoint="{tmp_path}/weights/sam_vit_b_01ec64.pth"',
    ]
    assert caplog.text.count("every node of the cluster must see this") == 2


def test_absolute_places_are_sent_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = [f"steps.images.root={tmp_path}/a", f"steps.proposals.sam.checkpoint={tmp_path}/b.pth"]
    job = plan(tmp_path, monkeypatch, *overrides, address="http://127.0.0.1:8265")
    assert job.overrides == overrides
    assert caplog.text == ""


class LostJob(jobs.Cluster):
    """A cluster whose head is replaced after some answers."""

    def __init__(self, answers: int) -> None:
        self.address, self.answers = "http://head:8265", answers

    def job(self, job_id: str) -> dict[str, Any]:
        self.answers -= 1
        if self.answers < 0:
            raise jobs.NoJobError(f"{self.address}: there is no job {job_id!r}: `weaksam jobs` lists them")
        return {"state": "RUNNING"}

    def log(self, job_id: str) -> str:
        return "works\n"


@pytest.mark.parametrize(("answers", "is_known"), [(0, True), (1, False)])
def test_a_job_that_the_cluster_has_lost_can_be_submitted_again(
    answers: int, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.0)
    with pytest.raises(ClusterError, match=r"knows job a no more: its head was replaced.*submit the same again"):
        LostJob(answers).follow("a", lambda text: None, is_known=is_known)


def test_a_job_that_never_was_is_a_fault_of_the_command() -> None:
    with pytest.raises(ConfigError, match="there is no job 'a'"):
        LostJob(0).follow("a", lambda text: None)
