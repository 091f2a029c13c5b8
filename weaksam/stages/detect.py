"""images, proposals, a trained detector -> detections: boxes with a class and a score."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from weaksam import schemas, storage, tables
from weaksam.config import Reads, StageConfig
from weaksam.errors import ConfigError, ImageError
from weaksam.pools import PoolResources
from weaksam.stage import Outcome, Stage, Step
from weaksam.stages.train_wsod import TrainWsodConfig, check_rows


class DetectConfig(StageConfig):
    """Finds objects with a trained weakly supervised detector.

    Every image is seen at several sizes, mirrored too, and the scores of its proposals are averaged. Image-level labels
    are not used.
    """

    images: Annotated[str, Reads("images")]
    """The `index` step whose images are used."""
    proposals: Annotated[str, Reads("proposals")]
    """The step with the proposals of these images."""
    checkpoint: Annotated[str, Reads("wsod")]
    """The step that trained the detector."""
    split: str | None = None
    """Only images of this split; all when left out."""
    scales: list[int] = Field(default=[800, 480, 576, 688, 864, 1000, 1200], min_length=1)
    """Lengths of the shorter side of the views, pixels."""
    max_side: int = Field(default=2000, ge=32)
    """The longer side of a view is at most this, pixels."""
    flip: bool = True
    """Whether each view is seen mirrored too."""
    score_threshold: float = Field(default=0.0, ge=0, le=1)
    """Detections score more than this."""
    nms_threshold: float = Field(default=0.3, gt=0, le=1)
    """Of two boxes of a class that overlap by more than this IoU the lower-scored one is dropped."""
    max_detections: int = Field(default=100, ge=1)
    """Most detections of an image."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Larger images are refused with status `too_large`."""
    resources: PoolResources = PoolResources()
    """Where it runs."""


class DetectObjects:
    """Fetched images with the boxes of their proposals in, rows of `schemas.DETECTIONS` out."""

    def __init__(self, config: DetectConfig, trained: TrainWsodConfig, uri: str, schema: pa.Schema) -> None:
        import torch

        from weaksam.models.detecting import DetectRules

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(math.ceil(config.resources.actor_cpus))
        classes = len(schemas.class_names_of(schema))
        self.net = trained.spec(classes).trained(storage.fetch(uri)).to(self.device)
        self.config, self.schema, self.min_side = config, schema, trained.min_side
        self.rules = DetectRules(
            scales=tuple(config.scales),
            max_side=config.max_side,
            flip=config.flip,
            score_threshold=config.score_threshold,
            nms_threshold=config.nms_threshold,
            max_detections=config.max_detections,
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        from weaksam.rows import decode_ahead

        columns = (batch.column(name).to_pylist() for name in ("image_id", "boxes"))
        decoded = decode_ahead(batch, self.config.max_pixels)
        return schemas.to_table([self._row(*one) for one in zip(*columns, decoded, strict=True)], self.schema)

    def _row(self, image_id: str, proposals: list | None, image: np.ndarray | ImageError) -> dict[str, Any]:
        from weaksam.rows import failed_row

        try:
            if isinstance(image, ImageError):
                raise image
            boxes, classes, scores = self._detect(image, proposals or [])
        except ImageError as error:
            return failed_row(image_id, error.status, error.message)
        return {
            "image_id": image_id,
            "status": schemas.OK,
            "message": "",
            "height": image.shape[0],
            "width": image.shape[1],
            "boxes": boxes,
            "classes": classes,
            "scores": scores,
        }

    def _detect(self, image: np.ndarray, found: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        import torch

        from weaksam.data.proposal_boxes import clean_boxes
        from weaksam.models.detecting import detect_objects

        boxes = np.array(found, np.float32).reshape(-1, 4)
        boxes, _ = clean_boxes(boxes, image.shape[0], image.shape[1], min_side=self.min_side)
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(self.device)
        try:
            kept = detect_objects(self.net, pixels, torch.from_numpy(boxes).to(self.device), self.rules)
        except torch.OutOfMemoryError as error:
            raise ImageError("oom", f"no device memory for {image.shape[:2]} pixels: {error}") from error
        return tuple(part.cpu().numpy() for part in kept)  # type: ignore[return-value]


def run(step: Step) -> Outcome:
    """Maps the images of the `images` step to detections."""
    from weaksam import runtime
    from weaksam.data.proposal_boxes import keep_sources

    config: DetectConfig = step.config
    images = tables.read_step(step.inputs["images"], columns=["uri", "split"])
    if config.split is not None:
        images = tables.of_split(images, config.split, where=f"steps.{step.name}.split")
    names = schemas.class_names_of(images.schema)
    trained = step.inputs["checkpoint"]
    learnt = schemas.class_names_of(tables.read_step(trained.inputs["images"], columns=[]).schema)
    if learnt != names:
        raise ConfigError(
            f"steps.{step.name}.checkpoint: step {trained.name} knows the classes {', '.join(learnt[:3])}, ..., the "
            f"images have {', '.join(names[:3])}, ...: give both datasets the same `classes`"
        )
    check_rows(step, images.column("image_id").to_pylist())
    proposals = tables.read_step(step.inputs["proposals"], columns=["boxes", "source"])
    proposals = keep_sources(proposals, trained.config.source_indices)
    where = {image_id: i for i, image_id in enumerate(proposals.column("image_id").to_pylist())}
    rows = pa.array([where[image_id] for image_id in images.column("image_id").to_pylist()], pa.int64())
    source = images.select(["image_id", "uri"]).append_column("boxes", proposals.column("boxes").take(rows))
    schema = schemas.with_metadata(schemas.DETECTIONS, fingerprint=step.fingerprint, class_names=names)
    uri = storage.join(trained.folder, "checkpoint", "model.safetensors")
    kwargs = {"config": config, "trained": trained.config, "uri": uri, "schema": schema}
    return runtime.map_images(step, source, DetectObjects, kwargs, schema=schema, resources=config.resources)


STAGE = Stage("detect", 1, DetectConfig, run, writes="detections")
