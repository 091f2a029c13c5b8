"""`weaksam export`: steps found in a run folder alone, what is written, told and refused, and that nothing is lost."""

from __future__ import annotations

import csv
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from typer.testing import CliRunner, Result

from weaksam import pipeline
from weaksam.cli.main import app
from weaksam.core import schemas, storage, tables
from weaksam.core.config import parse_settings
from weaksam.core.fingerprints import describe, resolve
from weaksam.core.step import Outcome, Step
from weaksam.demo.scenes import write_scenes
from weaksam.stages import STAGES

RUN_FILE = """
run: {base}/run
steps:
  images: {{stage: index, format: voc, root: {base}/data, splits: [trainval, test]}}
  imported: {{stage: import_detections, images: images, results: {base}/found.json}}
  pgt: {{stage: pgt, images: images, detections: imported, split: trainval}}
  best: {{stage: pgt, images: images, detections: imported, split: trainval, top_k: 1}}
"""
Call = Callable[..., Result]


def ellipse(box: list[float], height: int, width: int) -> bytes:
    """The mask of an ellipse that fills a box."""
    left, top, right, bottom = box
    y, x = np.mgrid[:height, :width] + 0.5
    inside = ((2 * x - left - right) / (right - left)) ** 2 + ((2 * y - top - bottom) / (bottom - top)) ** 2 <= 1
    return coco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))["counts"]  # type: ignore[return-value]  (bytes)


def write_results(path: Path, images: list[dict[str, Any]]) -> None:
    """Two boxes of each label of an image, as a COCO results json."""
    found = []
    for row in images:
        for label in row["labels"]:
            entry = {"image_id": row["image_id"], "category_id": label + 1}
            for score, x in ((0.9, 10.5), (0.6, 60.0)):
                found.append(entry | {"bbox": [x, 12, 40 + 10 * label, 30], "score": score})
    path.write_text(json.dumps(found))


def draw(step: Step) -> Outcome:
    """Instead of SAM and a detector: the boxes of `pgt` with an ellipse in each; one image fails."""
    rows = step.inputs["pgt"].read().to_pylist()
    sizes = {row["image_id"]: row for row in step.inputs["images"].read().to_pylist()}
    for row in rows:
        hw = [sizes[row["image_id"]][key] for key in ("height", "width")]
        row |= {"height": hw[0], "width": hw[1], "masks": [ellipse(box, *hw) for box in row["boxes"]]}
    failed = {"image_id": rows[0]["image_id"], "status": "oom", "message": "too big"}
    names = schemas.class_names_of(step.inputs["images"].read().schema)
    schema = schemas.with_metadata(schemas.DETECTIONS, fingerprint=step.fingerprint, class_names=names)
    parts = [tables.write_part(step.folder, schemas.to_table([failed, *rows[1:]], schema))]
    return Outcome(rows=len(rows), failed=1, failures=["oom"], parts=parts)


