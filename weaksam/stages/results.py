"""Detections made elsewhere, a COCO results json that a step's `results` names, as rows of the detections table."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from weaksam.core import schemas, tables
from weaksam.core.step import Step


def read_step_results(step: Step, image_ids: Sequence[str], *, default_score: float | None = None) -> pa.Table:
    """The rows of `image_ids`, by the category ids of the dataset and cut at the borders of its images.

    A size that the dataset does not state is read from the image's header.

    Raises:
        DataError: names the file and the entry that is at fault.
        StorageError: the storage is at fault.
    """
    from weaksam.data.datasets import fill_sizes
    from weaksam.data.readers.coco_results import read_results

    images = tables.read_step(step.inputs["images"], columns=["uri", "height", "width"])
    wanted = set(image_ids)
    chosen = [image_id in wanted for image_id in images.column("image_id").to_pylist()]
    rows = fill_sizes(images.filter(pa.array(chosen, pa.bool_())).combine_chunks()).to_pylist()
    sizes = {row["image_id"]: (row["height"], row["width"]) for row in rows if row["height"] and row["width"]}
    return read_results(
        step.config.results,
        list(image_ids),
        tables.class_names(step.inputs["images"]),
        category_ids=schemas.category_ids_of(images.schema),
        sizes=sizes,
        default_score=default_score,
    )
