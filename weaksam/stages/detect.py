"""images, a trained detector, and proposals if it needs them -> detections: boxes with a class and a score."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from weaksam.core import schemas, storage, tables
from weaksam.core.config import Reads, StageConfig
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import ConfigError, ImageError
from weaksam.execution import metrics
from weaksam.execution.pools import PoolResources
from weaksam.stages.checks import check_rows, check_same_classes, with_states
from weaksam.stages.train_detector import TrainDetectorConfig
from weaksam.stages.train_wsod import TrainWsodConfig

if TYPE_CHECKING:
    from torch import Tensor

    from weaksam.models.detectors.base import Found
    from weaksam.models.detectors.inference import DetectRules

log = logging.getLogger(__name__)

# How each kind of detector is published to be tested, Faster R-CNN on VOC; MIST: `DetectRules` itself.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "wsod": {},
    "faster_rcnn": {"scales": (480, 576, 688, 864, 1000, 1200), "max_side": 2000, "flip": True, "score_threshold": 0.05,
                    "nms_threshold": 0.5, "max_detections": 100},
    "dino": {"scales": (800,), "max_side": 1333, "flip": False, "score_threshold": 0.0, "nms_threshold": 0.6,
             "max_detections": 300},
    "mask_rcnn": {"scales": (800,), "max_side": 1333, "flip": False, "score_threshold": 0.05, "nms_threshold": 0.5,
                  "max_detections": 100},
    "mask2former": {"scales": (800,), "max_side": 1333, "flip": False, "score_threshold": 0.0, "nms_threshold": 0.6,
                    "max_detections": 100},
    "rt_detr_v2": {"scales": (640,), "max_side": 1333, "flip": False, "score_threshold": 0.0, "nms_threshold": 0.6,
                   "max_detections": 300},
}  # fmt: skip


class DetectConfig(StageConfig):
    """Finds objects with a trained detector, weakly supervised or retrained.

    Every image may be seen at several sizes, and mirrored. Of a weakly supervised detector the scores of the proposals
    are averaged over the views; what any other finds in them is put together. Image-level labels are not used. What is
    left out is as the detector was published.
    """

    images: Annotated[str, Reads("images")]
    """The `index` step whose images are used."""
    proposals: Annotated[str | None, Reads("proposals")] = None
    """The step with the proposals of these images; goes with `checkpoint`."""
    checkpoint: Annotated[str | None, Reads("wsod")] = None
    """The step that trained the weakly supervised detector."""
    detector: Annotated[str | None, Reads("detector")] = None
    """The step that trained any other detector."""
    split: str | None = None
    """Only images of this split; all when left out."""
    scales: list[int] | None = Field(default=None, min_length=1)
    """Lengths of the shorter side of the views, pixels."""
    max_side: int | None = Field(default=None, ge=32)
    """The longer side of a view is at most this, pixels."""
    flip: bool | None = None
    """Whether each view is seen mirrored too."""
    score_threshold: float | None = Field(default=None, ge=0, le=1)
    """Detections score more than this."""
    nms_threshold: float | None = Field(default=None, gt=0, le=1)
    """Of two boxes of a class that overlap by more than this IoU the lower-scored one is dropped; a DETR's of one view
    all stay."""
    max_detections: int | None = Field(default=None, ge=1)
    """Most detections of an image."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Larger images are refused with status `too_large`."""
    resources: PoolResources = PoolResources()
    """Where it runs."""

    @model_validator(mode="after")
    def _has_one_detector(self) -> DetectConfig:
        if (self.checkpoint is None) == (self.detector is None):
            raise ValueError("one of checkpoint and detector is to find objects")
        if (self.checkpoint is None) != (self.proposals is None):
            raise ValueError("proposals go with checkpoint, the step of a weakly supervised detector")
        return self

    def rules(self, kind: str) -> DetectRules:
        """What is wanted of a kind of detector, a key of `_PUBLISHED`."""
        from weaksam.models.detectors.inference import DetectRules

        given = {key: value for key in DetectRules.__dataclass_fields__ if (value := getattr(self, key)) is not None}
        given |= {"scales": tuple(given["scales"])} if "scales" in given else {}
        return DetectRules(**_PUBLISHED[kind] | given)


Find = Callable[["Tensor", np.ndarray], "Found"]  # an image (3, H, W) uint8 and proposals on it (N, 4) -> detections


@dataclass(frozen=True)
class WsodFinder:
    """Makes a function that finds objects with a weakly supervised detector; picklable."""

    trained: TrainWsodConfig
    num_classes: int
    uri: str
    rules: DetectRules

    def __call__(self, device: str) -> Find:
        """The function, on a device."""
        import torch

        from weaksam.data.proposal_boxes import clean_boxes
        from weaksam.models.detectors.inference import detect_objects

        net = self.trained.spec(self.num_classes).trained(storage.fetch(self.uri)).to(device)

        def find(image: Tensor, found: np.ndarray) -> Found:
            boxes, _ = clean_boxes(found, image.shape[1], image.shape[2], min_side=self.trained.min_side)
            return detect_objects(net, image, torch.from_numpy(boxes).to(device), self.rules)

        return find


