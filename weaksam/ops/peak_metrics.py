"""Share of the peaks that prompted SAM and lie inside objects of their class.

Two steps, as for recall: `locate_peaks` returns a compact record of an image, and `peak_metrics` computes metrics of
many records.

Source: the pointing game of Excitation Backprop (Zhang et al., ECCV 2016, arXiv 1608.00507), as implemented by
TorchRay. A hit on any object of the class counts, including difficult objects and crowds; if all objects of a class in
an image are flagged difficult, its peaks are ignored. Differs from the source: every peak counts, not only the highest
of a map; there is no margin around objects (15 pixels in the source); the share is over all peaks, not the mean over
classes; a peak of a class that is not in the image counts as outside, because labels may be predicted.

Peaks are (x, y), pixels of the image, with pixel centres at integer coordinates; boxes are xyxy with pixel edges at
integer coordinates, right and bottom exclusive. A peak lies in the pixel (floor(x + 0.5), floor(y + 0.5)), and in a
box where left <= x + 0.5 < right, the same for y. Masks are COCO compressed counts (bytes), None: no mask.
Axis legend: P peaks, G objects (ground truth), I images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from weaksam.core.schemas import OK, SOURCES
from weaksam.ops.rle import rle_to_runs


@dataclass(frozen=True)
class PeakRecords:
    """The data of one or more images that the metrics need; P counts the peaks of all images."""

    kinds: np.ndarray  # (P,) int64, index into SOURCES
    inside: np.ndarray  # (P,) bool: inside the mask of an object of its class, or its box without a mask
    in_box: np.ndarray  # (P,) bool: inside the box of an object of its class
    counts: np.ndarray  # (P,) bool: false if all objects of the class in the image are difficult
    num_images: int


def locate_peaks(truth: Mapping[str, Any], proposals: Mapping[str, Any]) -> PeakRecords:
    """Returns the record of an image from its rows in the tables `ground_truth` and `proposals`.

    Args:
        truth: `boxes`, `classes`, `difficult`, `masks`; `masks` and its elements may be None.
        proposals: `status`, `height`, `width`, and `points`: mappings with `x`, `y`, `label`, `kind`, or None. Label -1
            means pooled classes: any object counts. A row that is not ok has no peaks.

    Raises:
        ValueError: a mask does not have the size of the image.
    """
    points: Any = proposals["points"] if proposals["status"] == OK else None
    points = [] if points is None else points
    xy = np.array([(point["x"], point["y"]) for point in points], np.float64).reshape(-1, 2) + 0.5
    labels, kinds = (np.array([point[key] for point in points], np.int64) for key in ("label", "kind"))
    is_of_class = (labels[:, None] == np.asarray(truth["classes"], np.int64)) | (labels[:, None] < 0)
    boxes = np.asarray(truth["boxes"], np.float64).reshape(-1, 4)
    in_box = ((boxes[:, :2] <= xy[:, None]) & (xy[:, None] < boxes[:, 2:])).all(axis=2)
    inside = np.array(in_box)
    for index, mask in enumerate(truth["masks"] or [] if len(points) else []):
        if mask is not None:
            inside[:, index] = _lie_in_mask(xy, mask, (proposals["height"], proposals["width"]))
    is_plain = ~np.asarray(truth["difficult"], bool)
    return PeakRecords(
        kinds=kinds,
        inside=(inside & is_of_class).any(axis=1),
        in_box=(in_box & is_of_class).any(axis=1),
        counts=(is_of_class & is_plain).any(axis=1) | ~is_of_class.any(axis=1),
        num_images=1,
    )


def _lie_in_mask(xy: np.ndarray, mask: bytes, hw: tuple[int, int]) -> np.ndarray:
    """Returns which points (P, 2) are in a mask, (P,) bool, without decoding it; pixel edges are at integers."""
    height, width = hw
    ends = np.cumsum(rle_to_runs(mask))
    if not len(ends) or ends[-1] != height * width:
        raise ValueError(f"a mask must cover height * width = {height} * {width} pixels, got {ends[-1:].sum()}")
    columns, rows = np.floor(xy).astype(np.int64).T
    is_in_image = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    runs = np.searchsorted(ends, columns * height + rows, side="right")  # runs go down the columns, the first is zeros
    return is_in_image & (runs % 2 == 1)


def concat_records(records: Iterable[PeakRecords]) -> PeakRecords:
    """Concatenates records; raises ValueError without any."""
    parts = list(records)
    if not parts:
        raise ValueError("records must hold at least one record, got none")
    columns = {key: np.concatenate([getattr(part, key) for part in parts]) for key in ("kinds", "inside", "in_box")}
    counts = np.concatenate([part.counts for part in parts])
    return PeakRecords(**columns, counts=counts, num_images=sum(part.num_images for part in parts))


def peak_metrics(records: PeakRecords) -> dict[str, float]:
    """Returns the metrics of all peaks, then of each kind that occurs; empty without peaks.

    Names: `peaks_inside`, the share of peaks inside an object of their class, by masks if there are any;
    `peaks_in_box`, the same by boxes only, comparable between datasets with and without masks; `peaks_per_image`, the
    number of all peaks, including those that the shares ignore. By kind: `peaks_coarse_inside` ...
    """
    metrics: dict[str, float] = {}
    groups = {"": np.ones(len(records.kinds), bool)}
    groups |= {f"_{name}": records.kinds == kind for kind, name in enumerate(SOURCES)}
    for name, chosen in groups.items():
        judged = chosen & records.counts
        if judged.any():
            metrics[f"peaks{name}_inside"] = float(records.inside[judged].mean())
            metrics[f"peaks{name}_in_box"] = float(records.in_box[judged].mean())
        if chosen.any():
            metrics[f"peaks{name}_per_image"] = float(chosen.sum() / records.num_images)
    return metrics
