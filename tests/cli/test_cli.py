"""The real command line: what it prints where, its exit codes, what it writes, and what it starts without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.cli.commands import WEAKSAM, call
from weaksam import pipeline
from weaksam.cli import main as cli
from weaksam.core import storage
from weaksam.demo.scenes import write_scenes
from weaksam.errors import ClusterError, ConfigError, DataError, FailedRowsError, StageError, StorageError

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


def test_a_working_folder_that_is_gone_is_told(config: str, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    told = subprocess.run(
        ["sh", "-c", f"cd {gone} && rmdir {gone} && exec {WEAKSAM} status {tmp_path}"], capture_output=True, text=True
    )
    assert told.returncode == 2
    assert told.stderr == "error: the current folder is gone: change to one that is there\n"
