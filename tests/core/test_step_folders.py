"""Damaged, unreachable and denied are three things, and what a finished step has lost is made again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from testing.s3.small import small_s3
from weaksam.cli.main import app
from weaksam.core import object_stores, storage_faults

RUN_FILE = """
run: {base}/run
steps:
  images: {{stage: index, format: folder, root: {base}/data}}
  more: {{stage: index, format: folder, root: {base}/data, classes: [dog, cat]}}
"""

Call = Callable[..., Result]


@pytest.fixture
def call() -> Iterator[Call]:
    """Runs a command in this process, and leaves logging as it was."""
    logger = logging.getLogger("weaksam")
    before = logger.handlers, logger.propagate, logger.level
    yield lambda *args: CliRunner().invoke(app, list(map(str, args)), catch_exceptions=False)
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.fixture
def config(tmp_path: Path, call: Call) -> Path:
    """A run file of two finished steps."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jpg").write_bytes(b"never opened")
    (data / "labels.csv").write_text("file,labels\na.jpg,cat;dog\n")
    path = tmp_path / "run.yaml"
    path.write_text(RUN_FILE.format(base=tmp_path))
    assert call("run", path).exit_code == 0
    return path


def folder_of(config: Path, name: str) -> Path:
    (folder,) = (config.parent / "run").glob(f"{name}-*")
    return folder


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_part_that_was_lost_is_noticed_and_made_again(config: Path, call: Call, is_cut: bool) -> None:
    images = folder_of(config, "images")
    (part,) = images.glob("part-*")
    whole = part.read_bytes()
    (images / "config.json").unlink()
    part.write_bytes(whole[:100]) if is_cut else part.unlink()
    lost = f"1 file is lost: {part.name} {f'has 100 bytes, {len(whole)} were written' if is_cut else 'is gone'}"
    states = json.loads(call("status", config.parent / "run", "--json").stdout)
    assert [(one["step"], one["state"]) for one in states] == [("images", "damaged"), ("more", "finished")]
    assert states[0]["damage"].startswith(lost)
    for command in (("status", config.parent / "run"), ("check", config)):
        shown = call(*command)
        assert (shown.exit_code, lost in shown.stdout) == (0, True)
    again = call("run", config)
    assert (again.exit_code, lost in again.stderr) == (0, True)
    assert "more: finished, skipped" in again.stderr
    assert part.read_bytes() == whole
    assert json.loads((images / "config.json").read_text())["stage"] == "index"
    assert "images: finished, skipped" in call("run", config).stderr


def test_a_step_without_config_json_stays_in_the_listing(config: Path, call: Call) -> None:
    (folder_of(config, "images") / "config.json").unlink()
    shown = call("status", config.parent / "run")
    assert [line.split()[:2] for line in shown.stdout.splitlines()[1:]] == [
        ["images", "finished"],
        ["more", "finished"],
    ]
    assert call("run", config).exit_code == 0
    assert (folder_of(config, "images") / "config.json").is_file()


@pytest.mark.parametrize("text", ['{"rows": 4, "fai', "[]", "{}"])
def test_a_damaged_manifest_is_named_with_what_to_do(config: Path, call: Call, text: str) -> None:
    more = folder_of(config, "more")
    (more / "manifest.json").write_text(text)
    for command in (("status", config.parent / "run"), ("check", config)):
        shown = call(*command)
        assert shown.exit_code == 2
        assert "finished" in shown.stdout  # the other step
        assert f"{more.name}/manifest.json: not" in shown.stderr
        assert "remove the file" in shown.stderr
    assert call("run", config).exit_code == 2
    (more / "manifest.json").unlink()
    assert call("run", config).exit_code == 0


def test_a_store_that_cannot_be_read_is_not_called_damaged(
    config: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_stores, "_ATTEMPTS", 1)
    monkeypatch.setattr(storage_faults, "ATTEMPTS", 1)
    with small_s3() as server:
        named = {"AWS_ENDPOINT_URL_S3": server.endpoint, "AWS_REGION": "us-east-1"}
        for name, value in (named | {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}).items():
            monkeypatch.setenv(name, value)
        for refusal, text in (((503, "SlowDown", "later"), "could not"), ((403, "AccessDenied", "no"), "not allowed")):
            server.refusal = refusal
            for command in (("status", "s3://bucket/run"), ("check", config, "run=s3://bucket/run")):
                shown = call(*command)
                assert (shown.exit_code, text in shown.stderr) == (4, True)
                assert not any(word in shown.stdout + shown.stderr for word in ("damaged", "remove"))
