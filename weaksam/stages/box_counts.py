"""Counts the boxes that a step has written, for its last line in the log: a step that finds nothing ends ok too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from weaksam.core import tables
from weaksam.core.step import Outcome


def with_box_counts(folder: str, outcome: Outcome, column: str) -> Outcome:
    """Returns `outcome` with a summary of the boxes in its parts.

    Args:
        folder: the step's folder.
        outcome: the result of the step.
        column: a list column with one value per box; the smallest one is the fastest to read.
    """
    manifest = {"parts": outcome.parts, "excluded": outcome.excluded}
    table = tables.read_table(folder, manifest, columns=["status", column])
    return replace(outcome, summary=summarise_boxes(tables.with_status_ok(table)[column]))


def summarise_boxes(lists: pa.ChunkedArray) -> str:
    """Returns the mean number of boxes per image and the number of images without boxes; empty without images."""
    if not len(lists):
        return ""
    counts = np.concatenate([chunk.value_lengths().fill_null(0).to_numpy() for chunk in lists.chunks])
    return f"{counts.mean():.2f} boxes per image, {(counts == 0).sum()} images without any"
