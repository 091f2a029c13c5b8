"""Converts annotations of stored pictures, before EXIF orientation, to the upright pictures that are decoded.

Files store photographs in the orientation of the sensor; the EXIF orientation is the rotation to upright. Some tools
show and annotate stored pictures; sizes, boxes and masks of the dataset then refer to them.
Axis legend: N boxes of an image, H W pixels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from pycocotools import mask as coco_mask

from weaksam.core import schemas
from weaksam.data.datasets import Dataset, warn_of
from weaksam.data.images import read_stored_sizes, turn_upright


def turn_boxes(boxes: np.ndarray, size: tuple[int, int], orientation: int) -> np.ndarray:
    """Converts boxes of a stored picture to the upright picture.

    Args:
        boxes: (N, 4) xyxy, right and bottom exclusive.
        size: (height, width) of the stored picture.
        orientation: value of the EXIF tag, 1 to 8.
    """
    height, width = size
    left, top, right, bottom = boxes.T
    if orientation >= 5:
        left, top, right, bottom = top, left, bottom, right
        height, width = width, height
    if orientation in (3, 4, 7, 8):
        top, bottom = height - bottom, height - top
    if orientation in (2, 3, 6, 7):
        left, right = width - right, width - left
    return np.stack([left, top, right, bottom], axis=1)


def turn_mask(counts: bytes, size: tuple[int, int], orientation: int) -> bytes:
    """Converts COCO compressed counts of a stored picture to the upright picture; arguments as in `turn_boxes`."""
    mask = coco_mask.decode({"size": list(size), "counts": counts})  # type: ignore[arg-type]  (bytes are taken)
    return coco_mask.encode(np.asfortranarray(turn_upright(mask, orientation)))["counts"]  # type: ignore[return-value]


def turn_dataset(dataset: Dataset, where: str) -> Dataset:
    """Converts a dataset annotated on stored pictures to upright pictures; reads every image's header.

    Annotations are unchanged, with a warning, if the dataset states the size of the upright picture and not that of the
    stored picture, or if the image cannot be read. `where` is the prefix of the warnings.

    Raises:
        StorageError: the storage, not a single image, is at fault.
    """
    images = dataset.images.to_pylist()
    truths = {} if dataset.ground_truth is None else {row["image_id"]: row for row in dataset.ground_truth.to_pylist()}
    upright, unreadable = [], []
    for row, header in zip(images, read_stored_sizes([row["uri"] for row in images]), strict=True):
        if header is None:
            unreadable.append(row["image_id"])
            continue
        *stored, orientation = header
        stated = [row["height"], row["width"]]
        if None in stated:
            stated = stored
        if orientation >= 5 and stated != stored and stated == stored[::-1]:
            upright.append(row["image_id"])
        elif orientation > 1:
            _turn(row, truths.get(row["image_id"]), (stated[0], stated[1]), orientation)
    warn_of(where, "images state the size of the upright picture: their annotations are left as they are", upright)
    warn_of(where, "images cannot be read: their annotations are left as they are", unreadable)
    truth = schemas.to_table(list(truths.values()), schemas.GROUND_TRUTH) if truths else None
    return replace(dataset, images=schemas.to_table(images, schemas.IMAGES), ground_truth=truth)


def _turn(image: dict, truth: dict | None, size: tuple[int, int], orientation: int) -> None:
    """Rotates a row of images and its row of ground truth, in place."""
    if image["height"] is not None and image["width"] is not None and orientation >= 5:
        image["height"], image["width"] = size[::-1]
    if truth is not None:
        boxes = np.array(truth["boxes"], np.float32).reshape(-1, 4)
        truth["boxes"] = turn_boxes(boxes, size, orientation).tolist()
        truth["masks"] = [mask and turn_mask(mask, size, orientation) for mask in truth["masks"]]
