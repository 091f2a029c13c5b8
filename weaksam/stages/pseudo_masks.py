"""images, boxes (pgt or detections) -> pgt with masks: SAM draws a mask for each box.

Each image is encoded once, and all of its boxes prompt together. Masks that people drew are not changed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from weaksam.core import schemas, storage, tables
from weaksam.core.config import Reads, StageConfig, one_of
from weaksam.core.rules import rules_of, with_rules
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import DataError, ImageError
from weaksam.execution import telemetry
from weaksam.execution.mapping import ImageMapper, Row
from weaksam.ops.pseudo_masks import FITS, STATES, MaskRules, choose_masks, tight_boxes
from weaksam.ops.rle import rle_to_runs
from weaksam.stages.checks import check_same_images, with_states
from weaksam.stages.proposal_settings import ProposalResources, SamSettings
from weaksam.stages.sam_actor import SamWatch, Watched, identify_shipped, load_engine
from weaksam.stages.step_images import read_images

_OBJECTS = ["boxes", "classes", "scores"]
_REVIEWED = ["masks", "trusted"]  # columns that some tables lack
_STATE = ["status", "message"]


class PseudoMasksConfig(with_rules(StageConfig, MaskRules)):
    """Draws a mask for each box of pseudo ground truth or detections: the box prompts SAM.

    Writes the rows of `pgt` with masks, SAM's own rating of each mask (`predicted_iou`) and the state of each mask as
    SAM drew it (`mask_state`: 0 fits, 1 empty, 2 exploding). Reviewed boxes and masks are not changed: only missing
    masks are drawn, and no reviewed object is left out. Also writes statistics.json.
    """

    images: Annotated[str, Reads("images")]
    """The `index` step with the images."""
    pgt: Annotated[str | None, Reads("pgt")] = None
    """The step whose boxes prompt SAM; its images are used."""
    detections: Annotated[str | None, Reads("detections")] = None
    """The step whose detections prompt SAM instead, all of them; boxes of other programs come from an
    `import_detections` step."""
    split: str | None = None
    """Only images of this split; all images that have a row when left out."""
    sam: SamSettings
    """The segmenter."""
    candidates: Literal["single", "best_of_three"] = "single"
    """`single`: SAM's single mask for a box. `best_of_three`: the best rated of the three masks that SAM draws for
    ambiguous prompts."""
    boxes: Literal["mask", "prompt"] = "mask"
    """Boxes of the rows: tight around the masks (`mask`), or unchanged (`prompt`)."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Larger images are refused with status `too_large`."""
    resources: ProposalResources = ProposalResources()
    """Resources of the workers."""

    @model_validator(mode="after")
    def _check_source(self) -> PseudoMasksConfig:
        one_of(self, "pgt", "detections")
        return self


