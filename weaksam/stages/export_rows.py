"""Reads rows of pgt or detections for an export, with names and sizes of their images, in batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from weaksam.core import tables
from weaksam.core.step import AnyStep
from weaksam.data.annotation_checks import fit_boxes
from weaksam.data.images import read_sizes
from weaksam.data.writers.common import ExportImage
from weaksam.data.writers.places import Place
from weaksam.errors import DataError
from weaksam.stages.export_config import ExportConfig

BATCH = 1024  # images
_COLUMNS = ["status", "height", "width", "boxes", "classes", "scores", "masks"]


@dataclass
class Source:
    """The rows to export, in batches that are the same on every pass.

    `uncertainty` is by image id, in the order of the export; None: the order is that of the ids.
    """

    step: AnyStep[Any]
    config: ExportConfig
    class_names: list[str]
    places: dict[str, Place]  # places of the images that have a usable row, by image id
    image_root: str
    failures: list[str]
    groups: list[list[str]]  # parts that are read together
    excluded: Mapping[str, list[str]]
    category_ids: list[int] | None = None  # the dataset's own, by class
    uncertainty: Mapping[str, float] | None = None
    passed_over: Mapping[str, int] = field(default_factory=dict)  # images that are not exported, by reason
    done: int = 0
    num_masks: int = 0

    def batches(self, left_out: Counter[str]) -> Iterator[list[ExportImage]]:
        """Yields all images in batches; `left_out` counts the boxes and masks that are not exported."""
        self.done = self.num_masks = 0
        groups = self.tables(_COLUMNS)
        for table in groups if self.uncertainty is None else self._in_order(groups):
            for start in range(0, table.num_rows, BATCH):
                images = [self._image(row, left_out) for row in table.slice(start, BATCH).to_pylist()]
                self.num_masks += sum(mask is not None for image in images for mask in image.masks)
                yield images
                self.done += len(images)

    def tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """Yields the rows of the images to export, a table for each of `groups`, sorted by image id."""
        for group in self.groups:
            read = tables.read_parts(self.step.folder, group, columns=["image_id", *columns])
            kept = [tables.without_ids(t, self.excluded.get(p, [])) for p, t in zip(group, read, strict=True)]
            table = pa.concat_tables(kept).sort_by("image_id")
            yield tables.with_ids(table, self.places)

    def _in_order(self, groups: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Yields one table, the most uncertain image first: as few images as people can review fit into memory."""
        table = pa.concat_tables(list(groups))
        yield tables.rows_for(table, self.uncertainty or ())

    def _image(self, row: Mapping[str, Any], left_out: Counter[str]) -> ExportImage:
        image = to_image(row, self.places[row["image_id"]], self.config, left_out)
        return image if self.uncertainty is None else replace(image, uncertainty=self.uncertainty[image.image_id])

    def has_masks(self) -> bool:
        """Returns whether any image has a mask; reads batches until one has."""
        return any(self.num_masks for _ in self.batches(Counter()))


def to_image(row: Mapping[str, Any], place: Place, config: ExportConfig, left_out: Counter[str]) -> ExportImage:
    """Returns a row as an image to export, best boxes first, cut at the image border as its readers would.

    Raises:
        DataError: the image's size is unknown, or a mask has another size.
    """
    boxes, scores = np.array(row["boxes"], np.float32).reshape(-1, 4), np.array(row["scores"], np.float32)
    masks = row["masks"] if config.masks and row["masks"] else [None] * len(boxes)
    is_needed = config.kind.needs_sizes or any(mask is not None for mask in masks)
    height, width = _size(row, place, is_needed=is_needed)
    kept = np.isfinite(scores)
    left_out["boxes_without_finite_score"] += int((~kept).sum())
    left_out["boxes_below_min_score"] += int((kept & (scores < config.min_score)).sum())
    kept &= scores >= config.min_score
    finite = np.where(np.isfinite(boxes).all(1, keepdims=True), boxes, 0)
    clipped, has_area, _ = fit_boxes(finite.astype(np.float64), (height, width) if height else None)
    left_out["boxes_without_area"] += int((kept & ~has_area).sum())
    kept &= has_area
    left_out["boxes_cut_at_border"] += int((kept & (clipped != boxes).any(1)).sum())
    boxes = clipped
    order = np.argsort(-scores, kind="stable")
    order = order[kept[order]]
    left_out["boxes_beyond_max_per_image"] += max(len(order) - (config.max_per_image or len(order)), 0)
    order = order[: config.max_per_image]
    classes = np.array(row["classes"], np.int64)[order]
    chosen = [masks[i] for i in order]
    image = ExportImage(row["image_id"], place, height, width, boxes[order], classes, scores[order], chosen)
    left_out["empty_masks"] += _check_masks(image)
    return image


def _check_masks(image: ExportImage) -> int:
    """Removes masks without pixels and returns their number; raises DataError for a mask of another size."""
    from weaksam.ops.mask_metrics import cover
    from weaksam.ops.rle import rle_area

    empty = 0
    for position, mask in enumerate(image.masks):
        if mask is None:
            continue
        if not cover([mask], (image.height, image.width)):
            raise DataError(
                f"image {image.image_id}: mask {position + 1} is not of the image's size, "
                f"{image.height} x {image.width}: was it made of another image?"
            )
        if not rle_area(mask):
            image.masks[position] = None
            empty += 1
    return empty


def _size(row: Mapping[str, Any], place: Place, *, is_needed: bool) -> tuple[int, int]:
    """Returns height and width of the decoded image, else as the dataset states them, else from the file's header."""
    for height, width in ((row["height"], row["width"]), (place.height, place.width)):
        if height and width:
            return height, width
    if not is_needed:
        return 0, 0
    if (size := read_sizes([place.uri])[0]) is None:
        raise DataError(
            f"image {row['image_id']}: neither its row nor the images table has its height and width, and {place.uri} "
            "cannot be read: put the file back, or give the images of the export by `split`"
        )
    return size
