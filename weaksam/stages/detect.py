"""images, a trained detector, and proposals if it needs them -> detections: boxes with a class and a score."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from weaksam.core import schemas, tables
from weaksam.core.cache import fetch
from weaksam.core.config import Reads, StageConfig
from weaksam.core.rules import values_of, with_rules
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import ConfigError, ImageError
from weaksam.execution import telemetry
from weaksam.execution.mapping import ImageMapper, Row
from weaksam.execution.pools import PoolResources
from weaksam.models.detectors.catalogue import kind_of
from weaksam.models.detectors.rules import InferenceRules
from weaksam.stages.box_counts import with_box_counts
from weaksam.stages.checks import check_rows, check_same_classes, with_states
from weaksam.stages.step_images import read_images
from weaksam.stages.train_detector import TrainDetectorConfig
from weaksam.stages.train_wsod import TrainWsodConfig

if TYPE_CHECKING:
    from torch import Tensor

    from weaksam.models.detectors.base import Detections

log = logging.getLogger(__name__)


class DetectConfig(with_rules(StageConfig, InferenceRules, optional=True)):
    """Finds objects with a trained detector, weakly supervised or retrained.

    An image can be viewed at several sizes, and mirrored. For a weakly supervised detector, the scores of the proposals
    are averaged over the views; for other detectors, the detections of all views are merged. Image-level labels are not
    used. Settings that are left out have the values of the published detector.
    """

    images: Annotated[str, Reads("images")]
    """The `index` step whose images are used."""
    proposals: Annotated[str | None, Reads("proposals")] = None
    """The step with the proposals of these images; required for a weakly supervised detector, refused for others."""
    detector: Annotated[str, Reads("wsod", "detector")]
    """The step that trained the detector, of stage `train_wsod` or `train_detector`."""
    split: str | None = None
    """Only images of this split; all when left out."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Larger images are refused with status `too_large`."""
    resources: PoolResources = PoolResources()
    """Resources of the workers."""

    def rules(self, published: InferenceRules) -> InferenceRules:
        """Returns `published`, the published test settings of the detector, with the step's own settings."""
        own = {name: value for name, value in values_of(self, InferenceRules).items() if value is not None}
        return replace(published, **own)


# From an image (3, H, W) uint8 and proposals on it (N, 4).
Find = Callable[["Tensor", np.ndarray], "Detections"]


@dataclass(frozen=True)
class WsodFinder:
    """Builds a function that finds objects with a weakly supervised detector; picklable."""

    trained: TrainWsodConfig
    num_classes: int
    uri: str
    rules: InferenceRules

    def __call__(self, device: str) -> Find:
        """Returns the function, with the network on `device`."""
        import torch

        from weaksam.data.proposal_boxes import clean_boxes
        from weaksam.models.detectors.inference import detect_objects

        net = self.trained.spec(self.num_classes).trained(fetch(self.uri)).to(device)

        def find(image: Tensor, proposals: np.ndarray) -> Detections:
            boxes, _ = clean_boxes(proposals, image.shape[1], image.shape[2], min_side=self.trained.min_side)
            return detect_objects(net, image, torch.from_numpy(boxes).to(device), self.rules)

        return find


@dataclass(frozen=True)
class DetectorFinder:
    """Builds a function that finds objects with any other detector; picklable."""

    trained: TrainDetectorConfig
    num_classes: int
    uri: str
    rules: InferenceRules

    def __call__(self, device: str) -> Find:
        """Returns the function, with the network on `device`."""
        from weaksam.models.detectors.build import build_trained
        from weaksam.models.detectors.inference import detect_in_views

        net = build_trained(self.trained.spec(self.num_classes), fetch(self.uri), self.rules).to(device)
        return lambda image, _: detect_in_views(net, image, self.rules)


