"""README and configs keep up with the code."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from testing.places import ROOT
from tests.stages.test_proposals import jpeg
from weaksam import pipeline
from weaksam.cli.main import app
from weaksam.cli.reference import reference
from weaksam.demo.scenes import draw_scene, write_scenes
from weaksam.stages import STAGES
from weaksam.stages.renamed import RENAMED

README = (ROOT / "README.md").read_text()
DOCS = [ROOT / "README.md", ROOT / "cluster" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE = {path.relative_to(ROOT).as_posix(): path.read_text() for path in DOCS}
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
# What the header of each config says must come from the command line.
GIVEN = {"root": "s3://data/somewhere", "checkpoint": "s3://models/sam.pth"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_config_is_right_once_its_data_is_named(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# "), "a config opens with what it is and the command that runs it"
    assert f"weaksam run {path.relative_to(ROOT)}" in text
    header = re.match(r"(#.*\n)*", text)
    assert header
    named = re.findall(r"steps\.([\w.]+)\.(\w+)=", header.group())
    overrides = [f"steps.{step}.{key}={GIVEN[key]}" for step, key in named if key in GIVEN]
    assert pipeline.parse(str(path), overrides).steps


def test_every_stage_is_in_the_readme() -> None:
    for name in STAGES:
        assert f"| `{name}` |" in README


def test_every_key_that_was_renamed_is_in_the_table_of_old_and_new_keys() -> None:
    for stage, keys in RENAMED.items():
        for old, new in keys.items():
            assert old not in STAGES[stage].config.model_fields
            assert f"| `{stage}.{old}` | {new} |" in PAGE["docs/migration.md"]


@pytest.mark.parametrize("page", PAGE)
def test_every_file_a_page_names_is_there(page: str) -> None:
    text = re.sub(r"```.*?```", "", PAGE[page], flags=re.DOTALL)
    for name in re.findall(r"\b(?:configs|tests|benchmarks|docs|jobs)/[\w/.]+\.\w+", text):
        assert (ROOT / name).is_file(), name
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(link).is_file(), link


@pytest.mark.parametrize("page", PAGE)
def test_every_override_in_a_page_is_a_setting(page: str) -> None:
    for step, key in re.findall(r"steps\.(\w+)\.([\w.]+)=", PAGE[page]):
        config = STAGES[{"images": "index", "masks": "pseudo_masks", "mist": "train_wsod"}.get(step, step)].config
        for part in key.split("."):
            assert part in config.model_fields, f"steps.{step}.{key}"
            config = config.model_fields[part].annotation


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line of every shell block, comments and continuations resolved."""
    found = []
    for page, text in PAGE.items():
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            joined = re.sub(r"\\\n\s*", " ", block)
            lines = [re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines()]
            found += [(page, line) for line in lines if line.split(" ")[0] in ("weaksam", "make", "python")]
    return found


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value[:60])
def test_every_command_of_a_page_is_one(page: str, line: str) -> None:
    program, *arguments = shlex.split(line.replace("$settings", "a=b"))
    if program == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in arguments)
    elif program == "python":
        assert arguments[0] == "-m", "pages show modules"
        source = (ROOT / (arguments[1].replace(".", "/") + ".py")).read_text()
        for option in (one for one in arguments[2:] if one.startswith("--")):
            assert f'"{option}"' in source
    else:
        command: Any = typer.main.get_command(app)
        name, *rest = arguments
        command.commands[name].make_context(name, rest)  # a usage error raises
    for name in re.findall(r"\b(?:configs|cluster|jobs|benchmarks)/[\w/.]+\.(?:yaml|json|py)", line):
        assert (ROOT / name).is_file(), name


def test_the_configuration_reference_is_that_of_this_code() -> None:
    assert PAGE["docs/configuration.md"] == reference(), "run `weaksam stages --markdown > docs/configuration.md`"


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE[page], re.DOTALL)


def test_the_examples_of_the_engine_hold_for_a_photo_in_which_nothing_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40), "grey").save("photo.jpg")
    scope: dict[str, Any] = {}
    for block in blocks("docs/library.md")[:2]:
        exec(compile(block, "docs/library.md", "exec"), scope)
    assert len(scope["found"].boxes) == 0
    assert scope["mask"].shape == (40, 50)


