"""images, boxes (pgt or a COCO results json) -> pgt with masks: SAM draws one for each box.

Each image is encoded once, all of its boxes prompt together. What people drew stays as it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from weaksam.core import schemas, storage, tables
from weaksam.core.config import OutsideFile, Reads, StageConfig
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import DataError, ImageError
from weaksam.execution import metrics
from weaksam.stages.checks import check_same_images, with_states
from weaksam.stages.proposal_settings import ProposalResources, SamSettings
from weaksam.stages.results import read_step_results
from weaksam.stages.sam_actor import SamWatch, Watched, identify_shipped, load_engine

if TYPE_CHECKING:
    from weaksam.ops.pseudo_masks import MaskRules

_GIVEN = ["boxes", "classes", "scores"]
_REVIEWED = ["masks", "trusted"]  # columns that not every table has
_STATE = ["status", "message"]


class PseudoMasksConfig(StageConfig):
    """Draws a mask for each box, of pseudo ground truth or from elsewhere: the box prompts SAM.

    Rows are those of `pgt` with masks, SAM's own rating of each (`predicted_iou`) and what each was like as it was
    drawn (`mask_state`: 0 fits, 1 empty, 2 exploding). What people reviewed stays, boxes and masks: only masks that are
    missing there are drawn, and no object is left out. Also writes statistics.json.
    """

    images: Annotated[str, Reads("images")]
    """The `index` step with the images."""
    pgt: Annotated[str | None, Reads("pgt")] = None
    """The step whose boxes prompt; its images are used."""
    results: Annotated[str | None, OutsideFile()] = None
    """URI of boxes made elsewhere that prompt instead, a COCO results json; `score` may be left out."""
    split: str | None = None
    """Only images of this split; all that have a row when left out."""
    sam: SamSettings
    """The segmenter."""
    candidates: Literal["single", "best_of_three"] = "single"
    """The one mask SAM draws for a box, or of the three it draws for doubtful prompts that which it rates best."""
    boxes: Literal["mask", "prompt"] = "mask"
    """Boxes of the rows: tight around the masks, or as they were."""
    max_outside: float = Field(default=0.5, ge=0, le=1)
    """A mask with a larger share of its pixels outside its box is exploding."""
    empty: Literal["box", "drop"] = "box"
    """Instead of a mask without pixels: all of the box, or the object is left out."""
    exploding: Literal["keep", "box", "drop"] = "keep"
    """Instead of an exploding mask: the same, or it stays and is only counted."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Larger images are refused with status `too_large`."""
    resources: ProposalResources = ProposalResources()
    """Where it runs."""

    @model_validator(mode="after")
    def _has_one_source(self) -> PseudoMasksConfig:
        if (self.pgt is None) == (self.results is None):
            raise ValueError("one of pgt and results is to prompt")
        return self

    def rules(self) -> MaskRules:
        """What is done about masks that are not about their box."""
        from weaksam.ops.pseudo_masks import MaskRules

        return MaskRules(self.max_outside, self.empty, self.exploding)


