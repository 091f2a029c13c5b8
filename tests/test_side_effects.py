"""No import and no parsing changes the environment, and a command reads its run file once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from testing.places import ROOT
from tests.test_layers import MODULES
from weaksam import pipeline
from weaksam.cli.main import app
from weaksam.cluster import jobs, submit
from weaksam.core.object_stores import use_server
from weaksam.execution import ray_env

RUN_FILE = """
run: {base}/run
endpoint: https://s3.example.test
addressing: virtual
steps:
  images: {{stage: index, format: folder, root: {base}/data}}
  hygiene: {{stage: hygiene, images: images}}
"""
NAMED = {"AWS_ENDPOINT_URL_S3": "https://s3.example.test", "AWS_S3_ADDRESSING_STYLE": "virtual"}
# Set by other libraries when they are imported: Ray, torch's inductor, tensorboardX's checksums.
BY_OTHERS = {"RAY_CLIENT_MODE", "TORCHINDUCTOR_CACHE_DIR", "CRC32C_SW_MODE"}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run file of a folder with an image, and an environment that the test gives back as it was."""
    for name in NAMED:
        monkeypatch.setenv(name, "")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").write_bytes(b"not opened")
    (tmp_path / "data" / "labels.csv").write_text("file,labels\na.jpg,cat\n")
    path = tmp_path / "run.yaml"
    path.write_text(RUN_FILE.format(base=tmp_path))
    return str(path)


def python(code: str, **environment: str) -> Any:
    """What a program prints as JSON, in an environment that sets nothing for Ray or S3."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MALLOC_"))}
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=own | environment, timeout=500
    )
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout.splitlines()[-1])


@pytest.mark.timeout(600)  # it imports torch, Ray and transformers
def test_no_import_changes_the_environment() -> None:
    code = f"""
import importlib, json, os, signal
found, handlers = {{}}, {{number: signal.getsignal(number) for number in signal.valid_signals()}}
for module in {list(MODULES)!r}:
    before = dict(os.environ)
    importlib.import_module(module)
    changed = {{name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}}
    if changed - {BY_OTHERS!r}:
        found[module] = sorted(changed)
assert handlers == {{number: signal.getsignal(number) for number in handlers}}
print(json.dumps(found))
"""
    assert python(code) == {}


def test_parsing_changes_no_environment(config: str) -> None:
    before = dict(os.environ)
    run_file = pipeline.parse(config, ["steps.images.splits=[train]"])
    assert pipeline.with_defaults(run_file, ["steps.images.sample=3"]).steps["images"][1].max_failed == 0.001
    assert dict(os.environ) == before
    assert run_file.server.variables == NAMED


def test_who_resolves_steps_reads_from_the_server_of_the_run_file(config: str) -> None:
    pipeline.resolve_steps(pipeline.parse(config))
    assert {name: os.environ[name] for name in NAMED} == NAMED


def test_a_run_file_without_a_server_leaves_that_of_the_environment(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(config).write_text(Path(config).read_text().replace("endpoint: https://s3.example.test\n", ""))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://before")
    use_server(pipeline.parse(config).server)
    assert os.environ["AWS_ENDPOINT_URL_S3"] == "http://before"
    assert os.environ["AWS_S3_ADDRESSING_STYLE"] == "virtual"


class NoCluster(jobs.Cluster):
    """Takes every job and runs none."""

    def __init__(self, address: str) -> None:
        self.address = address

    def submit(self, job: submit.Job) -> None: ...


@pytest.mark.parametrize(
    "command",
    [["run", "--only", "images"], ["check"], ["submit", "--address", "http://127.0.0.1:8265"]],
    ids=["run", "check", "submit"],
)
def test_a_command_reads_its_run_file_once(command: list[str], config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read_text, reads = Path.read_text, list[str]()

    def count(path: Path, *args: Any, **kwargs: Any) -> str:
        reads.append(str(path))
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", count)
    monkeypatch.setattr(jobs, "Cluster", NoCluster)
    done = CliRunner().invoke(app, [command[0], config, "steps.images.classes=[cat]", *command[1:]])
    assert done.exit_code == 0, done.output
    assert reads.count(config) == 1


def test_ray_reads_what_is_prepared_before_it_is_imported() -> None:
    code = """
import json, os
from weaksam.execution import ray_env
ray_env.prepare()
import ray
from ray._raylet import AuthenticationMode, get_authentication_mode
print(json.dumps([get_authentication_mode() == AuthenticationMode.TOKEN, os.environ["RAY_BACKEND_LOG_LEVEL"]]))
"""
    assert python(code) == [True, "fatal"]
    assert python(code, RAY_BACKEND_LOG_LEVEL="info") == [True, "info"]  # the environment goes before


def test_a_cluster_that_is_joined_keeps_its_own_way_to_let_us_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_BACKEND_LOG_LEVEL", "RAY_task_oom_retries"):
        monkeypatch.setenv(name, "")  # so that it is given back as it was
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    ray_env.prepare()
    assert "RAY_AUTH_MODE" not in os.environ
    assert dict(os.environ)["RAY_task_oom_retries"] == "5"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    ray_env.prepare_client()
    assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.ray
def test_connect_leaves_the_programs_handler_of_signals() -> None:
    code = """
import json, os, signal, time
from weaksam.cli.terminal import end_on_sigterm
from testing.local_ray import disconnect
from weaksam.execution.connection import connect
end_on_sigterm()
connect()
ended = ""
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
except KeyboardInterrupt:
    ended = "as by Ctrl-C"
disconnect()
print(json.dumps(ended))
"""
    assert python(code) == "as by Ctrl-C"
