"""Reads the annotations of an image in COCO's form: fields of entries, objects with boxes and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from weaksam.data.annotation_checks import Size, as_number, excerpt, fit_boxes, read_segmentation, read_xywh
from weaksam.data.datasets import Objects
from weaksam.data.remarks import BOX_OF_SEGMENTATION, NO_BOX, Remarks
from weaksam.errors import DataError


def field_of(entry: Any, key: str, kinds: tuple[type, ...], where: str) -> Any:
    """Returns the value of a key of an entry; raises DataError if it is not of one of the types `kinds`."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kinds) or isinstance(value, bool):  # JSON's true is Python's 1
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"{where}: {key!r} must be {expected}, got {value!r} in {str(entry)[:120]}")
    return value


def name_of(annotation: Any, uri: str) -> str:
    """Returns the name of an annotation in messages, with its file."""
    return f"{uri}: annotation {id_of(annotation)}"


def id_of(annotation: Any) -> str:
    """Returns the id of an annotation as text; its beginning if it is no object."""
    return str(annotation.get("id")) if isinstance(annotation, dict) else repr(annotation)[:120]


def read_objects(
    annotations: Sequence[dict],
    names: Mapping[int, str],
    size: Size | None,
    uri: str,
    masks: bool,
    remarks: Remarks,
) -> Objects:
    """Returns the objects of an image whose box has area; `remarks` collects clipped and dropped ones."""
    kept, corners, drawn = [], [], []
    for annotation in annotations:
        where, entry = name_of(annotation, uri), f"annotation {id_of(annotation)}"
        if field_of(annotation, "category_id", (int,), where) not in names:
            raise DataError(f"{where}: its category_id {annotation['category_id']} is not among the categories")
        box, segmentation = annotation.get("bbox"), annotation.get("segmentation")
        has_box = box is not None and box != []
        around = mask = None
        if segmentation and (masks or not has_box):
            if masks and size is None:
                raise DataError(f"{where}: has a segmentation, but its image has no height and width")
            around, mask, _ = read_segmentation(segmentation, size, where, remarks, entry)
        if has_box:
            around = read_xywh(box, where)
        else:
            remarks.add(NO_BOX if around is None else BOX_OF_SEGMENTATION, entry)
        if around is not None:
            kept.append(annotation)
            corners.append(around)
            drawn.append(mask if masks else None)
    boxes, has_area, is_outside = fit_boxes(np.array(corners, np.float64).reshape(-1, 4), size)
    remarks.add_boxes([f"annotation {id_of(a)}" for a in kept], boxes, has_area, is_outside)
    indices = np.flatnonzero(has_area).tolist()
    kept = [kept[i] for i in indices]
    return Objects(
        names=[names[a["category_id"]] for a in kept],
        boxes=boxes[has_area],
        difficult=[False] * len(kept),
        crowd=[is_crowd(a, uri) for a in kept],
        masks=[drawn[i] for i in indices],
        areas=_areas(kept, uri),
    )


def _areas(annotations: Sequence[dict], uri: str) -> list[float] | None:
    """Returns the areas in the dataset; None if an annotation has none."""
    areas = []
    for annotation in annotations:
        value = annotation.get("area")
        area = None if value is None else as_number(value)
        if value is not None and (area is None or area < 0):
            raise DataError(f"{name_of(annotation, uri)}: its area must be a number from 0, got {excerpt(value)}")
        areas.append(area)
    return None if None in areas else areas  # type: ignore[return-value]


def is_crowd(annotation: dict, uri: str) -> bool:
    """Whether an annotation is of a crowd; raises DataError if its iscrowd is not 0 or 1."""
    value = annotation.get("iscrowd")
    if value in (None, 0, "0"):
        return False
    if value in (1, "1"):
        return True
    raise DataError(f"{name_of(annotation, uri)}: its iscrowd must be 0 or 1, got {excerpt(value)}")
