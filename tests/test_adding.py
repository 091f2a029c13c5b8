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
TEACHER = '''"""images -> detections: the whole image is each of its labels."""

from typing import Annotated

import pyarrow as pa

from weaksam.core import schemas, tables
from weaksam.core.config import Reads, StageConfig
from weaksam.core.step import Outcome, Stage, Step
from weaksam.data.datasets import fill_sizes


class TeachWholeConfig(StageConfig):
    """Finds every label of an image in the whole image."""

    images: Annotated[str, Reads("images")]
    """The `index` step with the images."""


def run(step: Step) -> Outcome:
    images = fill_sizes(step.inputs["images"].read(["uri", "labels", "height", "width"]).combine_chunks())
    rows = [
        {
            "image_id": row["image_id"], "status": schemas.OK, "message": "",
            "height": row["height"], "width": row["width"], "classes": row["labels"],
            "boxes": [[0, 0, row["width"], row["height"]]] * len(row["labels"]), "scores": [0.5] * len(row["labels"]),
        }
        for row in images.to_pylist()
    ]
    names = schemas.class_names_of(images.schema)
    schema = schemas.with_metadata(schemas.DETECTIONS, fingerprint=step.fingerprint, class_names=names)
    parts = [tables.write_part(step.folder, pa.Table.from_pylist(rows, schema))]
    return Outcome(rows=len(rows), parts=parts, summary=f"{len(rows)} images")


STAGE = Stage("teach_whole", 1, TeachWholeConfig, run, writes="detections")
'''
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
BACKBONE = '''"""Colours of cells of 8 and 16 pixels."""

from weaksam.models.backbones.catalogue.kind import BackboneKind


def _crops(side):
    import torch
    import torch.nn.functional as F

    class Colours(torch.nn.Module):
        mean = std = (127.5, 127.5, 127.5)
        crop_channels, crop_strides = (3, 3), (8, 16)

        def at_once(self, device):
            return 64

        def crop_maps(self, crops):
            return [F.avg_pool2d(crops, stride) for stride in self.crop_strides]

        def load_pretrained(self):
            pass

    return Colours()


def _pyramid(frozen_stages, finest):
    import torch.nn.functional as F

    from weaksam.models.backbones.pyramids import Pyramid

    class Colours(Pyramid):
        channels, strides = (3, 3), (8, 16)

        def forward(self, pixels):
            return [F.avg_pool2d(pixels, stride) for stride in self.strides]

        def load_pretrained(self):
            pass

    return Colours()


KIND = BackboneKind("colours", "mean colours", crops=_crops, crops_key="colours", pyramid=_pyramid)
'''
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
READER = '''"""A folder of images whose names begin with their label: cat_1.png."""

from weaksam.core import storage
from weaksam.data.datasets import ImageRecord, make_dataset
from weaksam.data.readers.format import DatasetFormat, look_by_reading


def _read(source):
    files = [file for file in storage.list_files(source.root) if file.path.endswith(".png")]
    labels = [file.path.split("_")[0] for file in files]
    records = [
        ImageRecord(file.path, file.uri, "train", file.size, [label], file.uri)
        for file, label in zip(files, labels, strict=True)
    ]
    return make_dataset(records, source.classes or sorted(set(labels)))


def _look(source):
    return look_by_reading(_read, source, "the names")


FORMAT = DatasetFormat("named", "images whose names begin with their label", _read, _look)
'''
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
WRITER = '''"""A text file of scores and corners, one line for each box."""

from collections import Counter

import numpy as np

from weaksam.core import storage
from weaksam.data.writers.common import ReadBack
from weaksam.data.writers.format import ExportFormat


class Lines:
    targets = ("boxes.txt",)
    box_tolerance = 0.0
    verified = "everything but masks, line by line"

    def __init__(self, request):
        self.uri = storage.join(request.to, "boxes.txt")
        self.files, self.lost, self.lines = 0, Counter(), []

    def write(self, images):
        for image in images:
            columns = (image.classes.tolist(), image.scores.tolist(), image.boxes.tolist())
            for label, score, box in zip(*columns, strict=True):
                self.lines.append(f"{label} {score} {' '.join(map(str, box))}\\n")

    def finish(self):
        storage.write_bytes(self.uri, "".join(self.lines).encode())
        self.files = 1
        self.rest = storage.read_bytes(self.uri).decode().splitlines()

    def read(self, images):
        for image in images:
            count = len(image.boxes)
            rows = np.array([line.split() for line in self.rest[:count]], float).reshape(-1, 6)
            self.rest = self.rest[count:]
            yield ReadBack(rows[:, 2:], rows[:, 0].astype(int).tolist(), rows[:, 1])

    def expected_masks(self, image):
        return image.masks

    def check_rest(self):
        if self.rest:
            raise ValueError(f"{self.uri} has more lines")


FORMAT = ExportFormat("lines", "a text file of boxes", Lines)
'''
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