class DetectObjects(ImageMapper):
    """Makes rows of `schemas.DETECTIONS`, from the `boxes` of an image's proposals if the detector needs proposals."""

    def __init__(self, config: DetectConfig, make_finder: WsodFinder | DetectorFinder) -> None:
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(math.ceil(config.resources.actor_cpus))
        self.find = make_finder(self.device)

    def make(self, image: np.ndarray, row: Row, prepared: None) -> Row:
        """Returns the detections of an image."""
        import torch

        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(self.device)
        try:
            columns = _columns(self.find(pixels, np.array(row.get("boxes") or [], np.float32).reshape(-1, 4)))
        except torch.OutOfMemoryError as error:
            raise ImageError("oom", f"no device memory for {image.shape[:2]} pixels: {error}") from error
        telemetry.count("weaksam_boxes_kept", len(columns["boxes"]))
        return columns


def _columns(detections: Detections) -> Row:
    from weaksam.ops.rle import encode_rle

    columns: Row = {key: getattr(detections, key).cpu().numpy() for key in ("boxes", "classes", "scores")}
    if detections.masks is not None:
        columns["masks"] = [encode_rle(mask) for mask in detections.masks.cpu().numpy()]
    return columns


def run(step: Step) -> Outcome:
    """Maps the images of the `images` step to detections."""
    from weaksam.execution import runtime

    config: DetectConfig = step.config
    images = read_images(step)
    num_classes = len(step.inputs["images"].class_names())
    trained = step.inputs["detector"]
    check_same_classes(step, "detector")
    source = images.select(["image_id", "uri"])
    if config.proposals is not None:
        source = with_proposals(step, source)
    uri = trained.weights_uri
    if isinstance(trained.config, TrainDetectorConfig):
        rules = config.rules(kind_of(trained.config.model).inference)
        finder = DetectorFinder(trained.config, num_classes, uri, rules)
    else:
        finder = WsodFinder(trained.config, num_classes, uri, config.rules(InferenceRules()))
    outcome = runtime.map_images(
        step,
        source,
        partial(DetectObjects, config, finder),
        schema=schemas.DETECTIONS,
        max_pixels=config.max_pixels,
        resources=config.resources,
    )
    return with_box_counts(step.folder, outcome, "classes")


def with_proposals(step: Step, source: pa.Table) -> pa.Table:
    """Returns `source` with the `boxes` of its images' proposals, only from the sources the detector was trained on.

    Images whose proposals failed fail in this step too.

    Raises:
        DataError: an image has no row of proposals.
        ConfigError: the settings of the detector's training leave no image a box.
    """
    from weaksam.data.proposal_boxes import keep_sources

    ids = source.column("image_id").to_pylist()
    check_rows(step, "proposals", ids)
    columns = ["status", "message", "boxes", "source", "height", "width"]
    trained = step.inputs["detector"].config
    proposals = keep_sources(step.inputs["proposals"].read(columns), trained.source_indices)
    rows = tables.rows_for(proposals, ids)
    _check_boxes(step, rows)
    return with_states(
        source.append_column("boxes", rows.column("boxes")), rows, f"step {step.inputs['proposals'].name}"
    )


def _check_boxes(step: Step, rows: pa.Table) -> None:
    """Raises ConfigError when no image has a usable box; warns of images without a usable box."""
    from weaksam.data.proposal_boxes import rows_without

    usable = tables.with_status_ok(rows)
    trained = step.inputs["detector"]
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


def find_input_faults(config: DetectConfig, kinds: Mapping[str, str]) -> list[str]:
    """Returns the faults of `proposals`, which only a weakly supervised detector needs; `kinds` by key."""
    is_weak = kinds["detector"] == "wsod"
    if is_weak and config.proposals is None:
        return [
            f"proposals: required: step '{config.detector}' trained a weakly supervised detector, which rates "
            "proposals: name the step with those of these images"
        ]
    if not is_weak and config.proposals is not None:
        return [f"proposals: the detector of step '{config.detector}' finds objects without proposals: remove the key"]
    return []


STAGE = Stage("detect", 3, DetectConfig, run, writes="detections", input_faults=find_input_faults)
