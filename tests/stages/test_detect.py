"""Using a trained detector as a stage: which keys it needs, a row for each image, several views of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from tests.stages.detector_steps import MODELS, make_inputs, make_step
from weaksam import pipeline
from weaksam.core import schemas
from weaksam.core.step import Step
from weaksam.errors import ConfigError
from weaksam.execution.mapping import map_batch
from weaksam.models.detectors.base import Detections, Detector
from weaksam.models.detectors.build import build_to_train
from weaksam.models.detectors.catalogue import kind_of
from weaksam.models.detectors.inference import detect_in_views
from weaksam.models.detectors.rules import InferenceRules
from weaksam.ops.rle import decode_rle
from weaksam.stages.detect import DetectConfig, DetectObjects, DetectorFinder


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Step]:
    return make_inputs(tmp_path)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("", "steps.found.detector: required: set it in the file or on the command line as steps.found.detector=..."),
        (
            ", detector: mist",
            "steps.found.proposals: required: step 'mist' trained a weakly supervised detector, which rates proposals: "
            "name the step with those of these images",
        ),
        (
            ", detector: net, proposals: proposals",
            "steps.found.proposals: the detector of step 'net' finds objects without proposals: remove the key",
        ),
        (
            ", detector: proposals",
            "steps.found.detector: needs a step that writes wsod or detector, 'proposals' writes proposals",
        ),
        (", detector: mist, proposals: proposals", None),
        (", detector: net", None),
    ],
)
def test_a_detector_has_proposals_if_it_needs_them(tmp_path: Path, given: str, fault: str | None) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run: {tmp_path}/run\n"
        "steps:\n"
        "  images: {stage: index, format: folder, root: data}\n"
        "  proposals: {stage: proposals, images: images, sam: {model: vit_xs}}\n"
        "  mist: {stage: train_wsod, images: images, proposals: proposals, split: train}\n"
        "  pgt: {stage: pgt, images: images, detections: found, split: train}\n"
        "  net: {stage: train_detector, images: images, pgt: other}\n"
        "  other: {stage: pgt, images: images, detections: first, split: train}\n"
        "  first: {stage: detect, images: images, proposals: proposals, detector: mist}\n"
        f"  found: {{stage: detect, images: images{given}}}\n"
    )
    if fault is None:
        assert "found" in pipeline.parse(str(path)).steps
        return
    with pytest.raises(ConfigError) as caught:
        pipeline.parse(str(path))
    assert caught.value.faults == [fault]


def test_an_old_key_of_detect_is_answered_with_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run: {tmp_path}\n"
        "steps: {found: {stage: detect, images: images, proposals: proposals, checkpoint: mist}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        pipeline.parse(str(path))
    assert "steps.found.checkpoint: unknown key: it is now `detector`" in caught.value.faults


@pytest.mark.parametrize("model", MODELS)
def test_detections_come_from_every_readable_image(tmp_path: Path, inputs: dict[str, Step], model: str) -> None:
    trained = make_step(tmp_path, inputs, model=model).config
    weights = tmp_path / "model.safetensors"
    save_file({k: v.contiguous() for k, v in build_to_train(trained.spec(2)).state_dict().items()}, weights)
    wanted = {"max_detections": 5, "score_threshold": 0.0, "nms_threshold": 1.0}
    config = DetectConfig(images="i", detector="d", scales=[64, 80], flip=True, **wanted)
    schema = schemas.with_metadata(schemas.DETECTIONS, fingerprint="d", class_names=["red", "blue"])
    mapper = DetectObjects(config, DetectorFinder(trained, 2, str(weights), config.rules(kind_of(model).inference)))
    good = (tmp_path / "0.png").read_bytes()
    batch = pa.table(
        {
            "image_id": ["0", "1", "2"],
            "data": pa.array([good, b"junk", None], pa.binary()),
            "status": ["ok", "ok", "not_found"],
            "message": ["", "", "gone"],
        }
    )
    table = map_batch(mapper, batch, schema=schema, max_pixels=config.max_pixels)
    assert table.schema.equals(schema)
    rows = table.to_pylist()
    assert [row["status"] for row in rows] == ["ok", "unreadable", "not_found"]
    assert len(rows[0]["boxes"]) == 5
    assert rows[0]["scores"] == sorted(rows[0]["scores"], reverse=True)
    boxes = np.array(rows[0]["boxes"])
    assert boxes.min() >= 0
    assert boxes.max() <= 64 + 1e-3
    masks = rows[0]["masks"]
    assert (masks is not None) == (kind_of(model).learns_masks)
    for mask in masks or []:
        assert decode_rle(mask, 64, 64).any() or model == "mask_rcnn"  # untrained masks may be empty


class Corner(Detector):
    """Finds the bright corner of a picture, wherever it is: a detector whose answer is known."""

    def detect(self, images: Any, mask_sizes: Any = None) -> list[Detections]:
        found = []
        for image, hw in zip(images, mask_sizes, strict=True):
            rows, columns = (image[0] > 200).nonzero(as_tuple=True)
            box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
            mask = torch.nn.functional.interpolate(image[None, :1].float(), hw)[0] > 100
            found.append(Detections(box[None], torch.tensor([1]), torch.tensor([image.shape[1] / 1000]), mask))
        return found


def test_what_several_views_show_is_one_object_in_the_images_own_pixels() -> None:
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    image[:, :10, :20] = 255
    rules = InferenceRules(scales=(40, 80, 120), max_side=1000, nms_threshold=0.5)
    found = detect_in_views(Corner(), image, rules)
    assert (len(found.boxes), found.classes.tolist(), found.scores.tolist()) == (1, [1], [pytest.approx(0.12)])
    assert torch.allclose(found.boxes[0], torch.tensor([0.0, 0, 20, 10]), atol=1)
    assert found.masks is not None
    assert torch.equal(found.masks[0], image[0] > 0)
    every = detect_in_views(Corner(), image, InferenceRules(scales=(40, 80), max_side=1000, nms_threshold=1.0))
    assert len(every.boxes) == 4
    assert every.masks is not None
    assert all((mask != (image[0] > 0)).sum() <= 40 for mask in every.masks)  # those of mirrored views are mirrored
    assert every.scores.tolist() == sorted(every.scores.tolist(), reverse=True)
