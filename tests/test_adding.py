"""What CONTRIBUTING.md says of adding things: a toy of each is one file and one line, in a copy of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from testing.places import ROOT

STAGE_PROGRAM = """
from PIL import Image
from weaksam import pipeline
from weaksam.core import storage
for name in "ab":
    Image.new("RGB", (8, 8)).save(f"data/{name}.png")
open("data/labels.csv", "w").write("file,labels\\na.png,cat;dog\\nb.png,cat\\n")
open("run.yaml", "w").write(
    "run: out\\nsteps:\\n  images: {stage: index, format: folder, root: data}\\n"
    "  count: {stage: count_labels, images: images}\\n"
)
steps = pipeline.load("run.yaml")
pipeline.run_steps(steps)
print(storage.read_json(storage.join(steps[1].folder, "count.json")))
"""
TEACHER_PROGRAM = """
from PIL import Image
from weaksam import pipeline
for name in "ab":
    Image.new("RGB", (8, 6)).save(f"data/{name}.png")
open("data/labels.csv", "w").write("file,labels\\na.png,cat;dog\\nb.png,cat\\n")
open("run.yaml", "w").write(
    "run: out\\nsteps:\\n  images: {stage: index, format: folder, root: data}\\n"
    "  teacher: {stage: teach_whole, images: images}\\n"
    "  pgt: {stage: pgt, images: images, detections: teacher, split: train}\\n"
)
steps = pipeline.load("run.yaml")
pipeline.run_steps(steps)
table = steps[-1].read()
print(table["classes"].to_pylist(), table["boxes"].to_pylist())
"""
DETECTOR_PROGRAM = """
from weaksam.core.config import parse_settings
from weaksam.stages import STAGES
raw = {"images": "i", "pgt": "p", "model": "whole_image", "roi_drop": {"gate": "and"}}
config, faults = parse_settings(STAGES["train_detector"].config, raw, where="steps.d")
assert not faults, faults
import sys
assert "torch" not in sys.modules
import torch
from weaksam.models.detectors.build import build_to_train
from weaksam.models.detectors.inference import detect_in_views
net = build_to_train(config.spec(3))
found = detect_in_views(net.eval(), torch.zeros(3, 32, 48, dtype=torch.uint8), config.kind.inference)
print(config.steps, found.boxes[0].tolist(), float(found.scores[0]))
"""
BACKBONE_PROGRAM = """
from weaksam.core.config import parse_settings
from weaksam.stages import STAGES
names = {"images": "i", "split": "train", "proposals": "p", "pgt": "p"}
def settings(stage, **own):
    known = {key: value for key, value in names.items() if key in STAGES[stage].config.model_fields}
    config, faults = parse_settings(STAGES[stage].config, known | own, where="steps.s")
    assert not faults, faults
    return config
import sys
wsod = settings("train_wsod", backbone="colours", dropblock="off")
joined = settings("train_wsod", backbone="colours+frozen_sam", dropblock="off", crop=64)
detector = settings("train_detector", backbone="colours")
assert "torch" not in sys.modules
import torch
from weaksam.models.detectors.base import Targets
from weaksam.models.detectors.build import build_to_train
from weaksam.models.wsod.network import METHODS
image, boxes = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.tensor([[0.0, 0, 32, 48], [8, 8, 60, 60]])
for config in (wsod, joined):
    net = config.spec(3).with_starting_weights().eval()
    print(net.pool([image], [boxes]).shape[1:], net.detect(image, boxes)[0].shape)
net = build_to_train(detector.spec(3)).train()
losses = net.losses([image], [Targets(boxes, torch.tensor([0, 2]))], 0)
print(sorted(losses), all(value.isfinite() for value in losses.values()))
"""
READER_PROGRAM = """
from PIL import Image
from weaksam import pipeline
from weaksam.core import schemas
from weaksam.pipeline.looking import look_at
from weaksam.stages import STAGES
for name in ("cat_1", "dog_1", "cat_2"):
    Image.new("RGB", (8, 8)).save(f"data/{name}.png")
