"""Proposals as a detector is trained on and tested with: cleaned, and packed so that 120,000 images fit in memory.

Axis legend: N proposals of an image.
Boxes are xyxy, absolute pixels, right and bottom exclusive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class ProposalBoxes:
    """The boxes of many images, one after the other.

    Attributes:
        boxes: (sum of N, 4) float32.
        starts: (images + 1,) int64, where each image's boxes begin.
        sizes: (images, 2) int32, height and width; 0 where the image could not be read.
    """

    boxes: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    def of(self, index: int, *, min_side: float) -> np.ndarray:
        """(N, 4) float32 cleaned boxes of an image."""
        found = self.boxes[self.starts[index] : self.starts[index + 1]]
        return clean_boxes(found, *self.sizes[index].tolist(), min_side=min_side)


def pack_proposals(table: pa.Table, image_ids: list[str]) -> ProposalBoxes:
    """The proposals of `image_ids`, in that order.

    Args:
        table: with `image_id`, `boxes`, `height`, `width`; a failed row has no boxes.

    Raises:
        KeyError: an image has no row.
    """
    where = {image_id: i for i, image_id in enumerate(table.column("image_id").to_pylist())}
    rows = table.take(pa.array([where[image_id] for image_id in image_ids], pa.int64())).combine_chunks()
    column = rows.column("boxes").combine_chunks()
    counts = column.value_lengths().fill_null(0).to_numpy().astype(np.int64)
    boxes = column.flatten().flatten().to_numpy().reshape(-1, 4).astype(np.float32)
    sizes = np.stack([rows.column(k).fill_null(0).to_numpy() for k in ("height", "width")], 1).astype(np.int32)
    return ProposalBoxes(boxes, np.concatenate([[0], counts.cumsum()]), sizes)


def keep_sources(table: pa.Table, sources: Sequence[int] | None) -> pa.Table:
    """A table with `boxes` and `source` less the proposals that others than `sources` prompted; None = all stay."""
    if sources is None:
        return table
    boxes, source = (table.column(name).combine_chunks() for name in ("boxes", "source"))
    stays = np.isin(source.flatten().to_numpy(), sources)
    rows = np.repeat(np.arange(len(table)), source.value_lengths().fill_null(0).to_numpy())
    starts = np.concatenate([[0], np.bincount(rows[stays], minlength=len(table)).cumsum()])
    kept = type(boxes).from_arrays(pa.array(starts, pa.int32()), boxes.flatten().filter(pa.array(stays)))
    return table.set_column(table.column_names.index("boxes"), "boxes", kept).drop_columns(["source"])


def clean_boxes(boxes: np.ndarray, height: int, width: int, *, min_side: float) -> np.ndarray:
    """Boxes cut to the image, without small ones and repetitions (to whole pixels), in their order."""
    cut = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    large = ((cut[:, 2:] - cut[:, :2]) >= max(min_side, 1)).all(1)
    cut = cut[large]
    firsts = np.unique(cut.round(), axis=0, return_index=True)[1]
    return np.ascontiguousarray(cut[np.sort(firsts)])
