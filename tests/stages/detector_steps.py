"""Steps for tests of detectors: images with pseudo ground truth, and a training on them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.models.pictures import masked_pictures
from tests.stages.test_train_wsod import finished
from weaksam.core import schemas
from weaksam.core.step import Step
from weaksam.ops.rle import encode_rle
from weaksam.stages import train_detector
from weaksam.stages.train_detector import TrainDetectorConfig

POOL = ThreadPoolExecutor(2)
MODELS = ("faster_rcnn", "dino", "rt_detr_v2", "mask_rcnn", "mask2former")


def make_inputs(folder: Path) -> dict[str, Step]:
    """Six pictures with two boxes and masks each; of one no box was found, one could not be read."""
    pixels, targets = masked_pictures(6, side=64)
    images, boxes = [], []
    for i, (image, target) in enumerate(zip(pixels, targets, strict=True)):
        path = folder / f"{i}.png"
        Image.fromarray(image.numpy().transpose(1, 2, 0)).save(path)
        images.append({"image_id": str(i), "uri": str(path), "split": "train", "labels": [0, 1]})
        row = {"image_id": str(i), "status": "ok", "boxes": target.boxes.numpy(), "classes": target.classes.numpy()}
        assert target.masks is not None
        row |= {"height": 64, "width": 64, "masks": [encode_rle(mask) for mask in target.masks.numpy()]}
        boxes.append(row | {"scores": np.array([0.9, 0.8], np.float32)})
    boxes[2] |= {"boxes": np.zeros((0, 4), np.float32), "classes": [], "scores": [], "masks": []}
    boxes[4] = {"image_id": "4", "status": "oom", "message": ""}
    index = finished(folder, "images", images, schemas.IMAGES, {})
    return {"images": index, "pgt": finished(folder, "pgt", boxes, schemas.DETECTIONS, {"images": index})}


def make_step(folder: Path, inputs: dict[str, Step], **changes: Any) -> Step:
    settings = {"images": "images", "pgt": "pgt", "backbone": "frozen_sam", "scales": [64, 80], "steps": 4}
    settings |= {"batch_size": 2}
    settings |= {"lr": 1e-3, "warmup": 1, "milestones": None, "log_every": 2, "clip": 1.0, "square": None}
    config = TrainDetectorConfig.model_validate(settings | changes)
    return Step("net", train_detector.STAGE, config, inputs, {}, "n", str(folder / "net-n"))
