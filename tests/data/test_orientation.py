"""Annotations of stored pictures are turned as their pixels are, and sizes that disagree are noticed."""

from __future__ import annotations

import dataclasses
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from weaksam.data.datasets import Dataset, ImageRecord, Objects, make_dataset
from weaksam.data.images import decode_image, stored_size, turn_upright
from weaksam.data.orientation import turn_boxes, turn_dataset, turn_mask
from weaksam.data.stated_sizes import differing_sizes, warn_of_sizes


def picture(orientation: int, form: str = "JPEG") -> bytes:
    """Stored with 30 rows and 40 columns."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), "gray").save(stream, form, exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_and_masks_turn_as_pixels_do(orientation: int) -> None:
    pixels = np.zeros((30, 40), np.uint8)
    pixels[4:9, 10:30] = 1
    turned = turn_upright(pixels, orientation)
    rows, columns = np.flatnonzero(turned.any(1)), np.flatnonzero(turned.any(0))
    expected = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert turn_boxes(np.array([[10, 4, 30, 9]]), (30, 40), orientation).tolist() == [expected]
    counts: Any = coco_mask.encode(np.asfortranarray(pixels))["counts"]
    found = coco_mask.decode({"size": list(turned.shape), "counts": turn_mask(counts, (30, 40), orientation)})
    np.testing.assert_array_equal(found, turned)
    assert turn_boxes(np.zeros((0, 4)), (30, 40), orientation).shape == (0, 4)
    for form in ("JPEG", "PNG", "WEBP", "TIFF"):
        data = picture(orientation, form)
        height, width, read = stored_size(data)
        assert (height, width, read) == (30, 40, orientation)
        assert turn_upright(np.zeros((height, width)), read).shape == decode_image(data).shape[:2]


def dataset(folder: Path, sizes: dict[str, tuple[int, int] | None]) -> Dataset:
    """An image of each name with a box and its mask; the name begins with the orientation."""
    images = []
    for name, size in sizes.items():
        (folder / name).write_bytes(picture(int(name[0])) if name[0].isdigit() else b"no picture")
        mask = np.zeros((*(size or (30, 40)),), np.uint8, order="F")
        mask[4:9, 10:25] = 1
        box = np.array([[10, 4, 25, 9]], np.float32)
        counts: Any = coco_mask.encode(mask)["counts"] if size else None
        objects = Objects(["cat"], box, [False], [False], [counts])
        images.append(
            ImageRecord(name, str(folder / name), "train", 1, ["cat"], name, *(size or (None, None)), objects)
        )
    return make_dataset(images, ["cat"])


def test_a_dataset_of_stored_pictures_becomes_one_of_upright_pictures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"1.jpg": (30, 40), "3.jpg": (30, 40), "6.jpg": (30, 40), "8.jpg": None, "6up.jpg": (40, 30), "x": (30, 40)}
    turned = turn_dataset(dataclasses.replace(dataset(tmp_path, sizes), category_ids=[7]), "d")
    assert turned.category_ids == [7]
    rows = {row["image_id"]: row for row in turned.images.to_pylist()}
    assert turned.ground_truth is not None
    boxes = {row["image_id"]: row["boxes"][0] for row in turned.ground_truth.to_pylist()}
    assert boxes["1.jpg"] == boxes["6up.jpg"] == boxes["x"] == [10, 4, 25, 9]
    assert boxes["3.jpg"] == [15, 21, 30, 26]
    assert boxes["6.jpg"] == [21, 10, 26, 25]
    assert boxes["8.jpg"] == [4, 15, 9, 30]
    heights = {name: (row["height"], row["width"]) for name, row in rows.items()}
    assert heights["6.jpg"] == heights["6up.jpg"] == (40, 30)
    assert heights["8.jpg"] == (None, None)
    [mask] = next(row["masks"] for row in turned.ground_truth.to_pylist() if row["image_id"] == "6.jpg")
    assert coco_mask.toBbox({"size": [40, 30], "counts": mask}).tolist() == [21, 10, 5, 15]
    assert "d: 1 images state the size of the upright picture: their annotations are left as they are: 6up.jpg" in (
        caplog.text
    )
    assert "d: 1 images cannot be read" in caplog.text


def test_sizes_that_the_dataset_states_wrongly_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    found = [
        ("same", (30, 40), (30, 40)),
        ("turned", (30, 40), (40, 30)),
        ("other", (30, 40), (60, 80)),
        ("unknown", (None, None), (60, 80)),
        ("failed", (30, 40), (None, None)),
    ]
    assert differing_sizes(found) == (["turned"], ["other (stated 30 x 40, is 60 x 80)"])
    with caplog.at_level(logging.WARNING):
        warn_of_sizes("s", found)
        warn_of_sizes("s", found[:1])
    first, second = [record.getMessage() for record in caplog.records]
    assert first.startswith("s: 1 images lie turned by a quarter")
    assert "orientation: stored" in first
    assert second == (
        "s: 1 images (height x width) have another size than the dataset states: are its boxes of other pictures?: "
        "other (stated 30 x 40, is 60 x 80)"
    )