def fake(name: str, stage: str, inputs: dict[str, Step], **settings: Any) -> Step:
    """A step whose work is done by `draw`; its folder is like any other's."""
    config, faults = parse_settings(STAGES[stage].config, settings, where=name)
    assert not faults
    run = inputs["images"].folder.rpartition("/")[0]
    return resolve(run, name, replace(STAGES[stage], run=draw), config, inputs)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six drawn scenes: index and pgt as they are, masks and detections without their models, a step half done."""
    base = tmp_path_factory.mktemp("exported")
    write_scenes(base / "data", images=6, seed=3)
    config = base / "run.yaml"
    config.write_text(RUN_FILE.format(base=base))
    (base / "found.json").write_text("[]")
    images, *_ = pipeline.load(str(config))
    pipeline.run_steps([images])
    write_results(base / "found.json", images.read().to_pylist())
    images, imported, pgt, best = pipeline.load(str(config))
    pipeline.run_steps([images, imported, pgt, best])
    pipeline.run_steps(pipeline.load(str(config), ["steps.best.threshold=0.5", "steps.best.max_failed=0.5"]))
    inputs = {"images": images, "pgt": pgt}
    masks = fake("masks", "pseudo_masks", inputs, images="images", pgt="pgt", sam={"model": "vit_xs"})
    found = fake("found", "detect", inputs, images="images", detector="net", max_failed=0.5)
    pipeline.run_steps([masks, found])
    half = fake("half", "detect", inputs, images="images", detector="other")
    storage.write_json(storage.join(half.folder, "config.json"), describe(half))
    return base / "run"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> str:
    """A copy: a run folder that was moved, without its run file."""
    shutil.copytree(finished_run, tmp_path / "moved")
    return str(tmp_path / "moved")


@pytest.fixture
def call() -> Iterator[Call]:
    """Runs `weaksam export` in this process, and leaves logging as it was."""
    logger = logging.getLogger("weaksam")
    before = logger.handlers, logger.propagate, logger.level
    yield lambda *args: CliRunner().invoke(app, ["export", *args], catch_exceptions=False)
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


def told(result: Result) -> dict[str, str]:
    """What was printed, by heading."""
    assert result.exit_code == 0, result.stderr
    return {line[2:12].strip(): line[12:] for line in result.stdout.splitlines()[1:]}


def folder_of(run: str, name: str) -> Path:
    (folder,) = Path(run).glob(f"{name}-*")
    return folder


def boxes_in(run: str, name: str) -> int:
    """How many boxes the rows of a step hold."""
    folder = folder_of(run, name)
    table = tables.read_table(str(folder), storage.read_json(f"{folder}/manifest.json"), columns=["boxes"])
    return sum(len(row or []) for row in table.column("boxes").to_pylist())


def test_coco_inside_the_run_is_what_pycocotools_reads(call: Call, run: str) -> None:
    result = call(run, "--step", "pgt", "--format", "coco")
    count = boxes_in(run, "pgt")
    to = folder_of(run, "export_pgt_coco") / "export"
    assert result.stdout.splitlines()[0] == f"coco export of {folder_of(run, 'pgt').name}"
    lines = told(result)
    assert lines["written"] == f"1 files, 4 images, {count} boxes, 0 masks -> {to}"
    assert (lines["contents"], lines["splits"]) == ("annotations", "trainval 4")
    assert lines["verified"].endswith("read by pycocotools' COCO")
    assert (lines["left out"], lines["lost"]) == ("nothing", "nothing")
    assert "mask IoU" not in lines
    assert len(COCO(str(to / "annotations" / "instances_trainval.json")).anns) == count


def test_voc_with_masks_tells_what_they_lose_and_who_failed(call: Call, run: str, tmp_path: Path) -> None:
    lines = told(call(run, "--step", "masks", "--format", "voc", "--to", str(tmp_path / "voc")))
    assert lines["written"].startswith("12 files, 3 images, ")
    assert lines["contents"] == "Annotations, ImageSets, SegmentationObject, SegmentationClass, images.csv"
    assert lines["left out"] == "1 failed images"
    assert "mask pixels covered" in lines["lost"]
    assert " on average, 0." in lines["mask IoU"]
    assert "at worst (image " in lines["mask IoU"]
    assert len(list((tmp_path / "voc" / "SegmentationObject").glob("*.png"))) == 3


def test_yolo_of_detections_takes_settings(call: Call, run: str, tmp_path: Path) -> None:
    lines = told(call(run, "min_score=6.5e-1", "--step", "found", "--format", "yolo", "--to", str(tmp_path / "yolo")))
    assert "boxes below min score" in lines["left out"]
    with open(tmp_path / "yolo" / "images.csv") as stream:
        files = [row["file"] for row in csv.DictReader(stream)]
    assert len(files) == len(list((tmp_path / "yolo" / "labels" / "trainval").glob("*.txt"))) == 3


@pytest.mark.parametrize("name", ["labelstudio", "label_studio"])
def test_label_studio_by_either_name_as_json(call: Call, run: str, tmp_path: Path, name: str) -> None:
    result = call(run, "--step", folder_of(run, "masks").name, "--format", name, "--to", str(tmp_path / "ls"), "--json")
    report = json.loads(result.stdout)
    assert (report["format"], report["step"]) == ("label_studio", folder_of(run, "masks").name)
    assert (report["images"], report["masks"], report["was_finished"]) == (3, report["boxes"], False)
    assert report["left_out"] == {"failed_images": 1}
    assert 0.9 < report["mask_iou"]["worst"] <= report["mask_iou"]["mean"] < 1
    assert report.items() >= storage.read_json(f"{report['folder']}/export.json").items()
    assert len(json.loads((tmp_path / "ls" / "tasks.json").read_text())) == 3


def test_the_most_uncertain_images_for_people_to_review(call: Call, run: str, tmp_path: Path) -> None:
    settings = ("most_uncertain=2", "image_prefix=/data/local-files/?d=images/")
    lines = told(call(run, "--step", "pgt", "--format", "label_studio", *settings, "--to", str(tmp_path / "ls")))
    assert lines["written"].startswith("2 files, 2 images, ")
    assert lines["left out"] == "2 less uncertain images"
    tasks = json.loads((tmp_path / "ls" / "tasks.json").read_text())
    assert all(task["data"]["image"].startswith("/data/local-files/?d=images/") for task in tasks)
    unsure = [task["data"]["uncertainty"] for task in tasks]
    assert unsure == sorted(unsure, reverse=True)
    assert len(unsure) == 2
    result = call(run, "--step", "pgt", "--format", "coco", "most_uncertain=2")
    assert "export: most_uncertain is for format label_studio, not coco" in result.stderr


def test_the_same_command_finds_the_finished_export(
    call: Call, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = call(run, "--step", "pgt", "--format", "coco", "--to", "out")
    file = tmp_path / "out" / "annotations" / "instances_trainval.json"
    written = file.stat().st_mtime_ns
    again = call("moved", "--step", "pgt", "--format", "coco", "--to", f"file://{tmp_path}/out")
    assert again.stdout.splitlines()[0].endswith(", which was finished before: nothing was written")
    assert told(again) == told(first)
    assert file.stat().st_mtime_ns == written
    assert "finished, skipped" in again.stderr
    manifest = folder_of(run, "export_pgt_coco") / "manifest.json"
    manifest.unlink()  # as if it had been killed
    assert told(call(run, "--step", "pgt", "--format", "coco", "--to", "out")) == told(first)
    assert file.stat().st_mtime_ns > written


def test_an_export_inside_a_run_that_is_renamed_moves_with_it(call: Call, run: str, tmp_path: Path) -> None:
    for to in ([], ["--to", f"{run}/labels"]):
        told(call(run, "--step", "pgt", "--format", "coco", *to))
    moved = tmp_path / "renamed"
    Path(run).rename(moved)
    for to, folder in (([], "export_pgt_coco-"), (["--to", f"{moved}/labels"], "labels")):
        again = call(str(moved), "--step", "pgt", "--format", "coco", *to)
        assert again.stdout.splitlines()[0].endswith(", which was finished before: nothing was written")
        assert f"-> {moved}/{folder}" in told(again)["written"]


def test_what_another_export_wrote_stays(call: Call, run: str, tmp_path: Path) -> None:
    to = str(tmp_path / "out")
    told(call(run, "--step", "pgt", "--format", "coco", "--to", to))
    file = tmp_path / "out" / "annotations" / "instances_trainval.json"
    before = file.read_bytes()
    result = call(run, "--step", "pgt", "--format", "coco", "min_score=0.7", "--to", to)
    assert result.exit_code == 2
    assert f"{to} holds annotations already, which this step did not write: name another folder" in result.stderr
    assert file.read_bytes() == before
    told(call(run, "--step", "pgt", "--format", "yolo", "--to", to))  # beside it, another format may lie


def test_an_export_into_the_dataset_is_refused(call: Call, run: str) -> None:
    [config] = [storage.read_json(str(path)) for path in Path(run).glob("images-*/config.json")]
    to = f"{config['settings']['root']}/VOC2007/Annotations/out"
    result = call(run, "--step", "pgt", "--format", "coco", "--to", to)
    assert result.exit_code == 2
    assert f"error: --to {to} lies inside the dataset's folder" in result.stderr


def test_a_finished_export_whose_files_are_gone_is_not_called_finished(call: Call, run: str, tmp_path: Path) -> None:
    command = (run, "--step", "pgt", "--format", "coco", "--to", str(tmp_path / "out"))
    told(call(*command))
    shutil.rmtree(tmp_path / "out" / "annotations")
    result = call(*command)
    assert result.exit_code == 2
    manifest = folder_of(run, "export_pgt_coco") / "manifest.json"
    assert f"annotations is gone from there: remove {manifest} and run the same command again" in result.stderr
    manifest.unlink()
    told(call(*command))
    shutil.rmtree(tmp_path / "out")
    told(call(*command[:5], "min_score=0.7", *command[5:]))
    result = call(*command)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "another export was written there since: name another folder by --to" in result.stderr


def test_as_many_images_may_fail_as_the_step_was_allowed(call: Call, run: str) -> None:
    told(call(run, "--step", "found", "--format", "coco"))
    config = storage.read_json(str(folder_of(run, "export_found_coco") / "config.json"))
    assert config["settings"]["max_failed"] == 0.5
    result = call(run, "--step", "found", "--format", "coco", "max_failed=0")
    assert result.exit_code == 3
    assert "1 of 4 rows failed, 0 may" in result.stderr


def test_variants_are_told_apart_and_one_is_named(call: Call, run: str) -> None:
    result = call(run, "--step", "best", "--format", "coco")
    assert result.exit_code == 2
    titles = sorted(path.name for path in Path(run).glob("best-*"))
    head, *lines = result.stderr.splitlines()
    assert head == "error: --step best: is finished in 2 variants: name one of them:"
    assert [line.split(":")[0].strip() for line in lines] == titles
    assert sorted(line.rsplit(", ", 1)[1] for line in lines) == ["threshold=0.3", "threshold=0.5"]
    assert all(" UTC, " in line for line in lines)
    told(call(run, "--step", titles[0], "--format", "coco"))
    (Path(run) / titles[0] / "manifest.json").unlink()
    assert call(run, "--step", "best", "--format", "coco").stdout.splitlines()[0].endswith(titles[1])


KNOWN = "finished steps that can be exported are best, found, imported, masks, pgt"


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        ("pgd", f"--step pgd: there is no such step in {{run}}: did you mean 'pgt'? {KNOWN}"),
        ("images", f"is of stage index, which writes images: only pgt and detections can be exported: {KNOWN}"),
        ("half", "is not finished ({run}/half-{half} has no manifest.json): run its run file again"),
        ("pgt-00000000", "there is no such step in {run}: did you mean 'pgt'? "),
    ],
)
def test_a_step_that_cannot_be_exported_is_told_with_those_that_can(
    call: Call, run: str, step: str, fault: str
) -> None:
    (Path(run) / "broken-0").mkdir()
    (Path(run) / "broken-0" / "config.json").write_text("{half")
    storage.write_json(f"{run}/older-0/config.json", {})
    before = sorted(Path(run).iterdir())
    result = call(run, "--step", step, "--format", "coco")
    assert (result.exit_code, result.stdout) == (2, "")
    assert fault.format(run=run, half=folder_of(run, "half").name.rpartition("-")[2]) in result.stderr
    assert KNOWN in result.stderr
    assert sorted(Path(run).iterdir()) == before


def test_a_folder_that_is_no_run_is_a_fault(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, fault in (("gone", "no step has been started there"), ("file", "a file, not the folder of a run")):
        result = call(str(tmp_path / name), "--step", "pgt", "--format", "coco")
        assert result.exit_code == 2
        assert f"error: {tmp_path / name}: {fault}" in result.stderr


@pytest.mark.parametrize(
    ("args", "faults"),
    [
        (["--format", "cocoa"], ["--format cocoa: there is no such format: formats are coco, coco_results, voc, yolo"]),
        (
            ["--format", "voc", "min_scor=1", "to=x", "pgt=other", "b", "split=[", "masks=true", "masks=false"],
            [
                "to=x: say it by --to",
                "pgt=other: say it by --step",
                "b: a setting has the form <key>=<value>: `weaksam stages export` lists the keys",
                "split=[: the value is not YAML",
                "masks=false: masks is given twice",
                "export.min_scor: unknown key: did you mean 'min_score'?",
            ],
        ),
        (["--format", "voc", "polygons=true"], ["export: polygons is for format coco, not voc"]),
        (["--format", "coco", "min_score=null"], ["export.min_score: input should be a valid number, got None"]),
    ],
)
def test_settings_that_are_wrong_are_told_before_anything_is_written(
    call: Call, run: str, args: list[str], faults: list[str]
) -> None:
    before = sorted(Path(run).iterdir())
    result = call(run, "--step", "pgt", *args)
    assert result.exit_code == 2
    for line, fault in zip(result.stderr.splitlines(), faults, strict=True):
        assert line.startswith(f"error: {fault}")
    assert sorted(Path(run).iterdir()) == before


def test_images_that_are_gone_and_configs_that_are_damaged_are_told(call: Call, run: str) -> None:
    images, pgt = folder_of(run, "images"), folder_of(run, "pgt")
    (images / "manifest.json").unlink()
    result = call(run, "--step", "pgt", "--format", "coco")
    assert result.exit_code == 2
    assert f"--step {pgt.name}: was made from the images of {images.name}, which is not finished" in result.stderr
    config = storage.read_json(f"{pgt}/config.json")
    storage.write_json(f"{pgt}/config.json", config | {"stage": "choose"})
    result = call(run, "--step", "pgt", "--format", "coco")
    assert (result.exit_code, "there is no stage 'choose'" in result.stderr) == (2, True)
    storage.write_json(f"{pgt}/config.json", {"stage": "pgt"})
    result = call(run, "--step", "pgt", "--format", "coco")
    assert (result.exit_code, "config.json: does not describe a step" in result.stderr) == (2, True)


def test_settings_that_are_no_longer_known_do_not_hinder_an_export(call: Call, run: str) -> None:
    uri = f"{folder_of(run, 'pgt')}/config.json"
    config = storage.read_json(uri)
    storage.write_json(uri, config | {"settings": config["settings"] | {"forgotten": 1}})
    told(call(run, "--step", "pgt", "--format", "coco"))


def test_an_export_starts_neither_torch_nor_ray(run: str) -> None:
    check = (
        "import sys; from weaksam.cli.main import app\n"
        f"app(['export', {run!r}, '--step', 'masks', '--format', 'coco'], standalone_mode=False)\n"
        "print('loaded:', [name for name in ('torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.endswith("loaded: []\n")
    assert "mask IoU  1.0000 on average" in done.stdout
