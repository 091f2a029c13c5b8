"""images (+ classifier, SAM weights) -> proposals: boxes that may contain an object.

Each image is encoded once; every prompt, of the grid and of the classifier's peaks, is decoded from that encoding. The
rows have SAM's rating and the source of each box, so that later stages can select boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from weaksam.core import schemas, tables
from weaksam.core.cache import fetch
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import ConfigError, ImageError
from weaksam.execution import telemetry
from weaksam.execution.mapping import ImageMapper, Row
from weaksam.stages.box_counts import with_box_counts
from weaksam.stages.proposal_settings import GridSettings, PeakSettings, ProposalsConfig, SamSettings
from weaksam.stages.sam_actor import SamWatch, Watched, identify_shipped, load_engine
from weaksam.stages.step_images import read_images

if TYPE_CHECKING:
    import numpy as np

    from weaksam.models.classifiers.peak_prompts import PeakPrompts
    from weaksam.sam.sources import PromptSet

__all__ = ["STAGE", "GridSettings", "PeakSettings", "ProposalsConfig", "ProposeBoxes", "SamSettings"]


@dataclass(frozen=True)
class TrainedClassifier:
    """The weights of a `train_classifier` step, and the model that they fit."""

    uri: str
    backbone: str
    gated: bool
    num_classes: int
    fine_of: Literal["both", "coarse", "cross"] = "both"


class ProposeBoxes(ImageMapper):
    """Makes rows of `schemas.PROPOSALS`; holds SAM and, if the step has one, the classifier.

    Both are in one actor: the image is decoded once and only bytes are sent (see `benchmarks/classifier_share.py`).
    """

    def __init__(self, config: ProposalsConfig, classifier: TrainedClassifier | None = None) -> None:
        self.engine = load_engine(config.sam, config.resources, points_per_side=config.grid.points_per_side)
        self.find_prompts = _make_prompt_finder(config, classifier, self.engine.sam.device) if classifier else None
        self.config = config
        self.watch = SamWatch(self.engine)

    def prepare(self, image: np.ndarray, row: Row) -> tuple[PeakPrompts | None, Watched]:
        """Returns the classifier's labels and peaks, and SAM's encoding."""
        prompts = self.find_prompts(image, row.get("labels")) if self.find_prompts else None
        return prompts, self.watch.encode(image)

    def make(self, image: np.ndarray, row: Row, prepared: tuple[PeakPrompts | None, Watched]) -> Row:
        """Returns the proposals, and the peaks and labels that led to them."""
        from weaksam.sam.sources import propose_from_sources

        prompts, watched = prepared
        with self.watch.decoding(watched) as encoded:
            proposals = propose_from_sources(
                self.engine,
                encoded,
                _prompt_sets(self.config, prompts),
                duplicate_threshold=self.config.duplicate_threshold,
                max_proposals=self.config.max_proposals,
                return_masks=self.config.masks,
            )
        telemetry.count("weaksam_boxes_kept", len(proposals.boxes))
        return {
            "boxes": proposals.boxes,
            "predicted_iou": proposals.predicted_iou,
            "stability": proposals.stability,
            "source": proposals.source,
            "masks": proposals.masks,
            "points": _point_rows(prompts) if prompts else [],
            "labels": prompts.labels if prompts else None,
        }


def _prompt_sets(config: ProposalsConfig, prompts: PeakPrompts | None) -> list[PromptSet]:
    """Returns the prompts of the grid and of each enabled kind of peak, in the order of `schemas.SOURCES`."""
    from weaksam.sam.sources import PromptSet, point_prompts

    grid, shared = config.grid, config.peaks
    sets = [PromptSet(None, grid.pred_iou_threshold, grid.stability_threshold, grid.nms_threshold)]
    for source, kind in enumerate(schemas.SOURCES[1:], start=1):
        peaks: PeakSettings = getattr(shared, kind)
        if prompts is None or not peaks.enabled:
            continue
        chosen = prompts.kinds == source - 1
        points, labels = prompts.points[chosen], prompts.point_labels[chosen]
        sets.append(
            PromptSet(
                point_prompts(points, labels, joint=peaks.joint, source=source),
                shared.pred_iou_threshold,
                shared.stability_threshold,
                peaks.nms_threshold,
                keep_masks=tuple(shared.keep_masks),
            )
        )
    return sets


def _make_prompt_finder(config: ProposalsConfig, classifier: TrainedClassifier, device: Any) -> Any:
    """Returns a function `find(image, labels or None) -> PeakPrompts`."""
    from weaksam.models.classifiers.build import load_trained
    from weaksam.models.classifiers.peak_prompts import find_peak_prompts

    model = load_trained(
        fetch(classifier.uri),
        classifier.backbone,
        classifier.num_classes,
        gated=classifier.gated,
        fine_of=classifier.fine_of,
    ).to(device)
    rules = config.peaks.rules(model.depth)

    def find(image: np.ndarray, labels: Sequence[int] | None) -> PeakPrompts:
        import torch

        try:
            return find_peak_prompts(model, image, labels, rules)[0]
        except torch.OutOfMemoryError as error:
            raise ImageError("oom", f"no device memory to classify {image.shape[:2]} pixels: {error}") from error

    return find


def _point_rows(prompts: PeakPrompts) -> list[dict[str, Any]]:
    columns = (prompts.points[:, 0], prompts.points[:, 1], prompts.point_labels, prompts.scores, prompts.kinds + 1)
    keys = ("x", "y", "label", "score", "kind")
    return [dict(zip(keys, values, strict=True)) for values in zip(*(c.tolist() for c in columns), strict=True)]


def run(step: Step) -> Outcome:
    """Maps the images of the `images` step to proposals."""
    from weaksam.execution import runtime

    config: ProposalsConfig = step.config
    images = read_images(step, "labels")
    source, classifier = images.select(["image_id", "uri"]), None
    if "classifier" in step.inputs:
        classifier = _trained_classifier(step, step.inputs["images"].class_names())
        source = source.append_column("labels", _known_labels(step, images))
    outcome = runtime.map_images(
        step,
        source,
        partial(ProposeBoxes, config, classifier),
        schema=schemas.PROPOSALS,
        max_pixels=config.max_pixels,
        resources=config.resources,
    )
    return with_box_counts(step.folder, outcome, "source")


def _trained_classifier(step: Step, names: list[str]) -> TrainedClassifier:
    trained = step.inputs["classifier"]
    learnt = trained.inputs["images"].class_names()
    if learnt != names:
        raise ConfigError(
            f"steps.{step.name}.classifier: step {trained.name} knows {len(learnt)} classes ({', '.join(learnt[:3])}, "
            f"...), the images have {len(names)} ({', '.join(names[:3])}, ...): give both datasets the same `classes`"
        )
    config = trained.config
    return TrainedClassifier(trained.weights_uri, config.backbone, config.gated, len(names), config.fine_of)


def _known_labels(step: Step, images: pa.Table) -> pa.Array:
    """Returns image-level labels where they may be used, else null: labels of a test split are only for evaluation.

    Differs from the published scripts, which use the true labels of COCO's validation images.
    """
    trained = step.inputs["classifier"]
    known = step.config.peaks.known_splits
    if known is None:
        same = trained.inputs["images"].fingerprint == step.inputs["images"].fingerprint
        known = [trained.config.split] if same else []
    else:
        for split in known:
            tables.of_split(images, split, where=f"steps.{step.name}.peaks.known_splits")
    rows = zip(images.column("split").to_pylist(), images.column("labels").to_pylist(), strict=True)
    return pa.array([labels if split in known else None for split, labels in rows], pa.list_(pa.int32()))


def _shipped_weights(config: ProposalsConfig) -> dict[str, str]:
    return identify_shipped(config.sam)


STAGE = Stage("proposals", 2, ProposalsConfig, run, writes="proposals", outside=_shipped_weights)
