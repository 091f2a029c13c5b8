"""images -> detections: the whole image is each of its labels."""

from typing import Annotated

import pyarrow as pa

from weaksam.core import schemas, tables
from weaksam.core.config import Reads, StageConfig
from weaksam.core.step import Outcome, Stage, Step
from weaksam.data.datasets import fill_sizes


class TeachWholeConfig(StageConfig):
    """Finds every label of an image in the whole image."""

    images: Annotated[str, Reads("images")]
    """The `index` step with the images."""


def run(step: Step) -> Outcome:
    images = fill_sizes(step.inputs["images"].read(["uri", "labels", "height", "width"]).combine_chunks())
    rows = [
        {
            "image_id": row["image_id"],
            "status": schemas.OK,
            "message": "",
            "height": row["height"],
            "width": row["width"],
            "classes": row["labels"],
            "boxes": [[0, 0, row["width"], row["height"]]] * len(row["labels"]),
            "scores": [0.5] * len(row["labels"]),
        }
        for row in images.to_pylist()
    ]
    names = schemas.class_names_of(images.schema)
    schema = schemas.with_metadata(schemas.DETECTIONS, fingerprint=step.fingerprint, class_names=names)
    parts = [tables.write_part(step.folder, pa.Table.from_pylist(rows, schema))]
    return Outcome(rows=len(rows), parts=parts, summary=f"{len(rows)} images")


STAGE = Stage("teach_whole", 1, TeachWholeConfig, run, writes="detections")
