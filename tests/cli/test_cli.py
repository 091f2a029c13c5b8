"""The real command line: what it prints where, its exit codes, what it writes, and what it starts without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import weaksam
from testing.places import ROOT
from weaksam import pipeline
from weaksam.cli import main as cli
from weaksam.core import storage
from weaksam.demo.scenes import write_scenes
from weaksam.errors import ClusterError, ConfigError, DataError, FailedRowsError, StageError, StorageError
from weaksam.pipeline import listings
from weaksam.stages import STAGES

WEAKSAM = str(Path(sys.executable).parent / "weaksam")

GOOD = """
run: {base}/run
steps:
  images: {{stage: index, format: folder, root: {base}/data}}
  more: {{stage: index, format: folder, root: {base}/data, classes: [cat, dog, owl]}}
  proposals: {{stage: proposals, images: images, sam: {{model: vit_xs, checkpoint: {base}/data/weights}}}}
"""
BAD = """
run: {base}/run
colour: red
steps:
  images: {{stage: index, format: folder, root: {base}/data, labls_file: x.csv}}
  more: {{stage: index, format: fodler}}
  proposals: {{stage: proposals, images: image, sam: {{model: vit_h}}, grid: {{points_per_side: 0}}}}
  other: {{stage: propsals}}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A run file on a folder of four images, nothing run yet."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        (data / name).write_bytes(b"never opened by the steps that run here")
    (data / "labels.csv").write_text("file,labels\na.jpg,cat\nb.jpg,dog\nc.jpg,cat;dog\n")
    (data / "weights").write_bytes(b"never loaded")
    path = tmp_path / "run.yaml"
    path.write_text(GOOD.format(base=tmp_path))
    return str(path)


def call(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    told = subprocess.run(args, capture_output=True, text=True, cwd=cwd, timeout=120)
    assert "Traceback" not in told.stderr, told.stderr
    return told


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("command", [[WEAKSAM, "run"], [sys.executable, "-m", "jobs.stage", "index"]])
def test_a_bad_run_file_tells_every_fault_at_once_and_writes_nothing(
    command: list[str], config: str, tmp_path: Path
) -> None:
    Path(config).write_text(BAD.format(base=tmp_path))
    before = files_below(tmp_path)
    told = call(*command, config)
    assert told.returncode == 2
    assert told.stdout == ""
    faults = told.stderr.splitlines()
    assert all(line.startswith("error: ") for line in faults)
    keys = {line.removeprefix("error: ").split(": ")[0] for line in faults}
    assert keys == {
        "colour",
        "steps.images.labls_file",
        "steps.more.format",
        "steps.more.root",
        "steps.proposals.images",
        "steps.proposals.sam",
        "steps.proposals.grid.points_per_side",
        "steps.other.stage",
    }
    assert "did you mean 'labels_file'?" in told.stderr
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    ("args", "faults"),
    [
        (["nowhere.yaml"], ["nowhere.yaml: no such file"]),
        (["{config}", "steps.images.root={base}/gone"], ["steps.images: root: there is no folder"]),
        (
            ["{config}", "steps.images.root", "steps.imags.root=x"],
            ["steps.images.root: an override has the form", "steps.imags.root=x: there is no step 'imags'"],
        ),
        (
            ["{config}", "--only", "imagess", "--only", "proposals"],
            [
                "--only imagess: there is no step 'imagess': steps are images, more, proposals",
                "steps.proposals.images: step 'images' is not finished",
            ],
        ),
    ],
)
def test_faults_of_the_command_line_are_faults_of_the_user(
    args: list[str], faults: list[str], config: str, tmp_path: Path
) -> None:
    told = call(WEAKSAM, "run", *(arg.format(config=config, base=tmp_path) for arg in args))
    assert told.returncode == 2
    for fault, line in zip(faults, told.stderr.splitlines(), strict=True):
        assert fault in line
    assert not (tmp_path / "run").exists()