class DrawMasks:
    """Fetched images with `boxes`, `classes` and `scores` to rows of `schemas.PSEUDO_MASKS`; holds SAM."""

    def __init__(self, config: PseudoMasksConfig, schema: pa.Schema) -> None:
        self.engine = load_engine(config.sam, config.resources)
        self.config, self.schema, self.rules = config, schema, config.rules()
        self.watch = SamWatch(self.engine)

    def __call__(self, batch: pa.Table) -> pa.Table:
        from weaksam.execution.rows import make_rows

        return schemas.to_table(make_rows(batch, self.config.max_pixels, self._draw, prepare=self._encode), self.schema)

    def _encode(self, image: np.ndarray, given: dict[str, Any]) -> Watched | None:
        missing = _missing(given) if given.get("trusted") else given["boxes"]
        return self.watch.encode(image) if missing else None

    def _draw(self, image: np.ndarray, given: dict[str, Any], watched: Watched | None) -> dict[str, Any]:
        from weaksam.ops.pseudo_masks import choose_masks, tight_boxes

        if given.get("trusted"):
            return self._complete(image, given, watched)
        boxes, hw = np.array(given["boxes"] or [], np.float32).reshape(-1, 4), image.shape[:2]
        masks, ratings = self._masks(watched, boxes)
        chosen = choose_masks(masks, boxes, hw, self.rules)
        kept = chosen.kept
        metrics.count("weaksam_boxes_kept", len(kept))
        dropped = np.delete(chosen.states, kept)
        return {
            "boxes": tight_boxes(chosen.masks, hw) if self.config.boxes == "mask" else boxes[kept],
            "classes": np.array(given["classes"] or [], np.int32)[kept],
            "scores": np.array(given["scores"] or [], np.float32)[kept],
            "masks": chosen.masks,
            "predicted_iou": ratings[kept],
            "mask_state": chosen.states[kept].astype(np.uint8),
            "dropped": dropped.astype(np.uint8),
            "trusted": False,
        }

    def _complete(self, image: np.ndarray, given: dict[str, Any], watched: Watched | None) -> dict[str, Any]:
        """A reviewed row with the masks that it lacks; ImageError when those it has are of another image's size."""
        from weaksam.ops.pseudo_masks import FITS, choose_masks
        from weaksam.ops.rle import rle_to_runs

        boxes, hw = np.array(given["boxes"], np.float32).reshape(-1, 4), image.shape[:2]
        masks: list[bytes | None] = list(given["masks"] or [None] * len(boxes))
        missing = _missing(given)
        if any(mask is not None and rle_to_runs(mask).sum() != hw[0] * hw[1] for mask in masks):
            raise ImageError("unreadable", f"the masks that people drew are not of its size, {hw[0]} x {hw[1]}")
        rules = replace(self.rules, empty="box", exploding="keep" if self.rules.exploding == "keep" else "box")
        drawn, drawn_ratings = self._masks(watched, boxes[missing])
        chosen = choose_masks(drawn, boxes[missing], hw, rules)
        ratings: list[float | None] = [None] * len(boxes)
        states = np.full(len(boxes), FITS, np.uint8)
        for index, mask, rating, state in zip(missing, chosen.masks, drawn_ratings, chosen.states, strict=True):
            masks[index], ratings[index], states[index] = mask, float(rating), state
        metrics.count("weaksam_boxes_kept", len(boxes))
        row = {key: given[key] for key in _GIVEN} | {"masks": masks, "predicted_iou": ratings, "mask_state": states}
        return row | {"dropped": [], "trusted": True}

    def _masks(self, watched: Watched | None, boxes: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """A mask and SAM's rating of it for each box."""
        if watched is None:
            return [], np.zeros(0, np.float32)
        with self.watch.decoding(watched) as encoded:
            drawn = self.engine.masks_for_boxes(encoded, boxes, multimask=self.config.candidates == "best_of_three")
        best = drawn.predicted_iou.argmax(1)
        return [masks[i] for masks, i in zip(drawn.masks, best, strict=True)], drawn.predicted_iou.max(1)


def _missing(given: dict[str, Any]) -> list[int]:
    """Which boxes of a reviewed row have no mask."""
    masks = given["masks"] or [None] * len(given["boxes"])
    return [index for index, mask in enumerate(masks) if mask is None]


def run(step: Step) -> Outcome:
    """Maps the images that have boxes to rows with masks."""
    from weaksam.execution import runtime

    config: PseudoMasksConfig = step.config
    source, names = read_prompts(step)
    schema = schemas.with_metadata(schemas.PSEUDO_MASKS, fingerprint=step.fingerprint, class_names=names)
    kwargs = {"config": config, "schema": schema}
    outcome = runtime.map_images(step, source, DrawMasks, kwargs, schema=schema, resources=config.resources)
    there = {"parts": outcome.parts, "excluded": outcome.excluded}
    told = statistics(tables.read_table(step.folder, there, columns=["predicted_iou", "mask_state", "dropped"]))
    storage.write_json(storage.join(step.folder, "statistics.json"), told)
    return replace(outcome, summary=summarise(told))


def read_prompts(step: Step) -> tuple[pa.Table, list[str]]:
    """(image_id, uri, boxes, classes, scores) of the images with a row, and the class names.

    And masks and `trusted` where the rows are pseudo ground truth that says what people reviewed, and which rows of it
    failed.

    Raises:
        DataError: the boxes are of other images.
    """
    config: PseudoMasksConfig = step.config
    images = tables.read_step(step.inputs["images"], columns=["uri", "split"])
    if config.split is not None:
        images = tables.of_split(images, config.split, where=f"steps.{step.name}.split")
    names, ids = tables.class_names(step.inputs["images"]), images.column("image_id").to_pylist()
    if config.results is not None:
        found = read_step_results(step, ids, default_score=1.0).select(["image_id", *_GIVEN])
    else:
        check_same_images(step, "pgt")
        found = tables.read_step(step.inputs["pgt"], columns=[*_GIVEN, *_REVIEWED, *_STATE])
    where = {image_id: row for row, image_id in enumerate(found.column("image_id").to_pylist())}
    images = images.filter(pa.array([image_id in where for image_id in ids], pa.bool_()))
    if not images.num_rows:
        raise DataError(f"steps.{step.name}.split: no image of split '{config.split}' has boxes: name that of the pgt")
    rows = found.take(pa.array([where[image_id] for image_id in images.column("image_id").to_pylist()], pa.int64()))
    source = images.select(["image_id", "uri"])
    for key in [*_GIVEN, *(_REVIEWED if "trusted" in rows.column_names else [])]:
        source = source.append_column(key, rows.column(key))
    if config.pgt is not None:
        source = with_states(source, rows, f"step {step.inputs['pgt'].name}")
    return source, names


def statistics(rows: pa.Table) -> dict[str, Any]:
    """What was drawn, in numbers.

    Args:
        rows: `predicted_iou`, `mask_state` and `dropped` of all images.
    """
    from weaksam.ops.pseudo_masks import STATES

    stayed, gone = (
        np.bincount(np.concatenate([np.zeros(0, np.int64), *map(_numbers, rows.column(key).to_pylist())]), minlength=3)
        for key in ("mask_state", "dropped")
    )
    rated = rows.column("predicted_iou").to_pylist()
    ratings = [value for row in rated for value in row or [] if value is not None]
    return {
        "images": rows.num_rows,
        "masks": int(stayed.sum()),
        "dropped": int(gone.sum()),
        "predicted_iou": float(np.mean(ratings)) if ratings else None,
        **{state: int(a + b) for state, a, b in zip(STATES, stayed, gone, strict=True)},
    }


def _numbers(row: list[int] | None) -> np.ndarray:
    return np.array(row or [], np.int64)


def summarise(told: dict[str, Any]) -> str:
    """One line of `statistics`."""
    rated = "" if told["predicted_iou"] is None else f", rated {told['predicted_iou']:.2f} by SAM"
    return (
        f"{told['masks']} masks{rated}; {told['empty']} boxes had an empty one, {told['exploding']} an exploding one, "
        f"{told['dropped']} objects left out"
    )


def _shipped_weights(config: PseudoMasksConfig) -> dict[str, str]:
    return identify_shipped(config.sam)


def _warn_of_the_demo_sam(step: Step) -> list[str]:
    """Of the shipped weights on anything but drawn scenes; of other weights nothing is known."""
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
