"""What CONTRIBUTING.md says of adding things: a toy of each is one file and one line, in a copy of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from testing.places import ROOT

STAGE = '''"""images -> labels: counts labels."""

from typing import Annotated

from weaksam.core import storage
from weaksam.core.config import Reads, StageConfig
from weaksam.core.step import Outcome, Stage, Step


class CountConfig(StageConfig):
    """Counts the labels of a dataset."""

    images: Annotated[str, Reads("images")]
    """The `index` step with the images."""
    at_least: int = 0
    """Fewer labels are an error."""


def run(step: Step) -> Outcome:
    images = step.inputs["images"].read(["labels"])
    count = sum(map(len, images.column("labels").to_pylist()))
    storage.write_json(storage.join(step.folder, "count.json"), {"labels": count})
    return Outcome(rows=images.num_rows, summary=f"{count} labels")


STAGE = Stage("count_labels", 1, CountConfig, run, writes="count")
'''
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
DETECTOR = '''"""A detector of one box: the whole image."""

from weaksam.models.detectors.catalogue.kind import DetectorKind


def _build(spec, rules):
    import torch

    from weaksam.models.detectors.base import Detections, Detector

    class WholeImage(Detector):
        num_classes = spec.num_classes

        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.zeros(spec.num_classes))

        def detect(self, images, mask_sizes=None):
            scores = self.logits.sigmoid().max(0)
            boxes = [torch.tensor([[0.0, 0.0, image.shape[2], image.shape[1]]]) for image in images]
            return [Detections(box, scores.indices[None], scores.values[None]) for box in boxes]

    return WholeImage()


KIND = DetectorKind("whole_image", _build, recipe={"steps": 7}, has_roi_drop=True)
'''
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
    (copied / "weaksam/stages/count_labels.py").write_text(STAGE)
    add_line(copied / "weaksam/stages/__init__.py", '    "hygiene",\n', '    "count_labels",\n')
    assert output_of(STAGE_PROGRAM, copied) == "{'labels': 3}\n"


def test_a_detector(copied: Path) -> None:
    (copied / "weaksam/models/detectors/catalogue/whole_image.py").write_text(DETECTOR)
    add_line(copied / "weaksam/models/detectors/catalogue/__init__.py", '    "mask2former",\n', '    "whole_image",\n')
    assert output_of(DETECTOR_PROGRAM, copied) == "7 [0.0, 0.0, 48.0, 32.0] 0.5\n"


def test_a_size_of_sam(copied: Path) -> None:
    line = '    "vit_toy": SamVariant(32, 2, 2, (1,), image_size=64, prompt_dim=32, decoder_mlp_dim=32),\n'
    add_line(copied / "weaksam/sam/variants.py", "VARIANTS: dict[str, SamVariant] = {\n", line)
    assert output_of(SAM_PROGRAM, copied) == "64\n"
