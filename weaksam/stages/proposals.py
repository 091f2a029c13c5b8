"""images (+ SAM weights) -> proposals: where could an object be?

Each image is encoded once; every prompt is decoded from that encoding. The rows say for each box how sure SAM was
and what prompted it, so later stages can choose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

import weaksam.sam
from weaksam import schemas, storage, tables
from weaksam.config import NotInFingerprint, OutsideFile, Reads, Settings, StageConfig
from weaksam.errors import ImageError
from weaksam.pools import PoolResources
from weaksam.stage import Outcome, Stage, Step

if TYPE_CHECKING:
    import numpy as np


class SamSettings(Settings):
    """Which SAM, and its weights."""

    model: Literal["vit_h", "vit_l", "vit_b", "vit_xs"] = "vit_h"
    """Encoder; `vit_xs` is the small demo model that comes with this package."""
    checkpoint: Annotated[str | None, OutsideFile()] = None
    """URI of the weights, e.g. of the official `sam_vit_h_4b8939.pth`; only `vit_xs` has weights of its own."""
    sha256: Annotated[str | None, NotInFingerprint()] = Field(default=None, pattern="^[0-9a-fA-F]{64}$")
    """SHA-256 that the weights file must have."""

    @model_validator(mode="after")
    def _weights_are_named(self) -> SamSettings:
        if self.model != "vit_xs" and self.checkpoint is None:
            raise ValueError(f"checkpoint is required for {self.model}: the URI of its weights file")
        return self


class GridSettings(Settings):
    """A grid of single-point prompts, and which of its masks stay."""

    points_per_side: int = Field(default=32, ge=1, le=256)
    """Points along each side of the image."""
    pred_iou_threshold: float = Field(default=0.3, ge=0, le=1)
    """Masks that SAM itself rates at or below this IoU are dropped."""
    stability_threshold: float = Field(default=0.3, ge=0, le=1)
    """Masks that change more than this (IoU) when the mask threshold moves by +-1 are dropped."""
    nms_threshold: float = Field(default=0.7, gt=0, le=1)
    """Of two boxes that overlap by more than this IoU, the one SAM rates lower is dropped."""
    # Differs from the published runs, which use 0.3: that deletes every part of a kept whole and every whole of a
    # kept part. configs/reference/ has 0.3.


class ProposalResources(PoolResources):
    """Where and how wide proposals run."""

    points_per_chunk: int | None = Field(default=None, ge=1)
    """Prompts decoded at once, chosen by device when left out; halves by itself when memory runs out."""


class ProposalsConfig(StageConfig):
    """Prompts SAM over each image and keeps the boxes of its masks.

    One row an image: boxes with SAM's own rating, their stability, and what prompted them.
    """

    images: Annotated[str, Reads("images")]
    """The `index` step whose images are used."""
    split: str | None = None
    """Only images of this split; all when left out."""
    sam: SamSettings
    """The segmenter."""
    grid: GridSettings = GridSettings()
    """Prompts that look everywhere, whatever the classes."""
    max_proposals: int | None = Field(default=None, ge=1)
    """Most boxes an image may keep, the highest rated first."""
    masks: bool = False
    """Keep the masks too, as run lengths: about ten times the size."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Larger images are refused with status `too_large`."""
    resources: ProposalResources = ProposalResources()
    """Where it runs."""


class ProposeBoxes:
    """Fetched images in, rows of `schemas.PROPOSALS` out; holds SAM."""

    def __init__(self, config: ProposalsConfig, schema: pa.Schema) -> None:
        import torch

        from weaksam.sam.checkpoints import load_sam
        from weaksam.sam.engine import EngineSettings, SamEngine

        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            torch.set_num_threads(math.ceil(config.resources.actor_cpus))
        checkpoint = storage.fetch(config.sam.checkpoint, sha256=config.sam.sha256) if config.sam.checkpoint else None
        model = load_sam(config.sam.model, checkpoint, device=device)
        settings = EngineSettings(config.grid.points_per_side, config.resources.points_per_chunk)
        self.engine = SamEngine(model, settings=settings)
        self.config = config
        self.schema = schema

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [self._row(image_id, image) for image_id, image in _decode_ahead(batch, self.config.max_pixels)]
        return schemas.to_table(rows, self.schema)

    def _row(self, image_id: str, image: np.ndarray | ImageError) -> dict[str, Any]:
        from weaksam.rows import failed_row

        if isinstance(image, ImageError):
            return failed_row(image_id, image.status, image.message)
        grid = self.config.grid
        try:
            (found,) = self.engine.propose(
                [image],
                pred_iou_threshold=grid.pred_iou_threshold,
                stability_threshold=grid.stability_threshold,
                nms_threshold=grid.nms_threshold,
                max_proposals=self.config.max_proposals,
                return_masks=self.config.masks,
            )
        except ImageError as error:
            return failed_row(image_id, error.status, error.message)
        return {
            "image_id": image_id,
            "status": schemas.OK,
            "message": "",
            "height": image.shape[0],
            "width": image.shape[1],
            "boxes": found.boxes,
            "predicted_iou": found.predicted_iou,
            "stability": found.stability,
            "source": found.source,
            "masks": found.masks,
            "points": [],
            "labels": None,
        }


def _decode_ahead(batch: pa.Table, max_pixels: int) -> Iterator[tuple[str, np.ndarray | ImageError]]:
    """Images in order, the next one decoded in a thread while the caller works on this one."""
    from weaksam.data.images import decode_image

    def decode(index: int) -> np.ndarray | ImageError:
        status = batch.column("status")[index].as_py()
        if status != schemas.OK:
            return ImageError(status, batch.column("message")[index].as_py())
        try:
            return decode_image(batch.column("data")[index].as_py(), max_pixels=max_pixels)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(decode, 0) if batch.num_rows else None
        for index, image_id in enumerate(batch.column("image_id").to_pylist()):
            image = ahead.result() if ahead else None
            ahead = pool.submit(decode, index + 1) if index + 1 < batch.num_rows else None
            assert image is not None
            yield image_id, image


def run(step: Step) -> Outcome:
    """Maps the images of the `images` step to proposals."""
    from weaksam import runtime

    config: ProposalsConfig = step.config
    images = tables.read_step(step.inputs["images"], columns=["uri", "split"])
    if config.split is not None:
        images = tables.of_split(images, config.split, where=f"steps.{step.name}.split")
    names = schemas.class_names_of(images.schema)
    schema = schemas.with_metadata(schemas.PROPOSALS, fingerprint=step.fingerprint, class_names=names)
    source = images.select(["image_id", "uri"])
    kwargs = {"config": config, "schema": schema}
    return runtime.map_images(step, source, ProposeBoxes, kwargs, schema=schema, resources=config.resources)


def _shipped_weights(config: ProposalsConfig) -> dict[str, str]:
    if config.sam.checkpoint is not None:
        return {}
    bundled = Path(weaksam.sam.__file__).parent / "weights" / f"{config.sam.model}.safetensors"
    return {f"sam.{config.sam.model}": storage.identity(str(bundled))}


STAGE = Stage("proposals", 1, ProposalsConfig, run, writes="proposals", outside=_shipped_weights)