class DrawMasks(ImageMapper):
    """Makes rows of `schemas.PSEUDO_MASKS` from rows with `boxes`, `classes` and `scores`; holds SAM."""

    def __init__(self, config: PseudoMasksConfig) -> None:
        self.engine = load_engine(config.sam, config.resources)
        self.config, self.rules = config, rules_of(config, MaskRules)
        self.watch = SamWatch(self.engine)

    def prepare(self, image: np.ndarray, row: Row) -> Watched | None:
        """Returns SAM's encoding of an image that lacks masks."""
        missing = _missing(row) if row.get("trusted") else row["boxes"]
        return self.watch.encode(image) if missing else None

    def make(self, image: np.ndarray, row: Row, prepared: Watched | None) -> Row:
        """Returns the objects of an image with their masks."""
        if row.get("trusted"):
            return self._complete(image, row, prepared)
        boxes, hw = np.array(row["boxes"] or [], np.float32).reshape(-1, 4), image.shape[:2]
        masks, ratings = self._masks(prepared, boxes)
        chosen = choose_masks(masks, boxes, hw, self.rules)
        kept = chosen.kept
        telemetry.count("weaksam_boxes_kept", len(kept))
        dropped = np.delete(chosen.states, kept)
        return {
            "boxes": tight_boxes(chosen.masks, hw) if self.config.boxes == "mask" else boxes[kept],
            "classes": np.array(row["classes"] or [], np.int32)[kept],
            "scores": np.array(row["scores"] or [], np.float32)[kept],
            "masks": chosen.masks,
            "predicted_iou": ratings[kept],
            "mask_state": chosen.states[kept].astype(np.uint8),
            "dropped": dropped.astype(np.uint8),
            "trusted": False,
        }

    def _complete(self, image: np.ndarray, row: Row, watched: Watched | None) -> Row:
        """Returns a reviewed row with its missing masks; raises ImageError when its masks have another size."""
        boxes, hw = np.array(row["boxes"], np.float32).reshape(-1, 4), image.shape[:2]
        masks: list[bytes | None] = list(row["masks"] or [None] * len(boxes))
        missing = _missing(row)
        if any(mask is not None and rle_to_runs(mask).sum() != hw[0] * hw[1] for mask in masks):
            raise ImageError("unreadable", f"the masks that people drew are not of its size, {hw[0]} x {hw[1]}")
        rules = replace(self.rules, empty="box", exploding="keep" if self.rules.exploding == "keep" else "box")
        drawn, drawn_ratings = self._masks(watched, boxes[missing])
        chosen = choose_masks(drawn, boxes[missing], hw, rules)
        ratings: list[float | None] = [None] * len(boxes)
        states = np.full(len(boxes), FITS, np.uint8)
        for index, mask, rating, state in zip(missing, chosen.masks, drawn_ratings, chosen.states, strict=True):
            masks[index], ratings[index], states[index] = mask, float(rating), state
        telemetry.count("weaksam_boxes_kept", len(boxes))
        objects = {key: row[key] for key in _OBJECTS}
        drawing = {"masks": masks, "predicted_iou": ratings, "mask_state": states, "dropped": []}
        return objects | drawing | {"trusted": True}

    def _masks(self, watched: Watched | None, boxes: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """Returns a mask and SAM's rating of it for each box."""
        if watched is None:
            return [], np.zeros(0, np.float32)
        with self.watch.decoding(watched) as encoded:
            drawn = self.engine.masks_for_boxes(encoded, boxes, multimask=self.config.candidates == "best_of_three")
        best = drawn.predicted_iou.argmax(1)
        return [masks[i] for masks, i in zip(drawn.masks, best, strict=True)], drawn.predicted_iou.max(1)


def _missing(row: Row) -> list[int]:
    """Returns the indices of the boxes of a reviewed row that have no mask."""
    masks = row["masks"] or [None] * len(row["boxes"])
    return [index for index, mask in enumerate(masks) if mask is None]


def run(step: Step) -> Outcome:
    """Maps the images that have boxes to rows with masks."""
    from weaksam.execution import runtime

    config: PseudoMasksConfig = step.config
    outcome = runtime.map_images(
        step,
        read_prompts(step),
        partial(DrawMasks, config),
        schema=schemas.PSEUDO_MASKS,
        max_pixels=config.max_pixels,
        resources=config.resources,
    )
    manifest = {"parts": outcome.parts, "excluded": outcome.excluded}
    counts = statistics(tables.read_table(step.folder, manifest, columns=["predicted_iou", "mask_state", "dropped"]))
    storage.write_json(storage.join(step.folder, "statistics.json"), counts)
    return replace(outcome, summary=summarise(counts))


def read_prompts(step: Step) -> pa.Table:
    """Returns (image_id, uri, boxes, classes, scores) of the images with a row, with class names in the metadata.

    Reviewed rows of pseudo ground truth also have masks and `trusted`. All rows have their status in the step that they
    come from.

    Raises:
        DataError: the boxes are of other images.
    """
    config: PseudoMasksConfig = step.config
    images = read_images(step)
    key = one_of(config, "pgt", "detections")
    check_same_images(step, key)
    columns = [*_OBJECTS, *_STATE, *(_REVIEWED if key == "pgt" else [])]
    boxes = step.inputs[key].read(columns)
    images = tables.with_ids(images, boxes.column("image_id").to_pylist())
    if not images.num_rows:
        raise DataError(
            f"steps.{step.name}.split: no image of split '{config.split}' has boxes: name that of the {key}"
        )
    rows = tables.rows_for(boxes, images.column("image_id").to_pylist())
    source = images.select(["image_id", "uri"])
    for column in [*_OBJECTS, *(_REVIEWED if "trusted" in rows.column_names else [])]:
        source = source.append_column(column, rows.column(column))
    return with_states(source, rows, f"step {step.inputs[key].name}")


def statistics(rows: pa.Table) -> dict[str, Any]:
    """Returns the content of statistics.json.

    Args:
        rows: `predicted_iou`, `mask_state` and `dropped` of all images.
    """
    kept, dropped = (
        np.bincount(np.concatenate([np.zeros(0, np.int64), *map(_numbers, rows.column(key).to_pylist())]), minlength=3)
        for key in ("mask_state", "dropped")
    )
    rated = rows.column("predicted_iou").to_pylist()
    ratings = [value for row in rated for value in row or [] if value is not None]
    return {
        "images": rows.num_rows,
        "masks": int(kept.sum()),
        "dropped": int(dropped.sum()),
        "predicted_iou": float(np.mean(ratings)) if ratings else None,
        **{state: int(a + b) for state, a, b in zip(STATES, kept, dropped, strict=True)},
    }


def _numbers(row: list[int] | None) -> np.ndarray:
    return np.array(row or [], np.int64)


def summarise(counts: dict[str, Any]) -> str:
    """Returns the result of `statistics` as one line."""
    rated = "" if counts["predicted_iou"] is None else f", rated {counts['predicted_iou']:.2f} by SAM"
    return (
        f"{counts['masks']} masks{rated}; {counts['empty']} boxes had an empty one, {counts['exploding']} an exploding "
        f"one, {counts['dropped']} objects left out"
    )


def _shipped_weights(config: PseudoMasksConfig) -> dict[str, str]:
    return identify_shipped(config.sam)


def _warn_of_the_demo_sam(step: Step) -> list[str]:
    """Returns a warning if the shipped weights are used on images other than drawn scenes; else nothing."""
    from weaksam.data.drawn import are_scenes

    config, root = step.config, step.inputs["images"].config.root
    if config.sam.model != "vit_xs" or config.sam.checkpoint is not None or are_scenes(root):
        return []
    where = f"steps.{step.name}.sam"
    # Measured on the val split of tiny_coco, prompted by the true boxes.
    return [
        f"{where}.model: vit_xs was trained on drawn scenes, which {root} does not hold: on photographs its masks fit "
        "worse than filled boxes do (mean IoU 0.454 and 0.549 on COCO). Take an official SAM: "
        f"{where}.model=vit_b with {where}.checkpoint=<path or URI of sam_vit_b_01ec64.pth>"
    ]


STAGE = Stage(
    "pseudo_masks",
    3,
    PseudoMasksConfig,
    run,
    writes="pgt",
    outside=_shipped_weights,
    warnings=_warn_of_the_demo_sam,
)
