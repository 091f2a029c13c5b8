"""images (+ classifier, SAM weights) -> proposals: where could an object be?

Each image is encoded once; every prompt, of the grid and of the classifier's peaks, is decoded from that encoding. The
rows say for each box how sure SAM was and what prompted it, so later stages can choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from weaksam.core import schemas, storage, tables
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import ConfigError, ImageError
from weaksam.execution import metrics
from weaksam.stages.proposal_settings import GridSettings, PeakSettings, ProposalsConfig, SamSettings
from weaksam.stages.sam_actor import SamWatch, Watched, identify_shipped, load_engine

if TYPE_CHECKING:
    import numpy as np

    from weaksam.models.classifiers.clues import Clues
    from weaksam.sam.engine import EncodedImage, Proposals
    from weaksam.sam.sources import SourceRule

__all__ = ["STAGE", "GridSettings", "PeakSettings", "ProposalsConfig", "ProposeBoxes", "SamSettings"]


@dataclass(frozen=True)
class TrainedClassifier:
    """Where the weights of a `train_classifier` step are, and what they fit."""

    uri: str
    backbone: str
    gated: bool
    num_classes: int
    fine_of: Literal["both", "coarse", "cross"] = "both"


class ProposeBoxes:
    """Fetched images in, rows of `schemas.PROPOSALS` out; holds SAM and, when there is one, the classifier.

    Both in one actor: the image is decoded once and nothing but bytes travels (`python -m benchmarks.clue_share`).
    """

    def __init__(self, config: ProposalsConfig, schema: pa.Schema, classifier: TrainedClassifier | None = None) -> None:
        self.engine = load_engine(config.sam, config.resources, points_per_side=config.grid.points_per_side)
        self.clues = _make_clue_finder(config, classifier, self.engine.sam.device) if classifier else None
        self.config = config
        self.schema = schema
        self.watch = SamWatch(self.engine)

    def __call__(self, batch: pa.Table) -> pa.Table:
        from weaksam.execution.rows import make_rows

        return schemas.to_table(
            make_rows(batch, self.config.max_pixels, self._columns, prepare=self._encode), self.schema
        )

    def _encode(self, image: np.ndarray, given: dict[str, Any]) -> tuple[Clues | None, Watched]:
        clues = self.clues(image, given.get("labels")) if self.clues else None
        return clues, self.watch.encode(image)

    def _columns(self, image: np.ndarray, given: dict[str, Any], seen: tuple[Clues | None, Watched]) -> dict[str, Any]:
        clues, watched = seen
        with self.watch.decoding(watched) as encoded:
            found = self._propose(encoded, clues)
        metrics.count("weaksam_boxes_kept", len(found.boxes))
        return {
            "boxes": found.boxes,
            "predicted_iou": found.predicted_iou,
            "stability": found.stability,
            "source": found.source,
            "masks": found.masks,
            "points": _point_rows(clues) if clues else [],
            "labels": clues.labels if clues else None,
        }

    def _propose(self, encoded: EncodedImage, clues: Clues | None) -> Proposals:
        from weaksam.sam.sources import join_sources, propose_from_points

        config = self.config
        found = [self._propose_grid(encoded)]
        for source, kind in enumerate(schemas.SOURCES[1:], start=1):
            if clues is None or not getattr(config.clues, kind).enabled:
                continue
            here = clues.kinds == source - 1
            points, labels, rule = clues.points[here], clues.point_labels[here], _source_rule(config, kind)
            found.append(
                propose_from_points(
                    self.engine, encoded, points, labels, rule, source=source, return_masks=config.masks
                )
            )
        return join_sources(found, duplicate_threshold=config.duplicate_threshold, max_proposals=config.max_proposals)

    def _propose_grid(self, encoded: EncodedImage) -> Proposals:
        grid = self.config.grid
        (found,) = self.engine.propose(
            [encoded],
            pred_iou_threshold=grid.pred_iou_threshold,
            stability_threshold=grid.stability_threshold,
            nms_threshold=grid.nms_threshold,
            return_masks=self.config.masks,
        )
        return found


def _make_clue_finder(config: ProposalsConfig, classifier: TrainedClassifier, device: Any) -> Any:
    """`find(image, labels or None) -> Clues`."""
    from weaksam.models.classifiers.build import load_trained
    from weaksam.models.classifiers.clues import find_clues

    model = load_trained(
        storage.fetch(classifier.uri),
        classifier.backbone,
        classifier.num_classes,
        gated=classifier.gated,
        fine_of=classifier.fine_of,
    ).to(device)
    rules = config.clues.rules(model.depth)

    def find(image: np.ndarray, labels: Sequence[int] | None) -> Clues:
        import torch

        try:
            return find_clues(model, image, labels, rules)[0]
        except torch.OutOfMemoryError as error:
            raise ImageError("oom", f"no device memory to classify {image.shape[:2]} pixels: {error}") from error

    return find


def _source_rule(config: ProposalsConfig, kind: str) -> SourceRule:
    from weaksam.sam.sources import SourceRule

    clues, peaks = config.clues, getattr(config.clues, kind)
    return SourceRule(
        clues.pred_iou_threshold,
        clues.stability_threshold,
        peaks.nms_threshold,
        keep_masks=tuple(clues.keep_masks),
        joint=peaks.joint,
    )


def _point_rows(clues: Clues) -> list[dict[str, Any]]:
    columns = (clues.points[:, 0], clues.points[:, 1], clues.point_labels, clues.scores, clues.kinds + 1)
    keys = ("x", "y", "label", "score", "kind")
    return [dict(zip(keys, values, strict=True)) for values in zip(*(c.tolist() for c in columns), strict=True)]


def run(step: Step) -> Outcome:
    """Maps the images of the `images` step to proposals."""
    from weaksam.execution import runtime

    config: ProposalsConfig = step.config
    images = tables.read_step(step.inputs["images"], columns=["uri", "split", "labels"])
    if config.split is not None:
        images = tables.of_split(images, config.split, where=f"steps.{step.name}.split")
    names = tables.class_names(step.inputs["images"])
    schema = schemas.with_metadata(schemas.PROPOSALS, fingerprint=step.fingerprint, class_names=names)
    kwargs: dict[str, Any] = {"config": config, "schema": schema}
    source = images.select(["image_id", "uri"])
    if "classifier" in step.inputs:
        kwargs["classifier"] = _trained_classifier(step, names)
        source = source.append_column("labels", _known_labels(step, images))
    return runtime.map_images(step, source, ProposeBoxes, kwargs, schema=schema, resources=config.resources)


def _trained_classifier(step: Step, names: list[str]) -> TrainedClassifier:
    trained = step.inputs["classifier"]
    learnt = tables.class_names(trained.inputs["images"])
    if learnt != names:
        raise ConfigError(
            f"steps.{step.name}.classifier: step {trained.name} knows {len(learnt)} classes ({', '.join(learnt[:3])}, "
            f"...), the images have {len(names)} ({', '.join(names[:3])}, ...): give both datasets the same `classes`"
        )
    uri = storage.join(trained.folder, "checkpoint", "model.safetensors")
    config = trained.config
    return TrainedClassifier(uri, config.backbone, config.gated, len(names), config.fine_of)


def _known_labels(step: Step, images: pa.Table) -> pa.Array:
    """Image-level labels where they may be used, null elsewhere: a test split has some, but only to be judged by.

    Differs from the published scripts, which give COCO's validation images their true labels.
    """
    trained = step.inputs["classifier"]
    known = step.config.clues.known_splits
    if known is None:
        same = trained.inputs["images"].fingerprint == step.inputs["images"].fingerprint
        known = [trained.config.split] if same else []
    else:
        for split in known:
            tables.of_split(images, split, where=f"steps.{step.name}.clues.known_splits")
    rows = zip(images.column("split").to_pylist(), images.column("labels").to_pylist(), strict=True)
    return pa.array([labels if split in known else None for split, labels in rows], pa.list_(pa.int32()))


def _shipped_weights(config: ProposalsConfig) -> dict[str, str]:
    return identify_shipped(config.sam)


STAGE = Stage("proposals", 2, ProposalsConfig, run, writes="proposals", outside=_shipped_weights)