def test_a_teacher(copied: Path) -> None:
    (copied / "weaksam/stages/teach_whole.py").write_text(TEACHER)
    add_line(copied / "weaksam/stages/__init__.py", '    "hygiene",\n', '    "teach_whole",\n')
    assert (
        output_of(TEACHER_PROGRAM, copied)
        == "[[0, 1], [0]] [[[0.0, 0.0, 8.0, 6.0], [0.0, 0.0, 8.0, 6.0]], [[0.0, 0.0, 8.0, 6.0]]]\n"
    )


def test_a_detector(copied: Path) -> None:
    (copied / "weaksam/models/detectors/catalogue/whole_image.py").write_text(DETECTOR)
    add_line(copied / "weaksam/models/detectors/catalogue/__init__.py", '    "mask2former",\n', '    "whole_image",\n')
    assert output_of(DETECTOR_PROGRAM, copied) == "7 [0.0, 0.0, 48.0, 32.0] 0.5\n"


def test_a_backbone(copied: Path) -> None:
    (copied / "weaksam/models/backbones/catalogue/colours.py").write_text(BACKBONE)
    path = copied / "weaksam/models/backbones/catalogue/__init__.py"
    add_line(path, '    "efficientnet_lite0",\n', '    "colours",\n')
    assert output_of(BACKBONE_PROGRAM, copied).splitlines() == [
        "torch.Size([6, 8, 8]) torch.Size([2, 3])",
        "torch.Size([102, 8, 8]) torch.Size([2, 3])",
        "['loss_box_reg', 'loss_classifier', 'loss_objectness', 'loss_rpn_box_reg'] True",
    ]


def test_a_dataset_format(copied: Path) -> None:
    (copied / "weaksam/data/readers/named.py").write_text(READER)
    add_line(copied / "weaksam/data/readers/__init__.py", '    "voc_folder",\n', '    "named",\n')
    assert output_of(READER_PROGRAM, copied).splitlines() == [
        "images: looked at the names and the names of 3 images; not at the images themselves",
        "['cat', 'dog'] [[0], [0], [1]]",
        "`named` (images whose names begin with their label).",
    ]


def test_an_export_format(copied: Path) -> None:
    (copied / "weaksam/data/writers/lines.py").write_text(WRITER)
    add_line(copied / "weaksam/data/writers/__init__.py", '    "label_studio",\n', '    "lines",\n')
    assert output_of(WRITER_PROGRAM, copied) == "1 0.5 2.0 4.0 12.0 24.0\nlines\n"


def test_a_size_of_sam(copied: Path) -> None:
    line = '    "vit_toy": SamVariant(32, 2, 2, (1,), image_size=64, prompt_dim=32, decoder_mlp_dim=32),\n'
    add_line(copied / "weaksam/sam/variants.py", "VARIANTS: dict[str, SamVariant] = {\n", line)
    assert output_of(SAM_PROGRAM, copied) == "64\n"
