"""images, a COCO results json -> detections: boxes and masks that another program made.

Only this stage reads a file of another program; every stage that reads detections can read its table.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from pydantic import Field

from weaksam.core import schemas, tables
from weaksam.core.config import OutsideFile, Reads, StageConfig
from weaksam.core.step import Outcome, Stage, Step

pc: Any = pyarrow.compute  # makes its functions when it is imported, which type checkers cannot follow

_ROWS_PER_PART = 4096


class ImportDetectionsConfig(StageConfig):
    """Reads detections that another program made, from a COCO results json.

    Each image gets a row, which is empty if the file has no entry for the image. Boxes and masks pass the checks of
    datasets: boxes are cut at the borders of their image, and boxes without area are left out; the log counts both. An
    entry without a box gets the box around its mask.
    """

    images: Annotated[str, Reads("images")]
    """The `index` step with the images."""
    results: Annotated[str, OutsideFile()]
    """URI of the file: a list of entries with `image_id`, `category_id`, `score`, and `bbox` or `segmentation` or both.
    The two ids are the dataset's own."""
    split: str | None = None
    """Only images of this split; all when left out."""
    default_score: float | None = Field(default=None, ge=0)
    """Score of entries without a score, e.g. of boxes that prompt SAM; when left out, each entry must have a score."""


def run(step: Step) -> Outcome:
    """Reads the file and writes a row for every image, in this process."""
    table = read_detections(step)
    starts = range(0, table.num_rows, _ROWS_PER_PART)
    parts = [tables.write_part(step.folder, table.slice(start, _ROWS_PER_PART)) for start in starts]
    counts = pc.list_value_length(table["classes"]).to_numpy()
    masks = ", with masks" if table["masks"].null_count < table.num_rows else ""
    summary = f"{counts.sum()} boxes in {np.count_nonzero(counts)} of {table.num_rows} images{masks}"
    return Outcome(rows=table.num_rows, parts=parts, summary=summary)


def read_detections(step: Step) -> pa.Table:
    """Returns the rows of the step's images, with the dataset's category ids, cut at the borders of its images.

    A size that the dataset does not state is read from the image's header.

    Raises:
        ConfigError: no image has the split.
        DataError: names the file and the entry that is at fault.
        StorageError: the storage is at fault.
    """
    from weaksam.data.datasets import fill_sizes
    from weaksam.data.readers.coco_results import read_results

    config: ImportDetectionsConfig = step.config
    images = step.inputs["images"].read(["uri", "split", "height", "width"])
    if config.split is not None:
        images = tables.of_split(images, config.split, where=f"steps.{step.name}.split")
    names = schemas.class_names_of(images.schema)
    rows = fill_sizes(images.combine_chunks()).to_pylist()
    table = read_results(
        config.results,
        [row["image_id"] for row in rows],
        names,
        category_ids=schemas.category_ids_of(images.schema),
        sizes={row["image_id"]: (row["height"], row["width"]) for row in rows if row["height"] and row["width"]},
        default_score=config.default_score,
    )
    schema = schemas.with_metadata(schemas.DETECTIONS, fingerprint=step.fingerprint, class_names=names)
    return table.replace_schema_metadata(schema.metadata)


STAGE = Stage("import_detections", 1, ImportDetectionsConfig, run, writes="detections")
