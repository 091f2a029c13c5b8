"""Both tables of a dataset as one, for tests of readers."""

from __future__ import annotations

from weaksam.core import schemas
from weaksam.data.datasets import Dataset


def rows(dataset: Dataset) -> dict[str, dict]:
    """Rows of both tables by image id; the tables must have exactly the declared types."""
    assert dataset.images.schema.equals(schemas.IMAGES)
    merged = {row["image_id"]: row for row in dataset.images.to_pylist()}
    if dataset.ground_truth is not None:
        assert dataset.ground_truth.schema.equals(schemas.GROUND_TRUTH)
        for row in dataset.ground_truth.to_pylist():
            merged[row["image_id"]] |= row
    return merged
