"""Reads the images that a step maps."""

from __future__ import annotations

import pyarrow as pa

from weaksam.core import tables
from weaksam.core.step import Step


def read_images(step: Step, *columns: str) -> pa.Table:
    """Returns (image_id, uri, split, *columns) of the images of the step's `split`, or of all splits without it.

    The class names are in the metadata of the table.

    Raises:
        ConfigError: no image is of the split.
    """
    images = step.inputs["images"].read(["uri", "split", *columns])
    split = getattr(step.config, "split", None)
    return images if split is None else tables.of_split(images, split, where=f"steps.{step.name}.split")
