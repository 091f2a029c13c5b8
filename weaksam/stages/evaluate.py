"""ground_truth and proposals -> metrics: how good is it?

The only stage, with the report, that may read boxes and masks made by people.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from weaksam import schemas, storage, tables
from weaksam.config import Reads, StageConfig
from weaksam.errors import DataError
from weaksam.stage import Outcome, Stage, Step

_TRUTH = ["boxes", "classes", "difficult", "crowd", "masks"]

# Of the many figures of a task, the ones to look at first.
HEADLINES = {"proposals": ("boxes_per_image", "recall@0.5", "recall@0.75", "recall@0.9", "AR")}
_FOUND = ["status", "boxes", "source", "predicted_iou"]


class EvaluateConfig(StageConfig):
    """Compares proposals with the ground truth: recall, average recall and boxes per image.

    Writes metrics.json and per_class.parquet. Recall is class-free: an object counts as found when any proposal of
    its image overlaps it enough. Size is by mask area where there are masks, else by box area.
    """

    images: Annotated[str, Reads("images")]
    """The `index` step that holds the ground truth."""
    proposals: Annotated[str, Reads("proposals")]
    """The step to be judged."""
    split: str | None = None
    """Only images of this split; all that have ground truth when left out."""
    include_difficult: bool = False
    """Whether objects flagged difficult count."""
    include_crowd: bool = False
    """Whether crowd regions count."""
    reference_rules: bool = False
    """Count as the evaluator of the published method does: one proposal finds one object, difficult and crowd included,
    images without proposals left out, objects shifted by a pixel."""


def run(step: Step) -> Outcome:
    """Matches every annotated image and sums up."""
    from weaksam.ops import metrics

    config: EvaluateConfig = step.config
    rules = (
        metrics.REFERENCE_RULES
        if config.reference_rules
        else metrics.RecallRules(include_difficult=config.include_difficult, include_crowd=config.include_crowd)
    )
    truth, names = _read_truth(step, config.split)
    found = tables.read_step(step.inputs["proposals"], columns=_FOUND)
    records = metrics.concat_records(metrics.match_row(one, other, rules) for one, other in _pairs(step, truth, found))
    figures = metrics.proposal_metrics(records, rules)
    report = {
        "task": "proposals",
        "dataset": step.inputs["images"].config.root,
        "split": config.split,
        "num_images": records.num_images,
        "num_objects": records.num_objects,
        "metrics": figures,
    }
    per_class = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(metrics.recall_by_class(records, names)), per_class)
    storage.write_bytes(storage.join(step.folder, "per_class.parquet"), per_class.getvalue())
    storage.write_json(storage.join(step.folder, "metrics.json"), report)
    told = [
        f"{name} {100 * figures[name]:.1f} %" for name in ("recall@0.5", "recall@0.75", "recall@0.9") if name in figures
    ]
    return Outcome(
        rows=records.num_images, summary=f"{', '.join(told)} with {figures['boxes_per_image']:.0f} boxes per image"
    )


def _read_truth(step: Step, split: str | None) -> tuple[pa.Table, list[str]]:
    """Ground truth of the images asked for, and the class names."""
    images = tables.read_step(step.inputs["images"], columns=["split"])
    truth = tables.read_ground_truth(step.inputs["images"].folder)
    if truth is None:
        raise DataError(
            f"steps.{step.name}: the dataset of step {step.inputs['images'].name} has no boxes to compare with"
        )
    if split is not None:
        images = tables.of_split(images, split, where=f"steps.{step.name}.split")
    wanted = set(images.column("image_id").to_pylist())
    truth = truth.filter(
        pa.array([image_id in wanted for image_id in truth.column("image_id").to_pylist()], pa.bool_())
    )
    if not truth.num_rows:
        raise DataError(f"steps.{step.name}.split: no image of split '{split}' has boxes to compare with")
    return truth.select(["image_id", *_TRUTH]), schemas.class_names_of(truth.schema)


def _pairs(step: Step, truth: pa.Table, found: pa.Table) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
    """Each annotated image's row with the row of its proposals."""
    made_from = step.inputs["proposals"].inputs["images"]
    if made_from.fingerprint != step.inputs["images"].fingerprint:
        raise DataError(
            f"steps.{step.name}: step {step.inputs['proposals'].name} was made from the images of {made_from.name}, "
            f"not of {step.inputs['images'].name}: name the same step for both"
        )
    where = {image_id: index for index, image_id in enumerate(found.column("image_id").to_pylist())}
    missing = [image_id for image_id in truth.column("image_id").to_pylist() if image_id not in where]
    if missing:
        raise DataError(
            f"steps.{step.name}: step {step.inputs['proposals'].name} has no row for {len(missing)} of "
            f"{truth.num_rows} images, e.g. {missing[0]}: set the same split for both"
        )
    truth, found = truth.combine_chunks(), found.combine_chunks()
    for index, image_id in enumerate(truth.column("image_id").to_pylist()):
        row = _row(truth, index)
        masks = row.pop("masks")
        if len(masks) and all(mask is not None for mask in masks):
            from weaksam.ops.masks import rle_area

            row["areas"] = np.array([rle_area(mask) for mask in masks], np.float64)
        yield row, _row(found, where[image_id])


def _row(table: pa.Table, index: int) -> dict[str, Any]:
    """One row; lists of numbers as arrays without a Python object each, because there are millions of boxes."""
    row: dict[str, Any] = {}
    for name in table.column_names:
        value = table.column(name)[index]
        if not pa.types.is_list(value.type) or pa.types.is_large_binary(value.type.value_type):
            row[name] = value.as_py()
        elif value.values is None:
            row[name] = []
        elif name == "boxes":
            row[name] = value.values.flatten().to_numpy().reshape(-1, 4)
        else:
            row[name] = value.values.to_numpy(zero_copy_only=False)
    return row


STAGE = Stage("evaluate", 1, EvaluateConfig, run, writes="metrics")
