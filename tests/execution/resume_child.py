"""A run to be killed: `python -m tests.execution.resume_child CONFIG` is `jobs.pipeline` on a small Ray.

It knows one stage more, `measure`: the simplest that maps images, slowly enough to be hit in between. The callable
writes the ids it was given to the file in RESUME_CHILD_LOG and takes RESUME_CHILD_SECONDS for each.
"""

from __future__ import annotations

import os
import time
from typing import Annotated

import pyarrow as pa

from testing.local_ray import local_ray
from weaksam.cli import main as cli
from weaksam.core import schemas
from weaksam.core.config import Reads, StageConfig
from weaksam.core.step import Outcome, Stage, Step
from weaksam.execution import runtime
from weaksam.execution.pools import PoolResources
from weaksam.pipeline import run_file
from weaksam.stages import STAGES

SCHEMA = pa.schema([("image_id", pa.string()), ("status", pa.string()), ("message", pa.string()), ("sum", pa.int32())])


class MeasureConfig(StageConfig):
    """Adds up the bytes of each image."""

    images: Annotated[str, Reads("images")]
    """The `index` step."""
    resources: PoolResources = PoolResources(max_actors=2, batch_size=4)
    """Where it runs."""


class AddBytes:
    """Fetched images in, rows of SCHEMA out; says in a log which images it was given."""

    def __init__(self, log: str, seconds: float) -> None:
        self.log = log
        self.seconds = seconds

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = []
        for row in batch.to_pylist():
            time.sleep(self.seconds)
            if self.log:
                with open(self.log, "a") as handle:
                    handle.write(row["image_id"] + "\n")
            rows.append({**row, "sum": sum(row["data"] or b"")})
        return schemas.to_table(rows, SCHEMA.with_metadata(batch.schema.metadata))


def run(step: Step) -> Outcome:
    """Maps the images of the `images` step to sums."""
    images = step.inputs["images"].read(["uri"])
    schema = schemas.with_metadata(SCHEMA, fingerprint=step.fingerprint, class_names=[])
    source = images.select(["image_id", "uri"])
    kwargs = {"log": os.environ["RESUME_CHILD_LOG"], "seconds": float(os.environ["RESUME_CHILD_SECONDS"])}
    return runtime.map_images(step, source, AddBytes, kwargs, schema=schema, resources=step.config.resources)


MEASURE = Stage("measure", 1, MeasureConfig, run, writes="sums")


def main() -> None:
    """Runs every step."""
    run_file.STAGES = {**STAGES, "measure": MEASURE}
    with local_ray(store_bytes=100_000_000, parent=os.environ["TMPDIR"]):
        cli.run_job()


if __name__ == "__main__":
    main()
