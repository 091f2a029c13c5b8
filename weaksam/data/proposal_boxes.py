"""Proposals for training and testing a detector: cleaned, and packed so that 120,000 images fit in memory.

Axis legend: N proposals of an image.
Boxes are xyxy, absolute pixels, right and bottom exclusive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from weaksam.core import tables

PER_BOX = ("boxes", "predicted_iou", "source")


@dataclass(frozen=True)
class ProposalBoxes:
    """The boxes of many images, concatenated.

    Attributes:
        boxes: (sum of N, 4) float32.
        ratings: (sum of N,) float32, SAM's prediction of the IoU of the mask behind each box.
        starts: (images + 1,) int64, index of each image's first box.
        sizes: (images, 2) int32, height and width; 0 if the image could not be read.
    """

    boxes: np.ndarray
    ratings: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    def of(self, index: int, *, min_side: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns cleaned boxes (N, 4) of an image, and their ratings (N,)."""
        rows = slice(self.starts[index], self.starts[index + 1])
        boxes, kept = clean_boxes(self.boxes[rows], *self.sizes[index].tolist(), min_side=min_side)
        return boxes, self.ratings[rows][kept]

    def images_without(self, *, min_side: float) -> list[int]:
        """Returns the indices of images for which `of` returns no box."""
        return _without(self.boxes, self.starts, self.sizes, min_side)


def pack_proposals(table: pa.Table, image_ids: list[str]) -> ProposalBoxes:
    """Packs the proposals of `image_ids`, in that order.

    Args:
        table: has columns `image_id`, `boxes`, `predicted_iou`, `height`, `width`; a failed row has no boxes.

    Raises:
        KeyError: an image has no row.
    """
    rows = tables.rows_for(table, image_ids).combine_chunks()
    boxes, starts, sizes = _flat(rows)
    ratings = rows.column("predicted_iou").combine_chunks().flatten().to_numpy().astype(np.float32)
    return ProposalBoxes(boxes, ratings, starts, sizes)


def rows_without(table: pa.Table, *, min_side: float) -> list[int]:
    """Returns the rows of a table with `boxes`, `height` and `width` that have no box after `clean_boxes`."""
    return _without(*_flat(table.combine_chunks()), min_side)


def _flat(rows: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns boxes, starts and sizes in the form of `ProposalBoxes`."""
    column = rows.column("boxes").combine_chunks()
    counts = column.value_lengths().fill_null(0).to_numpy().astype(np.int64)
    boxes = column.flatten().flatten().to_numpy().reshape(-1, 4).astype(np.float32)
    sizes = np.stack([rows.column(k).fill_null(0).to_numpy() for k in ("height", "width")], 1).astype(np.int32)
    return boxes, np.concatenate([[0], counts.cumsum()]), sizes


def _without(boxes: np.ndarray, starts: np.ndarray, sizes: np.ndarray, min_side: float) -> list[int]:
    without = []
    for i, (first, end) in enumerate(pairwise(starts.tolist())):
        height, width = sizes[i].tolist()
        if not len(_large_rows(boxes[first:end], height, width, min_side)[1]):
            without.append(i)
    return without


def keep_sources(table: pa.Table, sources: Sequence[int] | None) -> pa.Table:
    """Filters a table of proposals to those prompted by `sources`; None keeps all.

    Args:
        table: has the column `source`; its other lists per box are in `PER_BOX`.
        sources: indices into `schemas.SOURCES`.
    """
    if sources is None:
        return table
    source = table.column("source").combine_chunks()
    stays = np.isin(source.flatten().to_numpy(), sources)
    rows = np.repeat(np.arange(len(table)), source.value_lengths().fill_null(0).to_numpy())
    starts = pa.array(np.concatenate([[0], np.bincount(rows[stays], minlength=len(table)).cumsum()]), pa.int32())
    for index, name in enumerate(table.column_names):
        if name in PER_BOX:
            column = table.column(name).combine_chunks()
            kept = type(column).from_arrays(starts, column.flatten().filter(pa.array(stays)), type=column.type)
            table = table.set_column(index, table.schema.field(name), kept)
    return table


def clean_boxes(boxes: np.ndarray, height: int, width: int, *, min_side: float) -> tuple[np.ndarray, np.ndarray]:
    """Clips boxes, drops small ones and duplicates (in whole pixels), keeps the order; returns boxes and their rows."""
    cut, large = _large_rows(boxes, height, width, min_side)
    firsts = np.unique(cut[large].round(), axis=0, return_index=True)[1]
    kept = large[np.sort(firsts)]
    return np.ascontiguousarray(cut[kept]), kept


def _large_rows(boxes: np.ndarray, height: int, width: int, min_side: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns boxes clipped to the image, and the rows of those that are large enough."""
    cut = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    return cut, np.flatnonzero(((cut[:, 2:] - cut[:, :2]) >= max(min_side, 1)).all(1))