def test_a_run_is_checked_run_skipped_and_its_state_told(config: str, tmp_path: Path) -> None:
    told = call(WEAKSAM, "check", config)
    assert [line.split()[:2] for line in told.stdout.splitlines()[1:4]] == [
        ["images", "index"],
        ["more", "index"],
        ["proposals", "proposals"],
    ]
    assert told.stdout.count("to do") == 3
    seen = f"looked at {tmp_path}/data/labels.csv and the names of 4 images; not at the images themselves"
    assert told.stdout.splitlines()[4:] == [
        f"images: {seen}",
        f"more: {seen}",
        "not looked into: steps.proposals.sam.checkpoint",
    ]
    assert not (tmp_path / "run").exists()

    run = call(WEAKSAM, "run", config, "--only", "images")
    assert run.returncode == 0
    assert "images: 4 rows" in run.stderr
    job = call(
        sys.executable, "-m", "jobs.stage", "index", config
    )  # the job runs every step of its stage, and no other
    assert "images: finished, skipped" in job.stderr
    assert "more: 4 rows" in job.stderr
    assert "proposals" not in job.stderr

    states = [line.split() for line in call(WEAKSAM, "check", config).stdout.splitlines()[1:4]]
    assert [(words[0], "finished" in words) for words in states] == [
        ("images", True),
        ("more", True),
        ("proposals", False),
    ]
    manifest = next((tmp_path / "run").glob("more-*/manifest.json"))
    manifest.unlink()
    states = [line.split() for line in call(WEAKSAM, "status", str(tmp_path / "run")).stdout.splitlines()[1:]]
    assert [words[:3] for words in states] == [["images", "finished", "4"], ["more", "unfinished", "4"]]


def test_check_names_all_faults_of_a_table_and_runs_nothing(config: str, tmp_path: Path) -> None:
    (tmp_path / "data" / "labels.csv").write_text("file,labels\nnope.jpg,dog\na.jpg,dog\na.jpg,dog\n,cat\nb.jpg\n")
    result = CliRunner().invoke(cli.app, ["check", config])
    assert result.exit_code == 2
    faults = [line for line in result.stderr.splitlines() if line.startswith("error: steps.images: ")]
    assert [line.partition("labels.csv")[2][:8] for line in faults] == [", line 4", ", line 5", ", line 6", ": 1 list"]
    assert "to do" in result.stdout
    assert not (tmp_path / "run").exists()


def write_progress(folder: Path, *, state: str, seconds_ago: float, **others: object) -> None:
    updated = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    told = {"step": "x", "stage": "proposals", "state": state, "done": 120, "total": 400, "unit": "images", "failed": 2,
            "rate": 3.11, "eta_seconds": 80.0, "started": "", "updated": updated.isoformat(), **others}  # fmt: skip
    storage.write_json(str(folder / "config.json"), {"stage": "proposals"})
    storage.write_json(str(folder / "progress.json"), told)


def test_the_state_of_a_run_tells_what_runs_and_what_stopped(tmp_path: Path) -> None:
    write_progress(tmp_path / "a-00000000", state="running", seconds_ago=30)
    write_progress(tmp_path / "b-00000000", state="running", seconds_ago=3 * 3600)
    write_progress(tmp_path / "c-00000000", state="stopped", seconds_ago=20)
    training = {"stage": "train_wsod", "unit": "steps", "failed": 0, "loss": 0.5}
    write_progress(tmp_path / "d-00000000", state="running", seconds_ago=5, **training)
    write_progress(tmp_path / "e-00000000", state="finished", seconds_ago=9999)
    done = {"stage": "proposals", "rows": 400, "failed": 1, "seconds": 200.0, "rows_per_second": 2.0}
    storage.write_json(str(tmp_path / "e-00000000" / "manifest.json"), done)
    write_progress(tmp_path / "f-00000000", state="running", seconds_ago=5)
    (tmp_path / "f-00000000" / "progress.json").write_text("{half")
    told = call(WEAKSAM, "status", str(tmp_path)).stdout
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in told.splitlines()[1:]}
    assert lines["a"].startswith("running 120/400 images 3.11/s eta 80 s 2 failed 0 2 /")
    assert lines["b"].startswith("stopped at 120/400 (last sign 3.0 h ago): the same command goes on 0 2 /")
    assert lines["c"].startswith("stopped at 120/400 (last sign 2")
    assert lines["d"].startswith("running 120/400 steps 3.11/s eta 80 s loss 0.5 ")
    assert lines["e"].startswith("finished 400 1 200 2 /")
    assert lines["f"].startswith("unfinished 0 /")

    states = {state["step"]: state for state in json.loads(call(WEAKSAM, "status", str(tmp_path), "--json").stdout)}
    assert [states[step]["state"] for step in "abcdef"] == [
        *("running", "stopped", "stopped", "running", "finished", "unfinished")
    ]
    keys = ["step", "stage", "state", "rows", "failed", "seconds", "rows_per_second", "folder", "progress", "damage"]
    keys.append("reads")
    assert all(list(state) == keys for state in states.values())
    assert states["e"] == {
        **{"step": "e", "state": "finished", "folder": str(tmp_path / "e-00000000"), "progress": None},
        "damage": None,
        "reads": [],
        **done,
    }
    assert states["d"]["progress"]["loss"] == 0.5
    assert 10799 < states["b"]["progress"]["seconds_ago"] < 10900
    assert states["f"]["stage"] == "proposals"


