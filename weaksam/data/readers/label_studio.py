"""Reads boxes and masks from Label Studio's full JSON export of a project: exported tasks that people reviewed.

A task identifies its image by `image_id`, written by `export_label_studio`. Coordinates are in percent of the image. A
rectangle may be rotated clockwise around its corner (x, y); its upright bounding box is used.
Axis legend: N boxes of an image.
Boxes are xyxy, absolute pixels, float32, right and bottom exclusive. Masks are COCO compressed counts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from weaksam.core import storage
from weaksam.data.annotation_checks import Size, check_polygon, excerpt, fill_polygons, fit_boxes, read_size
from weaksam.data.remarks import EMPTY_MASK, FEW_CORNERS, Remarks
from weaksam.errors import DataError
from weaksam.ops.rle import rle_area

_SAME_SHAPE = 0.02  # tolerance for the rounded sides of a reduced copy; a rotated image differs by more
_BOX, _POLYGON = "rectanglelabels", "polygonlabels"
# Types of results without a shape of their own; those about a region repeat its shape. All other types have a shape.
_SAID = ("choices", "taxonomy", "textarea", "number", "rating", "datetime", "relation", "pairwise", "ranker")

_OTHER_IMAGE = "tasks are of images that are not in the dataset and are left out"
_NO_PLACE = "regions have no place (choices, texts) and are left out"
_UNDER_NO_BOX = "polygons are under no box and are left out"


@dataclass(frozen=True)
class Review:
    """The N objects that people annotated in an image; N may be 0.

    Attributes:
        boxes: (N, 4) float32.
        classes: (N,) int32.
        masks: N; None: no polygon belongs to the box.
        size: size of the image; None: unknown, only possible without objects.
    """

    boxes: np.ndarray
    classes: np.ndarray
    masks: list[bytes | None]
    size: Size | None


def read_reviews(
    uri: str, sizes: Mapping[str, Size | None], class_names: Sequence[str], *, is_sample: bool = False
) -> dict[str, Review]:
    """Reads the reviewed images by id, without tasks that were skipped or not annotated.

    If a task has several annotations, those marked as ground truth take precedence, then the most recent one; if an
    image has several tasks, the most recent annotation. Tasks of images that are not in the dataset, regions without a
    shape (choices, texts) and polygons without a box are skipped and counted in the log.

    Args:
        uri: URI of the file.
        sizes: size of every image of the dataset; None: unknown, the size in the export is used.
        class_names: class names of the dataset.
        is_sample: whether `sizes` is only a sample of the images, of which none may be reviewed.

    Raises:
        DataError: a task is invalid; names the file, the task and the fault.
    """
    newest: dict[str, tuple[datetime, dict[str, Any], dict[str, Any]]] = {}
    named = [(_image_id(uri, task), task) for task in _read_tasks(uri)]
    known = [(image_id, task) for image_id, task in named if image_id in sizes]
    if named and not known and not is_sample:
        image_id, task = named[0]
        raise DataError(
            f"{uri}: task {task.get('id')} is of image {image_id!r}, which is not in the dataset, nor is that of any "
            "other task: give the review of this dataset"
        )
    for image_id, task in known:
        try:
            annotation = _choose(task["annotations"])
            when = _time(annotation) if annotation else None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{uri}: task {task.get('id')}: its annotations cannot be read ({error!r})") from error
        if annotation and when and (image_id not in newest or when >= newest[image_id][0]):
            newest[image_id] = when, task, annotation
    remarks = Remarks(uri)
    for image_id, task in named:
        if image_id not in sizes:
            remarks.add(_OTHER_IMAGE, f"task {task.get('id')} ({image_id})")
    reviews = {}
    for image_id, (_, task, annotation) in newest.items():
        name = f"task {task.get('id')}"
        try:
            reviews[image_id] = _review(annotation.get("result") or [], sizes[image_id], class_names, remarks, name)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            message = error if isinstance(error, _TaskError) else f"its regions cannot be read ({error!r})"
            raise DataError(f"{uri}: {name} (image {image_id}): {message}") from error
    remarks.log()
    return reviews


class _TaskError(ValueError):
    """A fault of a task, for the user."""


def _read_tasks(uri: str) -> list[dict[str, Any]]:
    again = "in Label Studio export the project as JSON, not JSON-MIN or another format"
    try:
        tasks = json.loads(storage.read_bytes(uri))
    except (ValueError, RecursionError, FileNotFoundError) as error:
        raise DataError(f"{uri}: cannot be read as a Label Studio export ({error}): {again}") from error
    if not isinstance(tasks, list):
        raise DataError(f"{uri}: a Label Studio export is a list of tasks, this holds {type(tasks).__name__}: {again}")
    for position, task in enumerate(tasks):
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict) or "annotations" not in task:
            raise DataError(f"{uri}: entry {position} is no task with data and annotations: {again}")
    return tasks


def _image_id(uri: str, task: dict[str, Any]) -> str:
    image_id = task["data"].get("image_id")
    if image_id is None:
        raise DataError(
            f"{uri}: task {task.get('id')} has no image_id in its data: import the tasks.json that `weaksam export` "
            "writes, so that it is known whose boxes these are"
        )
    return str(image_id)


def _choose(annotations: Sequence[dict[str, Any]] | None) -> dict[str, Any] | None:
    """Returns the annotation with precedence, see `read_reviews`; the last one if several are equal."""
    done = [annotation for annotation in annotations or () if not annotation.get("was_cancelled")]
    ranked = sorted(done, key=lambda annotation: (bool(annotation.get("ground_truth")), _time(annotation)))
    return ranked[-1] if ranked else None


def _time(annotation: dict[str, Any]) -> datetime:
    """Returns the time of the last update, or creation, of an annotation; the earliest time if it has neither."""
    timestamp = annotation.get("updated_at") or annotation.get("created_at")
    when = datetime.fromisoformat(timestamp) if timestamp else datetime.min
    return when if when.tzinfo else when.replace(tzinfo=UTC)


# --- regions


def _review(
    regions: Sequence[dict[str, Any]], size: Size | None, class_names: Sequence[str], remarks: Remarks, task: str
) -> Review:
    boxes, polygons = list(_of_type(regions, _BOX)), list(_of_type(regions, _POLYGON))
    for region in regions:
        if region["type"] in (_BOX, _POLYGON):
            size = _check_size(region, size, f"{remarks.where}: {_entry(task, region)}")
        elif region["type"] not in _SAID:
            raise _TaskError(
                f"region {region.get('id')} is of type {region['type']}: boxes (RectangleLabels) and polygons under "
                "them are read: label with the label_config.xml that was exported"
            )
        else:
            remarks.add(_NO_PLACE, _entry(task, region))
    if not boxes and polygons:
        raise _TaskError(
            f"there are {len(polygons)} polygons but no box: draw a box around each object, or remove them"
        )
    if not boxes or size is None:
        return Review(np.zeros((0, 4), np.float32), np.zeros(0, np.int32), [], size)
    classes = [_class_of(region, class_names) for region in boxes]
    cut, has_area, is_outside = fit_boxes(np.stack([_to_box(region, size) for region in boxes]), size)
    remarks.add_boxes([_entry(task, region) for region in boxes], cut, has_area, is_outside)
    known = Counter(region["id"] for region in boxes)
    under: dict[str | None, list[np.ndarray]] = {}
    for region in polygons:
        parent, points = region.get("parentID"), _to_points(region, size)
        check_polygon(points, size, f"{remarks.where}: {_entry(task, region)}")
        if known[parent] > 1:
            raise _TaskError(f"region {region.get('id')} is under {known[parent]} boxes, all with the id {parent}")
        if parent not in known or len(points) < 3:
            remarks.add(FEW_CORNERS if parent in known else _UNDER_NO_BOX, _entry(task, region))
            continue
        under.setdefault(parent, []).append(points)
    kept = np.flatnonzero(has_area)
    masks = [_fill(under.get(boxes[i]["id"]), size, remarks, _entry(task, boxes[i])) for i in kept.tolist()]
    return Review(cut[kept], np.array(classes, np.int32)[kept], masks, size)


def _entry(task: str, region: dict[str, Any]) -> str:
    return f"{task} region {region.get('id')}"


def _of_type(regions: Sequence[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    return (region for region in regions if region["type"] == kind)


def _check_size(region: dict[str, Any], size: Size | None, where: str) -> Size:
    """Returns the size of the image, checked against the size in the region."""
    if region.get("image_rotation"):
        raise _TaskError(f"region {region.get('id')} was drawn on a turned image: turn it back in Label Studio")
    stated = read_size(region.get("original_height"), region.get("original_width"), where)
    if size is None:
        if stated is None:
            raise _TaskError("nobody knows the size of its image: original_height and original_width are missing")
        return stated
    if stated is not None and abs(stated[0] * size[1] / (stated[1] * size[0]) - 1) > _SAME_SHAPE:
        raise _TaskError(
            f"region {region.get('id')} was drawn on an image of {stated[0]} x {stated[1]} pixels, in the dataset it "
            f"has {size[0]} x {size[1]}: let the URLs of the tasks lead to the images of the dataset"
        )
    return size


def _class_of(region: dict[str, Any], class_names: Sequence[str]) -> int:
    names = region["value"].get(_BOX) or []
    if len(names) != 1:
        raise _TaskError(f"box {region.get('id')} has {len(names)} labels: give it one")
    name = names[0].strip()
    if name not in class_names:
        raise _TaskError(f"box {region.get('id')} has label {name!r}: classes are {', '.join(class_names)}")
    return list(class_names).index(name)


def _to_box(region: dict[str, Any], size: Size) -> np.ndarray:
    """Returns the upright bounding box of a rectangle, (4,) float64 xyxy."""
    value, to_pixels = region["value"], np.array([size[1], size[0]]) / 100
    corner, sides = [value["x"], value["y"]], [value["width"], value["height"]]
    first, (width, height) = _numbers([corner, sides], region) * to_pixels
    turn = np.deg2rad(_numbers([[value.get("rotation") or 0, 0]], region)[0, 0])
    right = width * np.array([np.cos(turn), np.sin(turn)])
    down = height * np.array([-np.sin(turn), np.cos(turn)])
    corners = first + np.stack([np.zeros(2), right, down, right + down])
    return np.concatenate([corners.min(0), corners.max(0)])


def _numbers(pairs: Any, region: dict[str, Any]) -> np.ndarray:
    """Converts K pairs to (K, 2) float64; raises _TaskError if they are not pairs of numbers."""
    try:
        values = np.array(pairs, np.float64) if pairs != [] else np.zeros((0, 2))
    except (ValueError, TypeError):  # texts, lists of different lengths
        values = np.array(np.nan)
    if values.ndim != 2 or values.shape[1] != 2 or not np.isfinite(values).all():
        raise _TaskError(f"region {region.get('id')}: {excerpt(pairs)} are no pairs of x and y in percent")
    return values


def _to_points(region: dict[str, Any], size: Size) -> np.ndarray:
    """Returns the corners of a polygon in pixels, (K, 2) float64."""
    return _numbers(region["value"]["points"], region) * np.array([size[1], size[0]]) / 100


def _fill(parts: Sequence[np.ndarray] | None, size: Size, remarks: Remarks, entry: str) -> bytes | None:
    """Returns the mask of polygons; None without polygons, or if the mask is empty."""
    if parts is None:
        return None
    if rle_area(mask := fill_polygons(parts, size)):
        return mask
    remarks.add(EMPTY_MASK, entry)
    return None
