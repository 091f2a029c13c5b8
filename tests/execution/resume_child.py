"""A run to be killed: `python -m tests.execution.resume_child CONFIG` is `jobs.pipeline` on a small Ray.

It knows one stage more, `measure`: the simplest that maps images, slowly enough to be hit in between. Its mapper writes
the ids of its images to the file in RESUME_CHILD_LOG and takes RESUME_CHILD_SECONDS for each.
"""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Annotated

import numpy as np
import pyarrow as pa

from testing.local_ray import local_ray
from weaksam.cli.run_command import run_job
from weaksam.core.config import Reads, StageConfig
from weaksam.core.step import Outcome, Stage, Step
from weaksam.execution import runtime
from weaksam.execution.mapping import ImageMapper, Row
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


class AddBytes(ImageMapper):
    """Makes rows of SCHEMA; logs the ids of its images."""

    def __init__(self, log: str, seconds: float) -> None:
        self.log = log
        self.seconds = seconds

    def make(self, image: np.ndarray, row: Row, prepared: object) -> Row:
        time.sleep(self.seconds)
        if self.log:
            with open(self.log, "a") as handle:
                handle.write(row["image_id"] + "\n")
        return {"sum": sum(row["data"])}


def run(step: Step) -> Outcome:
    """Maps the images of the `images` step to sums."""
    source = step.inputs["images"].read(["uri"]).select(["image_id", "uri"])
    factory = partial(AddBytes, os.environ["RESUME_CHILD_LOG"], float(os.environ["RESUME_CHILD_SECONDS"]))
    return runtime.map_images(step, source, factory, schema=SCHEMA, max_pixels=1, resources=step.config.resources)


MEASURE = Stage("measure", 1, MeasureConfig, run, writes="sums")


def main() -> None:
    """Runs every step."""
    run_file.STAGES = {**STAGES, "measure": MEASURE}
    with local_ray(store_bytes=100_000_000, parent=os.environ["TMPDIR"]):
        run_job()


if __name__ == "__main__":
    main()
