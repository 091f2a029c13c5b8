"""The rows that `evaluate` compares: of each annotated image its own, and that of what was found there."""

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


def pairs_of(step: Step, key: str, truth: pa.Table, found: pa.Table) -> Iterator[Pair]:
    """Each annotated image's row with the row of what was found there."""
    name = step.inputs[key].name
    check_same_images(step, key)
    found_ids = found.column("image_id").to_pylist()
    if missing := tables.without_ids(truth, found_ids).column("image_id").to_pylist():
        raise DataError(
            f"steps.{step.name}: step {name} has no row for {len(missing)} of "
            f"{truth.num_rows} images, e.g. {missing[0]}: set the same split for both"
        )
    found = tables.rows_for(found, truth.column("image_id").to_pylist()).combine_chunks()
    truth = truth.combine_chunks()
    for index in range(truth.num_rows):
        row = tables.row_at(truth, index)
        areas = row.pop("areas")
        if len(areas):
            row["areas"] = areas
        elif len(row["masks"]) and all(mask is not None for mask in row["masks"]):
            from weaksam.ops.rle import rle_area

            row["areas"] = np.array([rle_area(mask) for mask in row["masks"]], np.float64)
        yield row, tables.row_at(found, index)


def check_pair(truth: dict[str, Any], found: Mapping[str, Any], num_classes: int) -> None:
    """Raises ValueError unless rows can be compared."""
    from weaksam.ops.checks import check_objects

    check_objects({key: truth[key] for key in ("boxes", "classes")}, "objects", num_classes)
    if found["status"] == schemas.OK:
        check_objects({key: found[key] for key in ("boxes", "classes", "scores")}, "detections", num_classes)


@contextmanager
def naming_image(step: Step, key: str, truth: Mapping[str, Any]) -> Iterator[None]:
    """Turns a ValueError about the rows of an image into a DataError that names image and step."""
    try:
        yield
    except ValueError as error:
        name = f"step {step.inputs[key].name}"
        raise DataError(
            f"steps.{step.name}: image {truth['image_id']} of {name} cannot be judged: {error}: make it again"
        ) from error
