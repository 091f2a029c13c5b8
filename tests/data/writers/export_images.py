"""Images to export, and their way into files and back."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as coco_mask
from scipy import ndimage

from weaksam.data.writers.common import ExportImage, ExportTotals, compare
from weaksam.data.writers.places import Place

NAMES = ["red kite", "blue & <tit>", "grün"]


def encode(mask: np.ndarray) -> bytes:
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"]


def blob(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A mask with bays, holes and loose parts, never empty."""
    noise = ndimage.gaussian_filter(rng.normal(size=(height, width)), rng.uniform(0.5, 4))
    mask = noise > np.quantile(noise, rng.uniform(0.3, 0.9))
    mask[rng.integers(height), rng.integers(width)] = True
    return mask


def make_image(
    image_id: str, rng: np.random.Generator, *, num: int = 3, split: str = "train", masks: bool = True, **place: object
) -> ExportImage:
    height, width = (int(side) for side in rng.integers(20, 70, 2))
    corners = np.sort(rng.uniform(0, 1, (num, 2, 2)), axis=1) * [width, height]
    boxes = np.concatenate([corners[:, 0], np.minimum(corners[:, 1] + 0.01, [width, height])], axis=1)
    scores = -np.sort(-rng.uniform(1e-9, 1, num))
    fixed = {
        "number": 7,
        "own_id": image_id,
        "split": split,
        "split_name": split,
        "uri": f"s3://b/i/{image_id}.jpg",
        "file_name": f"{image_id}.jpg",
    }
    where = Place(**fixed | {"name": image_id, "height": None, "width": None} | place)  # type: ignore[arg-type]
    found = [encode(blob(rng, height, width)) if masks and i != 1 else None for i in range(num)]
    classes = rng.integers(0, len(NAMES), num)
    return ExportImage(image_id, where, height, width, boxes.astype("f4"), classes, scores.astype("f4"), found)


def round_trip(exporter: object, images: list[ExportImage]) -> ExportTotals:
    """Writes, reads back in two pieces, compares."""
    tally = ExportTotals()
    exporter.write(images[:2])  # type: ignore[attr-defined]
    exporter.write(images[2:])  # type: ignore[attr-defined]
    exporter.finish()  # type: ignore[attr-defined]
    for piece in (images[:3], images[3:]):
        for image, found in zip(piece, exporter.read(piece), strict=True):  # type: ignore[attr-defined]
            compare(image, found, exporter, tally)  # type: ignore[arg-type]
    exporter.check_rest()  # type: ignore[attr-defined]
    assert tally.images == len(images)
    assert tally.boxes == sum(len(image.boxes) for image in images)
    return tally