@dataclass(frozen=True)
class DetectorFinder:
    """Makes a function that finds objects with any other detector; picklable."""

    trained: TrainDetectorConfig
    num_classes: int
    uri: str
    rules: DetectRules

    def __call__(self, device: str) -> Find:
        """The function, on a device."""
        from weaksam.models.detectors.faster_rcnn import FoundRules
        from weaksam.models.detectors.inference import detect_in_views

        rules = self.rules
        found = FoundRules(rules.score_threshold, rules.nms_threshold, rules.max_detections)
        net = self.trained.spec(self.num_classes).trained(storage.fetch(self.uri), found).to(device)
        return lambda image, _: detect_in_views(net, image, rules)


class DetectObjects:
    """Fetched images, with `boxes` of their proposals if the detector needs some, to rows of `schemas.DETECTIONS`."""

    def __init__(self, config: DetectConfig, make_finder: WsodFinder | DetectorFinder, schema: pa.Schema) -> None:
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(math.ceil(config.resources.actor_cpus))
        self.find, self.config, self.schema = make_finder(self.device), config, schema

    def __call__(self, batch: pa.Table) -> pa.Table:
        from weaksam.execution.rows import make_rows

        return schemas.to_table(make_rows(batch, self.config.max_pixels, self._find), self.schema)

    def _find(self, image: np.ndarray, given: dict[str, Any], _: object) -> dict[str, Any]:
        import torch

        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(self.device)
        try:
            row = _columns(self.find(pixels, np.array(given.get("boxes") or [], np.float32).reshape(-1, 4)))
        except torch.OutOfMemoryError as error:
            raise ImageError("oom", f"no device memory for {image.shape[:2]} pixels: {error}") from error
        metrics.count("weaksam_boxes_kept", len(row["boxes"]))
        return row


def _columns(found: Found) -> dict[str, Any]:
    from weaksam.ops.rle import encode_rle

    row: dict[str, Any] = {key: getattr(found, key).cpu().numpy() for key in ("boxes", "classes", "scores")}
    return row | ({} if found.masks is None else {"masks": [encode_rle(one) for one in found.masks.cpu().numpy()]})


def run(step: Step) -> Outcome:
    """Maps the images of the `images` step to detections."""
    from weaksam.execution import runtime

    config: DetectConfig = step.config
    images = tables.read_step(step.inputs["images"], columns=["uri", "split"])
    if config.split is not None:
        images = tables.of_split(images, config.split, where=f"steps.{step.name}.split")
    names = tables.class_names(step.inputs["images"])
    key = "detector" if config.detector is not None else "checkpoint"
    trained = step.inputs[key]
    check_same_classes(step, key)
    source = images.select(["image_id", "uri"])
    if config.proposals is not None:
        source = with_proposals(step, source)
    uri = storage.join(trained.folder, "checkpoint", "model.safetensors")
    if isinstance(trained.config, TrainDetectorConfig):
        finder = DetectorFinder(trained.config, len(names), uri, config.rules(trained.config.model))
    else:
        finder = WsodFinder(trained.config, len(names), uri, config.rules("wsod"))
    schema = schemas.with_metadata(schemas.DETECTIONS, fingerprint=step.fingerprint, class_names=names)
    kwargs = {"config": config, "make_finder": finder, "schema": schema}
    return runtime.map_images(step, source, DetectObjects, kwargs, schema=schema, resources=config.resources)


def with_proposals(step: Step, source: pa.Table) -> pa.Table:
    """`source` with the `boxes` of its images' proposals, of those sources that the detector learnt from.

    Images whose proposals failed fail here too.

    Raises:
        DataError: an image has no row of proposals.
        ConfigError: the settings of the detector's training leave no image a box.
    """
    from weaksam.data.proposal_boxes import keep_sources

    ids = source.column("image_id").to_pylist()
    check_rows(step, "proposals", ids)
    columns = ["status", "message", "boxes", "source", "height", "width"]
    trained = step.inputs["checkpoint"].config
    proposals = keep_sources(tables.read_step(step.inputs["proposals"], columns=columns), trained.source_indices)
    where = {image_id: i for i, image_id in enumerate(proposals.column("image_id").to_pylist())}
    rows = proposals.take(pa.array([where[image_id] for image_id in ids], pa.int64()))
    _check_boxes(step, rows)
    return with_states(
        source.append_column("boxes", rows.column("boxes")), rows, f"step {step.inputs['proposals'].name}"
    )


def _check_boxes(step: Step, rows: pa.Table) -> None:
    """Raises ConfigError when no image has a box to look at; warns of those without."""
    from weaksam.data.proposal_boxes import rows_without

    usable = rows.filter(pa.array([status == schemas.OK for status in rows.column("status").to_pylist()], pa.bool_()))
    trained = step.inputs["checkpoint"]
    min_side = trained.config.min_side
    without = usable.take(pa.array(rows_without(usable, min_side=min_side), pa.int64())).column("image_id").to_pylist()
    if not without:
        return
    where = f"steps.{step.name}.proposals: step {step.inputs['proposals'].name}"
    if len(without) == usable.num_rows:
        raise ConfigError(
            f"{where}: no proposal of any of the {len(without)} images is of the sources and of the min_side "
            f"({min_side:g} pixels) that step {trained.name} was trained with: name proposals made like those, or "
            "train with other sources or min_side"
        )
    log.warning(
        "warning: %s: %d of %d images have no proposal of the sources and of the min_side (%g pixels) that step %s was "
        "trained with, e.g. %s: nothing is found in them",
        *(where, len(without), usable.num_rows, min_side, trained.name, without[0]),
    )


STAGE = Stage("detect", 3, DetectConfig, run, writes="detections")
