"""Reads a COCO results json, the detections of any program, as rows of the detections table.

Boxes are converted from xywh to xyxy and checked like those of datasets: clipped to their image, dropped without area.
An image without results has no detections. Images are identified by the dataset's own image ids, categories by the
dataset's own category ids (`data.categories`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from weaksam.core import schemas, storage
from weaksam.data.annotation_checks import Size, as_number, excerpt, fit_boxes, read_segmentation, read_xywh
from weaksam.data.categories import default_category_ids
from weaksam.data.datasets import first_ten
from weaksam.data.remarks import Remarks
from weaksam.errors import DataError

_REPEATED = "entries equal another of their image, and both count (were files joined, or images processed twice?)"
_OTHER_IMAGE = "results are of images that are not asked for and are left out"


def read_results(
    uri: str,
    image_ids: Sequence[str],
    class_names: Sequence[str],
    *,
    category_ids: Sequence[int] | None,
    sizes: Mapping[str, Size | None] | None = None,
    default_score: float | None = None,
) -> pa.Table:
    """Reads the detections of `image_ids`, best first, in the form of `schemas.DETECTIONS`.

    Args:
        uri: URI of the file.
        image_ids: ids of the images that get a row.
        class_names: class names of the dataset.
        category_ids: ids of its classes; None: `default_category_ids`.
        sizes: (height, width) by image id; without a size boxes are clipped at the left and top border only.
        default_score: score of an entry without a score, or with null; None: every entry must have a score.

    Raises:
        DataError: an entry is invalid; names the file and the entry.
    """
    entries = _load(uri)
    ids = list(category_ids or default_category_ids(class_names))
    reader = _Reader(uri, {category: label for label, category in enumerate(ids)}, default_score)
    entries_by_image: dict[str, list[_Entry]] = {image_id: [] for image_id in image_ids}
    remarks = Remarks(uri)
    for position, entry in enumerate(entries):
        reader.check_keys(position, entry)
        image_id = str(_whole(entry["image_id"]))
        if image_id in entries_by_image:
            size = (sizes or {}).get(image_id)
            entries_by_image[image_id].append(reader.read(position, entry, size, remarks))
        else:
            remarks.add(_OTHER_IMAGE, f"entry {position} ({image_id})")
    _check_categories(uri, entries, dict(zip(ids, class_names, strict=True)))
    if entries and image_ids and not any(entries_by_image.values()):
        result_id, dataset_id = entries[0]["image_id"], image_ids[0]
        raise DataError(
            f"{uri}: none of its {len(entries)} entries is of an image to be judged (image_id {result_id!r} there, "
            f"{dataset_id!r} here): give the results of this dataset and split"
        )
    rows = [
        _row(image_id, image_entries, (sizes or {}).get(image_id), remarks)
        for image_id, image_entries in entries_by_image.items()
    ]
    remarks.log()
    return schemas.to_table(rows, schemas.DETECTIONS)


def _load(uri: str) -> list[Any]:
    try:
        entries = json.loads(storage.read_bytes(uri))
    except (ValueError, RecursionError, FileNotFoundError) as error:
        raise DataError(f"{uri}: cannot be read as a COCO results json: {error}") from error
    if not isinstance(entries, list):
        raise DataError(f"{uri}: a COCO results json is a list, this holds {type(entries).__name__}")
    return entries


def _check_categories(uri: str, entries: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> None:
    """Raises DataError if results have category ids that the dataset lacks; the message lists the ids of both."""
    used = {repr(_whole(entry["category_id"])): position for position, entry in reversed(list(enumerate(entries)))}
    known = {repr(number) for number in names}
    if strange := sorted((number for number in used if number not in known), key=used.__getitem__):
        own = first_ten([f"{number} {name}" for number, name in names.items()])
        raise DataError(
            f"{uri}: entry {used[strange[0]]}: its category_id {strange[0]} is none of the dataset's: the results have "
            f"{first_ten(sorted(used, key=lambda number: (len(number), number)))}, the dataset has {own}: give results "
            "with the dataset's own category ids"
        )


def _whole(number: Any) -> Any:
    """Returns an id; a float such as 3.0, as pandas writes it, becomes an int."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


@dataclass(frozen=True)
class _Entry:
    """A detection; `size` is the size of its mask."""

    name: str
    corners: list[float]
    label: int
    score: float
    mask: bytes | None
    size: Size | None


@dataclass(frozen=True)
class _Reader:
    uri: str
    labels: Mapping[Any, int]
    default_score: float | None

    def check_keys(self, position: int, entry: Any) -> None:
        """Raises DataError if an entry lacks the keys of a detection."""
        needed = ["image_id", "category_id", *(["score"] if self.default_score is None else [])]
        missing = [key for key in needed if not isinstance(entry, dict) or entry.get(key) is None]
        if missing or not (entry.get("bbox") or entry.get("segmentation")):
            raise DataError(
                f"{self.uri}: entry {position} is no detection (it has no "
                f"{', '.join(missing) or 'bbox or segmentation'}): {excerpt(entry)}: it must have "
                f"{', '.join(needed)} and a bbox or an RLE segmentation"
            )

    def read(self, position: int, entry: dict[str, Any], size: Size | None, remarks: Remarks) -> _Entry:
        """Parses an entry; its class is checked later, together with all others."""
        where, name = f"{self.uri}: entry {position}", f"entry {position}"
        around, mask, own = read_segmentation(entry.get("segmentation"), size, where, remarks, name)
        if around is not None and own is None:
            raise DataError(f"{where}: its segmentation is no RLE, and polygons need an image of known size")
        corners = read_xywh(entry["bbox"], where) if entry.get("bbox") else around
        stated = entry.get("score")
        score = as_number(self.default_score if stated is None else stated)
        if score is None or isinstance(stated, str):
            raise DataError(f"{where}: its score must be a finite number, got {excerpt(stated)}")
        try:
            label = self.labels.get(_whole(entry["category_id"]), -1)
        except TypeError:  # a list or an object
            label = -1
        return _Entry(name, corners or [0.0] * 4, label, score, mask, own)  # without a box: no area, dropped later


def _row(image_id: str, entries: Sequence[_Entry], size: Size | None, remarks: Remarks) -> dict[str, Any]:
    entries = sorted(entries, key=lambda entry: -entry.score)
    for entry in entries:
        size = size or entry.size
        if entry.size not in (None, size):
            raise DataError(
                f"{remarks.where}: {entry.name}: its RLE is of size {list(entry.size or ())}, that of another entry of "
                f"image {image_id} of {list(size or ())}"
            )
    boxes, has_area, is_outside = fit_boxes(np.array([e.corners for e in entries], np.float64).reshape(-1, 4), size)
    remarks.add_boxes([entry.name for entry in entries], boxes, has_area, is_outside)
    kept = [entries[i] for i in np.flatnonzero(has_area).tolist()]
    known: set[tuple] = set()
    for entry in kept:
        key = (entry.label, *entry.corners, entry.score, entry.mask)
        if key in known:
            remarks.add(_REPEATED, entry.name)
        known.add(key)
    height, width = size or (None, None)
    row = {"image_id": image_id, "status": schemas.OK, "message": "", "height": height, "width": width}
    row |= {"boxes": boxes[has_area], "classes": [entry.label for entry in kept]}
    masks = [entry.mask for entry in kept]
    return row | {
        "scores": [entry.score for entry in kept],
        "masks": masks if any(mask is not None for mask in masks) else None,
    }