def test_the_examples_for_notebooks_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(draw_scene(1, family="demo", size=(120, 160)).image).save("photo.jpg")
    write_scenes("scenes", images=4, seed=0)
    Path("run.yaml").write_text(
        "run: run\nsteps:\n  images: {stage: index, format: voc, root: scenes, splits: [trainval, test]}\n"
    )
    pipeline.run_steps(pipeline.load("run.yaml"))
    scope: dict[str, Any] = {}
    for block in blocks("docs/library.md"):
        exec(compile(block, "docs/library.md", "exec"), scope)
    assert scope["found"]["status"] == "ok"
    assert scope["kept"].tolist() == [0, 2]
    assert scope["images"].num_rows == 4
    assert len(scope["drawn"].masks) == 1
    for block in blocks("README.md"):
        exec(compile(block, "README.md", "exec"), scope)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("ray_cluster")
def test_the_way_from_labels_to_masks_is_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of docs/own_data.md in turn, on six drawn scenes and with short trainings."""
    monkeypatch.chdir(ROOT)
    data, run = tmp_path / "mine", tmp_path / "runs" / "mine"
    (data / "beach").mkdir(parents=True)
    lines = ["file,labels"]
    for index in range(6):
        scene = draw_scene(index, family="demo", size=(96, 128))
        Image.fromarray(scene.image).save(data / "beach" / f"{index}.jpg")
        lines.append(f"beach/{index}.jpg,{';'.join(['cat', 'dog'][index % 2 :])}")
    (data / "labels.csv").write_text("\n".join(lines) + "\n")
    short = ["steps.classifier.epochs=2", "steps.classifier.warmup_epochs=0", "steps.proposals.grid.points_per_side=6"]
    short += ["steps.mask_rcnn.square=96", *(f"steps.{step}.steps=4" for step in ("mist", "mask_rcnn"))]
    short += [f"steps.{step}.warmup=0" for step in ("mist", "mask_rcnn")]
    short += [f"steps.{step}.scales=[96]" for step in ("mist", "mist_boxes", "mask_rcnn", "found")]
    told = {}
    for page, line in commands():
        if page != "docs/own_data.md":
            continue
        line = line.replace("runs/mine", str(run)).replace("/data/mine", str(data))
        _, *arguments = shlex.split(line)
        result = CliRunner().invoke(app, [*arguments, *(short if arguments[0] in ("check", "run") else [])])
        assert result.exit_code == 0, f"{line}: {result.output}"
        told[arguments[0]] = result.output
    assert list(told) == ["check", "run", "status", "report", "export"]
    assert "to do" in told["check"]
    assert "finished" in told["status"]
    page = Path(told["report"].strip().splitlines()[-1]).read_text()
    assert 'class="mask"' in page
    assert "coarse heatmap" in page
    assert "cross heatmap" not in page  # its classifier has no attention
    exported = json.loads(next(Path(f"{run}-labels").rglob("instances_train.json")).read_text())
    assert [one["name"] for one in exported["categories"]] == ["cat", "dog"]
    assert exported["annotations"]
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("pandas")
    exec(compile(blocks("docs/own_data.md")[0], "docs/own_data.md", "exec"), {})


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_run_file_for_boxes_of_ones_own_makes_proposals_and_masks(tmp_path: Path) -> None:
    page = PAGE["docs/own_data.md"]
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    data, config = tmp_path / "mine", tmp_path / "alone.yaml"
    (data / "beach").mkdir(parents=True)
    (data / "beach" / "0001.jpg").write_bytes(jpeg(60, 80))
    (data / "labels.csv").write_text("file,labels\nbeach/0001.jpg,dog;cat\n")
    (given,) = re.findall(r"`({\"image_id\".*?})`", page)
    given = given.replace("left, top, width, height", "8, 4, 40, 30")
    (data / "boxes.json").write_text(json.dumps([json.loads(given)]))
    config.write_text(block.replace("/data/mine", str(data)).replace("runs/alone", str(tmp_path / "run")))
    steps = {step.name: step for step in pipeline.load(str(config))}
    pipeline.run_steps(list(steps.values()))
    (found,) = steps["proposals"].read(["status"]).to_pylist()
    (drawn,) = steps["masks"].read(["status", "classes", "masks"]).to_pylist()
    assert (found["status"], drawn["status"], drawn["classes"], len(drawn["masks"])) == ("ok", "ok", [0], 1)