open("run.yaml", "w").write("run: out\\nsteps:\\n  images: {stage: index, format: named, root: data}\\n")
steps = pipeline.load("run.yaml")
print(look_at(steps)[0][0])
pipeline.run_steps(steps)
table = steps[0].read()
print(schemas.class_names_of(table.schema), table.column("labels").to_pylist())
print(STAGES["index"].config.model_fields["format"].description.rpartition(", ")[2])
"""
WRITER_PROGRAM = """
import json
from PIL import Image
from weaksam import pipeline
from weaksam.cli.export_command import find_format
Image.new("RGB", (80, 40)).save("data/a.png")
open("data/labels.csv", "w").write("file,labels\\na.png,cat;dog\\n")
entry = {"image_id": "a.png", "category_id": 2, "bbox": [2, 4, 10, 20], "score": 0.5}
json.dump([entry], open("results.json", "w"))
open("run.yaml", "w").write(
    "run: out\\nsteps:\\n  images: {stage: index, format: folder, root: data}\\n"
    "  boxes: {stage: import_detections, images: images, results: results.json}\\n"
    "  files: {stage: export, images: images, detections: boxes, format: lines, to: written}\\n"
)
pipeline.run_steps(pipeline.load("run.yaml"))
print(open("written/boxes.txt").read(), end="")
print(find_format("lines"))
"""
SAM_PROGRAM = """
import numpy as np
from safetensors.torch import save_file
from weaksam.sam import EngineSettings, SamEngine, load_sam
from weaksam.sam.build import build_sam
from weaksam.stages.proposal_settings import SamSettings
save_file(build_sam("vit_toy").state_dict(), "toy.safetensors")
settings = SamSettings(model="vit_toy", checkpoint="toy.safetensors")
engine = SamEngine(load_sam(settings.model, settings.checkpoint), settings=EngineSettings(points_per_side=2))
print(engine.sam.image_encoder.img_size)
"""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "weaksam", tmp_path / "weaksam", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    return tmp_path


def put_toy(copied: Path, name: str, folder: str) -> None:
    shutil.copy(ROOT / "tests" / "toys" / f"{name}.py", copied / "weaksam" / folder)


def add_line(path: Path, after: str, line: str) -> None:
    text = path.read_text()
    assert text.count(after) == 1
    path.write_text(text.replace(after, after + line))


def output_of(program: str, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_a_stage(copied: Path) -> None:
    put_toy(copied, "count_labels", "stages")
    add_line(copied / "weaksam/stages/__init__.py", '    "hygiene",\n', '    "count_labels",\n')
    assert output_of(STAGE_PROGRAM, copied) == "{'labels': 3}\n"


def test_a_teacher(copied: Path) -> None:
    put_toy(copied, "teach_whole", "stages")
    add_line(copied / "weaksam/stages/__init__.py", '    "hygiene",\n', '    "teach_whole",\n')
    assert (
        output_of(TEACHER_PROGRAM, copied)
        == "[[0, 1], [0]] [[[0.0, 0.0, 8.0, 6.0], [0.0, 0.0, 8.0, 6.0]], [[0.0, 0.0, 8.0, 6.0]]]\n"
    )


def test_a_detector(copied: Path) -> None:
    put_toy(copied, "whole_image", "models/detectors/catalogue")
    add_line(copied / "weaksam/models/detectors/catalogue/__init__.py", '    "mask2former",\n', '    "whole_image",\n')
    assert output_of(DETECTOR_PROGRAM, copied) == "7 [0.0, 0.0, 48.0, 32.0] 0.5\n"


def test_a_backbone(copied: Path) -> None:
    put_toy(copied, "colours", "models/backbones/catalogue")
    path = copied / "weaksam/models/backbones/catalogue/__init__.py"
    add_line(path, '    "efficientnet_lite0",\n', '    "colours",\n')
    assert output_of(BACKBONE_PROGRAM, copied).splitlines() == [
        "torch.Size([6, 8, 8]) torch.Size([2, 3])",
        "torch.Size([102, 8, 8]) torch.Size([2, 3])",
        "['loss_box_reg', 'loss_classifier', 'loss_objectness', 'loss_rpn_box_reg'] True",
    ]


def test_a_dataset_format(copied: Path) -> None:
    put_toy(copied, "named", "data/readers")
    add_line(copied / "weaksam/data/readers/__init__.py", '    "voc_folder",\n', '    "named",\n')
    assert output_of(READER_PROGRAM, copied).splitlines() == [
        "images: looked at the names and the names of 3 images; not at the images themselves",
        "['cat', 'dog'] [[0], [0], [1]]",
        "`named` (images whose names begin with their label).",
    ]


def test_an_export_format(copied: Path) -> None:
    put_toy(copied, "lines", "data/writers")
    add_line(copied / "weaksam/data/writers/__init__.py", '    "label_studio",\n', '    "lines",\n')
    assert output_of(WRITER_PROGRAM, copied) == "1 0.5 2.0 4.0 12.0 24.0\nlines\n"


def test_a_size_of_sam(copied: Path) -> None:
    line = '    "vit_toy": SamVariant(32, 2, 2, (1,), image_size=64, prompt_dim=32, decoder_mlp_dim=32),\n'
    add_line(copied / "weaksam/sam/variants.py", "VARIANTS: dict[str, SamVariant] = {\n", line)
    assert output_of(SAM_PROGRAM, copied) == "64\n"