WARNING = (
    "warning: steps.masks.sam.model: vit_xs was trained on drawn scenes, which {root} does not hold: on photographs "
    "its masks fit worse than filled boxes do (mean IoU 0.454 and 0.549 on COCO). Take an official SAM: "
    "steps.masks.sam.model=vit_b with steps.masks.sam.checkpoint=<path or URI of sam_vit_b_01ec64.pth>"
)


@pytest.fixture
def masks_config(config: str, tmp_path: Path) -> str:
    """A run file that draws masks with the small SAM in the images of `config`."""
    (tmp_path / "boxes.json").write_text("[]")
    steps = [
        f"  images: {{stage: index, format: folder, root: {tmp_path}/data}}",
        f"  boxes: {{stage: import_detections, images: images, results: {tmp_path}/boxes.json}}",
        "  masks: {stage: pseudo_masks, images: images, detections: boxes, sam: {model: vit_xs}}",
    ]
    Path(config).write_text("\n".join([f"run: {tmp_path}/run", "steps:", *steps, ""]))
    return config


def test_check_warns_of_masks_that_the_small_sam_would_draw_in_photographs(masks_config: str, tmp_path: Path) -> None:
    done = call(WEAKSAM, "check", masks_config)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [WARNING.format(root=tmp_path / "data")]
    assert done.stdout.count("to do") == 3
    assert not (tmp_path / "run").exists()


