"""The images a step learns from, with their image-level labels: all that training may know of them."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa

from weaksam import schemas, tables
from weaksam.errors import DataError
from weaksam.stage import Step


def labelled_images(step: Step, *, also: Collection[str] = ()) -> tuple[pa.Table, np.ndarray]:
    """Images of the step's split whose labels are known, and which of the C classes each holds, (images, C) bool.

    Args:
        step: has a split.
        also: ids of images that are there without labels too, as if nothing was in them.

    Raises:
        DataError: there are none.
    """
    split = step.config.split
    images = tables.read_step(step.inputs["images"], columns=["uri", "split", "labels"])
    names = schemas.class_names_of(images.schema)
    images = tables.of_split(images, split, where=f"steps.{step.name}.split")
    usable = [row["labels"] is not None or row["image_id"] in also for row in images.to_pylist()]
    images = images.filter(pa.array(usable, pa.bool_()))
    if not images.num_rows or not names:
        raise DataError(
            f"steps.{step.name}.split: no image of split '{split}' has image-level labels: name a split that has"
        )
    labels = np.zeros((images.num_rows, len(names)), bool)
    for row, present in enumerate(images.column("labels").to_pylist()):
        labels[row, present or []] = True
    return images, labels
