"""A COCO results json, detections made by whatever program, as rows of the detections table.

Boxes xywh become xyxy. An image that has no result is one in which nothing was found. Images are known by their id,
written as the dataset's own; categories by COCO's 80-of-90 ids when there are 80 classes, else by 1-based position.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
from pycocotools import mask as coco_mask

from weaksam import schemas, storage
from weaksam.errors import DataError

_SKIPPED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # of COCO's ids 1..90, the ten that no category has
COCO_IDS = tuple(k for k in range(1, 91) if k not in _SKIPPED)


def read_results(
    uri: str, image_ids: list[str], class_names: list[str], *, default_score: float | None = None
) -> pa.Table:
    """The detections of `image_ids`, best first, in the form of `schemas.DETECTIONS`.

    Args:
        uri: of the file.
        image_ids: of the images that get a row.
        class_names: of the dataset.
        default_score: of an entry that has none; None: each must have one.

    Raises:
        DataError: names the file and the entry that is at fault.
    """
    try:
        entries = json.loads(storage.read_bytes(uri))
    except (ValueError, FileNotFoundError) as error:
        raise DataError(f"{uri}: cannot be read as a COCO results json: {error}") from error
    if not isinstance(entries, list):
        raise DataError(f"{uri}: a COCO results json is a list, this holds {type(entries).__name__}")
    ids = COCO_IDS if len(class_names) == len(COCO_IDS) else range(1, len(class_names) + 1)
    classes = {category: label for label, category in enumerate(ids)}
    found: dict[str, list[dict[str, Any]]] = {image_id: [] for image_id in image_ids}
    for position, entry in enumerate(entries):
        try:
            row = _parse(entry, classes, default_score)
            image_id = str(entry["image_id"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{uri}: entry {position} is no detection ({error!r}): {str(entry)[:120]}: it must have image_id, "
                f"{'' if default_score is not None else 'score, '}bbox or an RLE segmentation, and a category_id from "
                f"{min(ids)} to {max(ids)}"
            ) from error
        if image_id in found:
            found[image_id].append(row)
    if entries and not any(found.values()):
        there, here = entries[0]["image_id"], image_ids[0]
        raise DataError(
            f"{uri}: none of its {len(entries)} entries is of an image to be judged (image_id {there!r} there, "
            f"{here!r} here): give the results of this dataset and split"
        )
    return schemas.to_table([_row(image_id, rows) for image_id, rows in found.items()], schemas.DETECTIONS)


def _parse(entry: dict[str, Any], classes: dict[int, int], default_score: float | None) -> dict[str, Any]:
    mask: Any = entry.get("segmentation")
    counts = mask["counts"] if mask else None
    box = entry["bbox"] if "bbox" in entry else coco_mask.toBbox(mask).tolist()
    left, top, width, height = map(float, box)
    return {
        "box": [left, top, left + width, top + height],
        "class": classes[entry["category_id"]],
        "score": float(entry["score"] if default_score is None else entry.get("score", default_score)),
        "mask": counts.encode() if isinstance(counts, str) else counts,
        "size": mask["size"] if mask else [None, None],
    }


def _row(image_id: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    found = sorted(found, key=lambda row: -row["score"])
    height, width = found[0]["size"] if found else (None, None)
    row = {"image_id": image_id, "status": schemas.OK, "message": "", "height": height, "width": width}
    row |= {"boxes": [one["box"] for one in found], "classes": [one["class"] for one in found]}
    masks = [one["mask"] for one in found]
    return row | {"scores": [one["score"] for one in found], "masks": masks if any(masks) else None}