def test_check_does_not_warn_of_drawn_scenes_or_of_other_weights(masks_config: str, tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", images=3, seed=0)
    drawn = [f"steps.images.root={tmp_path}/scenes", "steps.images.format=voc", "steps.images.splits=[trainval,test]"]
    own = [f"steps.masks.sam.checkpoint={tmp_path}/data/weights"]
    for overrides in (drawn, own, [*own, "steps.masks.sam.model=vit_b"]):
        done = CliRunner().invoke(cli.app, ["check", masks_config, *overrides])
        assert (done.exit_code, done.stderr, done.stdout.count("to do")) == (0, "", 3)


def test_a_run_logs_the_warnings_of_the_steps_it_is_to_run_first(masks_config: str, tmp_path: Path) -> None:
    masks = pipeline.load(masks_config)[-1]
    storage.write_json(masks.manifest_uri, {"rows": 1, "failed": 0, "failures": []})  # finished: SAM is not started
    images = call(WEAKSAM, "run", masks_config, "--only", "images", "--only", "boxes")
    assert (images.returncode, "warning:" in images.stderr) == (0, False)
    done = call(WEAKSAM, "run", masks_config, "--only", "masks")
    assert done.returncode == 0
    first, second = (line.split(" ", 1)[1] for line in done.stderr.splitlines())  # behind the time of day
    assert first == WARNING.format(root=tmp_path / "data")
    assert second.startswith("masks: finished, skipped")


def test_a_relative_run_lies_below_the_working_folder(config: str, tmp_path: Path) -> None:
    told = call(WEAKSAM, "run", config, "run=here", "steps.images.root=data", "--only", "images", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert len(list((tmp_path / "here").glob("images-*/manifest.json"))) == 1
    assert "finished" in call(WEAKSAM, "status", "here", cwd=tmp_path).stdout


def test_the_state_of_a_folder_without_steps_is_a_fault(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        told = call(WEAKSAM, "status", str(folder))
        assert told.returncode == 2
        assert f"error: {folder}: no step has been started there" in told.stderr


def test_a_dataset_that_contradicts_itself_ends_with_two(config: str, tmp_path: Path) -> None:
    (tmp_path / "data" / "labels.csv").write_text("file,labels\ngone.jpg,cat\n")
    told = call(WEAKSAM, "run", config, "--only", "images")
    assert told.returncode == 2
    assert "error: " in told.stderr
    assert "gone.jpg (line 2)" in told.stderr


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("one", "two"), 2, "error: one\nerror: two\n"),
        (DataError("bad table"), 2, "error: bad table\n"),
        (FailedRowsError("3 of 4"), 3, "error: 3 of 4\n"),
        (StageError("rows have no place"), 4, "error: rows have no place\n"),
        (StorageError("no network"), 4, "error: no network\n"),
        (ClusterError("no cluster"), 4, "error: no cluster\n"),
        (KeyboardInterrupt(), 130, "interrupted: the same command goes on from here\n"),
    ],
)
def test_what_ends_a_command_decides_its_exit_code(
    error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        cli.guarded(command)()
    assert caught.value.exit_code == code
    assert capsys.readouterr().err == told


def test_nothing_but_a_run_starts_torch_or_ray(config: str, tmp_path: Path) -> None:
    commands = [
        ["check", config],
        ["status", str(tmp_path / "run")],
        ["status", "--json", str(tmp_path / "run")],
        ["stages"],
        ["stages", "proposals"],
    ]
    storage.write_json(str(tmp_path / "run" / "images-0" / "config.json"), {})
    check = (
        "import sys; from weaksam.cli.main import app\n"
        f"for args in {commands!r}: app(args, standalone_mode=False)\n"
        "print('loaded:', [name for name in ('torch', 'ray') if name in sys.modules])"
    )
    assert call(sys.executable, "-c", check).stdout.endswith("loaded: []\n")


def test_a_program_that_imported_ray_first_keeps_the_settings_ray_was_loaded_with() -> None:
    # Ray reads them when it is imported; changed later, no local cluster starts any more ("InvalidAuthToken").
    check = (
        "import os, ray; before = dict(os.environ); from weaksam.execution import ray_env; ray_env.prepare()\n"
        "print([k for k in ('RAY_AUTH_MODE', 'RAY_BACKEND_LOG_LEVEL') if os.environ.get(k) != before.get(k)])"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    told = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=environment, check=True)
    assert told.stdout == "[]\n"


def test_the_help_of_each_command_says_what_it_does() -> None:
    told = call(WEAKSAM, "--help").stdout
    commands = {command.callback.__name__: command.callback for command in cli.app.registered_commands}  # type: ignore
    for name, function in commands.items():
        assert f"│ {name} " in told
        assert (function.__doc__ or "").strip().endswith(".")
    told = call(WEAKSAM, "run", "--help").stdout
    assert "Run the steps of CONFIG." in told
    assert "KEY=VALUE" in told
    assert "--only" in told


def test_every_stage_and_every_setting_is_explained() -> None:
    told = call(WEAKSAM, "stages").stdout
    for name, stage in STAGES.items():
        assert name in told
        assert stage.summary in told
        assert stage.summary.endswith(".")
        for key, kind, default, sentence in listings.settings_rows(stage.config):
            assert sentence.endswith("."), f"{name}: {key} has no sentence"
            assert kind
            assert default


@pytest.mark.parametrize("name", list(STAGES))
def test_a_stage_shows_every_key_with_its_type_default_and_sentence(name: str) -> None:
    told = call(WEAKSAM, "stages", name).stdout
    lines = {line.split()[0]: line for line in told.splitlines() if line.startswith(" ") and line.split()}
    for key, kind, default, sentence in listings.settings_rows(STAGES[name].config):
        assert kind in lines[key]
        assert default in lines[key]
        assert sentence[:60] in lines[key]


def test_an_unknown_stage_is_told_with_the_known_ones() -> None:
    told = call(WEAKSAM, "stages", "proposal")
    assert told.returncode == 2
    assert "there is no stage 'proposal': stages are index, train_classifier, proposals" in told.stderr


def test_a_job_without_arguments_or_without_steps_tells_so(config: str) -> None:
    for given in ([], ["index"]):
        shown = call(sys.executable, "-m", "jobs.stage", *given)
        usage = "usage: python -m jobs.stage NAME CONFIG [KEY=VALUE]..."
        assert (shown.returncode, shown.stdout.splitlines()[0]) == (2, usage)
    assert call(sys.executable, "-m", "jobs.pipeline", "--help").returncode == 0
    told = call(sys.executable, "-m", "jobs.stage", "evaluate", config)
    assert told.returncode == 2
    assert "no step has the stage 'evaluate'" in told.stderr


def test_faults_of_yaml_that_python_would_choke_on_are_told(config: str, tmp_path: Path) -> None:
    for text in (
        "run: {{folder}}\nsteps: {}\n",  # a template that nobody filled in
        "run: x\nsteps:\n  a: {stage: index, format: folder, root: 2024-13-45}\n",  # looks like a date, is none
        "run: x\nsteps:\n  a: {stage: index, format: folder, root: x, annotations: {2024-01-05: y}}\n",
        f"run: x\nsteps:\n  images: {{stage: index, format: folder, root: {tmp_path}/data}}\n"
        "  2: {stage: proposals, images: images, sam: {model: vit_xs}}\n",
    ):
        Path(config).write_text(text)
        told = call(WEAKSAM, "check", config)
        assert told.returncode in (0, 2)


def test_a_folder_that_looks_like_markup_is_printed_as_it_is(config: str, tmp_path: Path) -> None:
    told = call(WEAKSAM, "check", config, f"run={tmp_path}/[bold]x[/y]")
    assert f"{tmp_path}/[bold]x[/y]/images-" in told.stdout


def test_one_damaged_step_does_not_hide_the_others(config: str, tmp_path: Path) -> None:
    assert call(WEAKSAM, "run", config, "--only", "images").returncode == 0
    broken = tmp_path / "run" / "other-12345678"
    broken.mkdir()
    (broken / "config.json").write_text("{half")
    assert "images" in call(WEAKSAM, "status", str(tmp_path / "run")).stdout
    assert os.listdir(broken) == ["config.json"]


def test_metrics_shows_the_headlines_of_every_finished_evaluation(tmp_path: Path) -> None:
    figures = {"boxes_per_image": 31.66, "recall@0.5": 0.8514, "recall@0.75": 0.5, "AR": 0.4}
    report = {"task": "proposals", "split": None, "num_images": 80, "metrics": figures}
    storage.write_json(str(tmp_path / "recall-0123abcd" / "metrics.json"), report)
    others = {**figures, "recall@0.9": 0.25, "peaks_inside": 0.625}
    storage.write_json(
        str(tmp_path / "recall_other-0123abcd" / "metrics.json"), {**report, "split": "test", "metrics": others}
    )
    (tmp_path / "images-00000000").mkdir()
    done = call(WEAKSAM, "metrics", str(tmp_path))
    assert done.returncode == 0
    head, one, other = done.stdout.strip().splitlines()
    # headlines that neither has, such as the peaks of each kind, are no columns
    names = ["boxes_per_image", "recall@0.5", "recall@0.75", "recall@0.9", "AR", "peaks_inside"]
    assert head.split() == ["step", "split", "images", *names]
    assert one.split() == ["recall-0123abcd", "all", "80", "31.7", "85.1%", "50.0%", "40.0%"]  # no recall@0.9 in it
    assert other.split() == ["recall_other-0123abcd", "test", "80", "31.7", "85.1%", "50.0%", "25.0%", "40.0%", "62.5%"]


@pytest.mark.parametrize(
    "content", ["[]", "{}", "null", '{"task":"x"}', '{"task":"detection","metrics":{}}', '{"task":["x"]}']
)
def test_a_file_that_is_not_the_metrics_of_a_step_is_named(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "recall-0123abcd"
    folder.mkdir()
    (folder / "metrics.json").write_text(content)
    done = CliRunner().invoke(cli.app, ["metrics", str(tmp_path)])
    assert done.exit_code == 2
    assert f"{folder}/metrics.json: not the metrics of a step: remove the step's manifest {folder}/mani" in done.output


def test_metrics_of_a_run_without_any_is_a_fault(tmp_path: Path) -> None:
    done = call(WEAKSAM, "metrics", str(tmp_path))
    assert done.returncode == 2
    assert "no evaluate step is finished there" in done.stderr


def test_a_working_folder_that_is_gone_is_told(config: str, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    told = subprocess.run(
        ["sh", "-c", f"cd {gone} && rmdir {gone} && exec {WEAKSAM} status {tmp_path}"], capture_output=True, text=True
    )
    assert told.returncode == 2
    assert told.stderr == "error: the current folder is gone: change to one that is there\n"


def test_the_version_is_that_of_the_package() -> None:
    shown = call(WEAKSAM, "--version")
    assert (shown.returncode, shown.stdout) == (0, f"weaksam {weaksam.__version__}\n")
