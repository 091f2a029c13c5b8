"""Each exit code of a command, provoked: the cause decides, and the page that explains them lists them all."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.test_docs_texts import TROUBLE
from weaksam.cli.main import app
from weaksam.core.config import StageConfig
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import (
    ClusterError,
    ConfigError,
    DataError,
    DivergedError,
    StageError,
    StorageError,
    TaskError,
    WeightsError,
)
from weaksam.pipeline import run_file


class NothingConfig(StageConfig):
    """Does nothing."""


def raises(error: BaseException) -> Callable[[Step], Outcome]:
    def run(step: Step) -> Outcome:
        raise error

    return run


ENDS: list[tuple[int, Callable[[Step], Outcome]]] = [
    (0, lambda step: Outcome(rows=1000, failed=1)),
    (1, raises(KeyError("a bug"))),
    (1, raises(TaskError("loss: RuntimeError: a bug"))),
    (2, raises(ConfigError("the run file is wrong"))),
    (2, raises(DataError("the data are wrong"))),
    (2, raises(WeightsError("the weights are wrong"))),
    (2, raises(DivergedError("step 3: the loss is nan"))),
    (3, lambda step: Outcome(rows=1000, failed=2, failures=["a: unreadable: empty"])),
    (4, raises(StorageError("the bucket does not answer"))),
    (4, raises(ClusterError("the cluster is gone"))),
    (4, raises(StageError("workers were lost"))),
    (130, raises(KeyboardInterrupt())),
]


@pytest.mark.parametrize(("code", "run"), ENDS)
def test_the_cause_decides_the_exit_code(
    code: int, run: Callable[[Step], Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage("nothing", 1, NothingConfig, run, writes="nothing")
    monkeypatch.setattr(run_file, "STAGES", {"nothing": stage})
    monkeypatch.setattr("weaksam.cli.run_command.set_up_logging", lambda: None)
    config = tmp_path / "run.yaml"
    config.write_text(f"run: {tmp_path}/run\nsteps: {{net: {{stage: nothing}}}}\n")
    assert CliRunner().invoke(app, ["run", str(config)]).exit_code == code


def test_a_run_file_that_is_not_there_is_the_commands_fault(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["run", str(tmp_path / "none.yaml")]).exit_code == 2


FOLDER = "run: {base}/run\nsteps: {{images: {{stage: index, format: folder, root: {base}/data}}}}\n"
LONG = "a" * 300


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Calls the command with a good run file laid over; gives its errors. Its exit code must be 2."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/labels.csv").write_text("file,labels\na.jpg,cat\n")
    (tmp_path / "data/a.jpg").write_bytes(b"")
    (tmp_path / "run.yaml").write_text(FOLDER.format(base=tmp_path))
    monkeypatch.setattr("weaksam.cli.main.set_up_logging", lambda: None)
    monkeypatch.setattr("weaksam.cli.run_command.set_up_logging", lambda: None)
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "NO_PROXY", "no_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)

    def call(*args: str) -> str:
        found = CliRunner().invoke(app, [arg.format(base=tmp_path) for arg in args])
        assert found.exit_code == 2, (found.output, found.exception)
        return found.output

    return call


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("steps.images.root=foo://x", "foo://x: cannot be used (Protocol not known: foo"),
        ("steps.images.root=S3://x", "S3://x: cannot be used (Protocol not known: S3"),
        ("run=foo://x", "cannot be used (Protocol not known: foo"),
        ("endpoint=http://", "endpoint: must be the URL of an S3 server, http://... or https://..., got 'http://'"),
        ("endpoint=http://host:port", "endpoint: must be the URL of an S3 server"),
        ("steps.images.root={base}/data/a.jpg", "data/a.jpg: a file, not a folder: name the folder"),
        (f"steps.images.root=/tmp/{LONG}", "steps.images.root: aaaa"),
        (f"steps.images.labels_file={LONG}.csv", "steps.images.labels_file: aaaa"),
        ('steps.images.root="/a\\0b"', r"steps.images.root: '/a\x00b': holds a NUL character"),
        ('steps.images.splits=["a\\0b"]', r"steps.images.splits: 'a\x00b': holds a NUL character"),
        ('steps.images.annotations={{t: "a\\0b"}}', r"steps.images.annotations.t: 'a\x00b': holds a NUL character"),
        ('run="/tmp/\\ud800"', r"run: '/tmp/\ud800': is not UTF-8"),
    ],
)
def test_what_only_the_user_can_correct_ends_with_two(override: str, fault: str, told: Callable[..., str]) -> None:
    assert fault in told("check", "{base}/run.yaml", override)


def test_a_file_in_the_place_of_images_is_the_run_files_fault(told: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "data/t.json").write_text('{"images": [], "annotations": [], "categories": []}')
    coco = "steps.images={{stage: index, format: coco, root: {base}/data, splits: [t], annotations: {{t: t.json}}, "
    assert "a.jpg: a file, not a folder" in told("check", "{base}/run.yaml", coco + "image_folders: {{t: a.jpg}}}}")
    voc = "steps.images={{stage: index, format: voc_folder, root: {base}/data/a.jpg}}"
    assert "a.jpg: a file, not a folder" in told("check", "{base}/run.yaml", voc)


@pytest.mark.parametrize("command", ["status", "metrics", "report"])
@pytest.mark.parametrize(
    ("run", "fault"),
    [
        (f"/{LONG}", "check the folder"),
        ("a\0b", "holds a NUL character"),
        ("a\ud800", "is not UTF-8"),
        ("foo://x", "cannot be used (Protocol not known: foo"),
    ],
)
def test_a_run_that_cannot_be_is_the_commands_fault(
    command: str, run: str, fault: str, told: Callable[..., str]
) -> None:
    assert fault in told(command, run)


def test_a_place_that_cannot_be_written_is_the_commands_fault(told: Callable[..., str]) -> None:
    assert "OUT: aaaa" in told("scenes", f"/tmp/{LONG}")
    assert "--to: aaaa" in told("report", "{base}/run", "--to", f"/tmp/{LONG}")


def test_a_password_that_cuts_the_proxy_in_two_is_not_shown(
    told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for proxy in ("http://user:s3cr3t#1@h:80", "http://user:12/s3cr3t@h:80", "http://user:s3cr3t@h:port"):
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        shown = told("check", "{base}/run.yaml", "steps.images.root=s3://bucket/x")
        assert "HTTPS_PROXY: no URL of a proxy, http://host:port: in a user name or password" in shown
        assert "write # as %23" in shown
        assert "s3cr3t" not in shown


def test_an_endpoint_of_the_environment_that_is_none_is_named(
    told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    shown = told("check", "{base}/run.yaml", "steps.images.root=s3://bucket/x")
    assert "AWS_ENDPOINT_URL: must be the URL of an S3 server" in shown


def test_every_code_of_the_page_is_provoked() -> None:
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", TROUBLE, re.MULTILINE)} == {code for code, _ in ENDS}
