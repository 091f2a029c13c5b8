"""The rows that `evaluate` compares: the ground-truth row of each annotated image, and its row of another step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from weaksam.core import schemas, tables
from weaksam.core.step import Step
from weaksam.errors import DataError
from weaksam.stages.checks import check_same_images
from weaksam.stages.evaluate_masks import Pair


def pairs_of(step: Step, key: str, truth: pa.Table, rows: pa.Table) -> Iterator[Pair]:
    """Yields the ground-truth row of each annotated image with the image's row of `rows`."""
    name = step.inputs[key].name
    check_same_images(step, key)
    row_ids = rows.column("image_id").to_pylist()
    if missing := tables.without_ids(truth, row_ids).column("image_id").to_pylist():
        raise DataError(
            f"steps.{step.name}: step {name} has no row for {len(missing)} of "
            f"{truth.num_rows} images, e.g. {missing[0]}: set the same split for both"
        )
    rows = tables.rows_for(rows, truth.column("image_id").to_pylist()).combine_chunks()
    truth = truth.combine_chunks()
    for index in range(truth.num_rows):
        truth_row = tables.row_at(truth, index)
        areas = truth_row.pop("areas")
        if len(areas):
            truth_row["areas"] = areas
        elif len(truth_row["masks"]) and all(mask is not None for mask in truth_row["masks"]):
            from weaksam.ops.rle import rle_area

            truth_row["areas"] = np.array([rle_area(mask) for mask in truth_row["masks"]], np.float64)
        yield truth_row, tables.row_at(rows, index)


def check_pair(truth_row: dict[str, Any], row: Mapping[str, Any], num_classes: int) -> None:
    """Raises ValueError unless the rows can be compared."""
    from weaksam.ops.checks import check_objects

    check_objects({key: truth_row[key] for key in ("boxes", "classes")}, "objects", num_classes)
    if row["status"] == schemas.OK:
        check_objects({key: row[key] for key in ("boxes", "classes", "scores")}, "detections", num_classes)


@contextmanager
def naming_image(step: Step, key: str, truth_row: Mapping[str, Any]) -> Iterator[None]:
    """Turns a ValueError about the rows of an image into a DataError that names image and step."""
    try:
        yield
    except ValueError as error:
        name = f"step {step.inputs[key].name}"
        raise DataError(
            f"steps.{step.name}: image {truth_row['image_id']} of {name} cannot be judged: {error}: make it again"
        ) from error
