"""A report of a run folder holds what the folder holds, and needs nothing but itself."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.report.conftest import BROKEN, COPIES, STRANGE
from weaksam.cli.main import app
from weaksam.core import storage
from weaksam.errors import ConfigError
from weaksam.report.page import features_of, render, step_row, total_row
from weaksam.report.run_files import read_run


@pytest.fixture(scope="module")
def page(report_file: Path) -> str:
    return report_file.read_text()


def section(page: str, name: str) -> str:
    (found,) = re.findall(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL)
    return found


def test_steps_come_after_those_they_read(run_folder: Path) -> None:
    names = [one.name for one in read_run(str(run_folder))]
    assert names[0] == "images"
    assert names.index("proposals") < names.index("oicr") < names.index("boxes") < names.index("pgt")


def test_every_step_is_told_with_its_rows_and_failures(page: str, run_folder: Path) -> None:
    told = section(page, "pipeline")
    for one in read_run(str(run_folder)):
        assert f'<th scope="row">{one.name}</th>' in told
    (row,) = re.findall(r'<tr><th scope="row">proposals</th>.*?</tr>', told, re.DOTALL)
    assert ">12</td>" in row
    assert '<td class="number bad">1</td>' in row
    assert BROKEN in section(page, "failures")
    assert "cut short &lt;b&gt;here&lt;/b&gt;" in section(page, "failures")
    assert "<b>here" not in page


def test_a_step_costs_what_the_gpus_of_its_cluster_cost_meanwhile(run_folder: Path) -> None:
    one = next(one for one in read_run(str(run_folder)) if one.name == "proposals")
    assert one.manifest is not None
    rented = {"nodes": 3, "CPU": 24.0, "GPU": 2.0}
    told = step_row(replace(one, manifest={**one.manifest, "seconds": 5400.0, "cluster": rented}), 2.5)
    assert (told["gpu_hours"], told["cost"], told["time"]) == (3.0, 7.5, "1.5 h")
    assert told["cluster"] == "3 nodes, 24 CPU, 2 GPU"
    assert step_row(replace(one, manifest={**one.manifest, "cluster": None}), 2.5)["cost"] is None  # without one
    assert total_row([told, step_row(one, 2.5)])["cost"] == 7.5


@pytest.mark.parametrize(
    ("settings", "features"),
    [
        ({}, ""),
        ({"backbone": "efficientnet_lite0"}, "EfficientNet-Lite0 (ImageNet)"),
        ({"backbone": "efficientnet_lite0+frozen_sam"}, "EfficientNet-Lite0 (ImageNet), the small SAM (drawn scenes)"),
        ({"backbone": "resnet50"}, "resnet50"),
        ({"sam": {"model": "vit_xs", "checkpoint": None}}, "the small SAM (drawn scenes)"),
        ({"sam": {"model": "vit_xs", "checkpoint": "s3://b/own.pth"}}, "vit_xs of s3://b/own.pth"),
        ({"sam": {"model": "vit_b", "checkpoint": "b.pth"}}, "vit_b of b.pth"),
    ],
)
def test_a_step_says_which_features_it_has(settings: dict, features: str) -> None:
    assert features_of(settings) == features


def test_figures_are_those_of_the_evaluations(page: str, run_folder: Path) -> None:
    told = section(page, "results")
    for name, key in (("recall", "recall@0.5"), ("boxes_ap", "AP50"), ("pgt_quality", "precision@0.5")):
        (folder,) = run_folder.glob(f"{name}-*")
        value = json.loads((folder / "metrics.json").read_text())["metrics"][key]
        assert f"{100 * value:.1f}%" in told, name
    for title in (
        "Recall against budget",
        "Precision and recall of boxes",
        "Quality of pseudo",
        "Scores",
        "Training: oicr",
    ):
        assert title in told


def test_cards_show_every_stage_beside_the_ground_truth(page: str) -> None:
    shown = section(page, "images")
    (strange,) = re.findall(rf"<article[^>]*>\s*<h3>{STRANGE}</h3>.*?</article>", shown, re.DOTALL)
    assert 'aria-label="boxes: nothing"' in strange
    assert 'data-groups="worst' in shown or "|worst" in shown
    (card,) = re.findall(r"<article[^>]*>\s*<h3>000000</h3>.*?</article>", page, re.DOTALL) or [strange]
    for step in ("ground truth", "proposals", "boxes"):
        assert f'data-step="{step}"' in card
    assert 'class="mask"' in shown  # of the ground truth
    for group in ("examples", "best", "worst", "most uncertain"):
        assert re.search(rf'data-groups="[^"]*{group}', shown), group


def test_duplicates_across_splits_and_classes_without_images_are_told(page: str) -> None:
    told = section(page, "dataset")
    assert "1 group of duplicates, 1 of them in more than one split" in told
    assert ", ".join(COPIES) in told
    assert 'class="bad">test, trainval</td>' in told
    assert "240 to 240" in told
    assert "Images by class" in told


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert links
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)
    assert "default-src 'none'" in page
    assert not re.search(r"url\((?!#)", page)
    assert not re.search(r"@import|fetch\(|XMLHttpRequest", page)


def test_an_unfinished_run_and_one_without_ground_truth_have_reports_too(run_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    for name in ("boxes", "boxes_ap", "pgt", "pgt_quality", "recall"):
        (folder,) = copy.glob(f"{name}-*")
        shutil.rmtree(folder) if name != "boxes" else (folder / "manifest.json").unlink()
    (truth,) = copy.glob("images-*/ground_truth")
    shutil.rmtree(truth)
    page = render(str(copy), images=2)
    assert "No evaluate step is finished" in page
    assert ">unfinished</td>" in page
    assert "ground truth</label>" not in page
    assert len(re.findall("<article", page)) == 2


def test_an_image_that_is_gone_is_left_out(run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tmp_path / "moved"
    shutil.copytree(run_folder.parent, base)
    page = render(str(base / "run"), images=2)
    before = page.count("<article")
    victims = re.findall(r"<h3>(\d{6})</h3>", page)
    shutil.move(run_folder.parent / "data", tmp_path / "aside")
    try:
        page = render(str(base / "run"), images=2)
    finally:
        shutil.move(tmp_path / "aside", run_folder.parent / "data")
    assert before == len(victims) > 0
    assert "<article" not in page
    assert "Failed rows" in page


def test_of_two_variants_the_newer_is_told(run_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    (pgt,) = copy.glob("pgt-*")
    newer = copy / "pgt-00000000"
    shutil.copytree(pgt, newer)
    (newer / "config.json").touch()
    told = {one.name: one.step.folder for one in read_run(str(copy)) if one.step.name == "pgt"}
    assert sorted(told) == sorted([pgt.name, newer.name])  # the older one is what pgt_quality was made from
    shutil.rmtree(next(copy.glob("pgt_quality-*")))
    told = {one.name: one.step.folder for one in read_run(str(copy)) if one.step.name == "pgt"}
    assert told == {"pgt": storage.absolute(str(newer))}


def test_the_command_says_where_the_report_is_and_what_is_wrong(run_folder: Path, tmp_path: Path) -> None:
    to = tmp_path / "out" / "mine.html"
    told = CliRunner().invoke(app, ["report", str(run_folder), "--to", str(to), "--images", "1"])
    assert told.exit_code == 0, told.output
    assert told.stdout.strip() == str(to)
    assert to.read_text().startswith("<!doctype html>")
    empty = CliRunner().invoke(app, ["report", str(tmp_path / "nothing")])
    assert empty.exit_code == 2
    with pytest.raises(ConfigError, match="no step has been started there"):
        render(str(tmp_path / "nothing"))
