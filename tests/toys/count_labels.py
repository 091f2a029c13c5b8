"""images -> labels: counts labels."""

from typing import Annotated

from weaksam.core import storage
from weaksam.core.config import Reads, StageConfig
from weaksam.core.step import Outcome, Stage, Step


class CountConfig(StageConfig):
    """Counts the labels of a dataset."""

    images: Annotated[str, Reads("images")]
    """The `index` step with the images."""
    at_least: int = 0
    """Fewer labels are an error."""


def run(step: Step) -> Outcome:
    images = step.inputs["images"].read(["labels"])
    count = sum(map(len, images.column("labels").to_pylist()))
    storage.write_json(storage.join(step.folder, "count.json"), {"labels": count})
    return Outcome(rows=images.num_rows, summary=f"{count} labels")


STAGE = Stage("count_labels", 1, CountConfig, run, writes="count")
