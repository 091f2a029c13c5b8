"""Maps fetched images to rows: the base class of the mappers of the stages, and the loop around it.

A batch is a table of the source's columns and `data` (the bytes of the file, or null), `status` and `message`. The
result has the step's schema and a row for each image. While the row of an image is made, the next image is decoded in a
thread and prepared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from weaksam.core import schemas
from weaksam.data.images import decode_image
from weaksam.errors import ImageError

Row = dict[str, Any]


class ImageMapper(ABC):
    """Makes the row of an image; a stage subclasses it, and each actor of its pool holds an instance.

    `image` is (H, W, 3) uint8 RGB. `row` has the columns of the source and `data`, the bytes of the image's file. Both
    methods may raise ImageError: the image then gets a row with that status and message.
    """

    def prepare(self, image: np.ndarray, row: Row) -> Any:
        """Does work before the previous image is finished, so that a GPU does not wait for the CPU."""
        return None

    @abstractmethod
    def make(self, image: np.ndarray, row: Row, prepared: Any) -> Row:
        """Returns the columns of the image's row other than id, status, message and size; missing columns become null.

        Args:
            image: the image.
            row: its columns.
            prepared: the result of `prepare` for it.
        """


def map_batch(mapper: ImageMapper, batch: pa.Table, *, schema: pa.Schema, max_pixels: int) -> pa.Table:
    """Returns a row of `schema` for each fetched image of `batch`, in order.

    Args:
        mapper: makes the rows.
        batch: (image_id, data, status, message, ...).
        schema: schema of the rows, with metadata.
        max_pixels: images of more pixels are refused with status `too_large`.
    """
    ready = _prepare_ahead(mapper, _decode_ahead(batch, max_pixels))
    return schemas.to_table([_make_row(mapper, *image) for image in ready], schema)


def failed_row(image_id: str, status: str, message: str) -> Row:
    """Returns the row of an image that could not be used; its other columns become null."""
    return {"image_id": image_id, "status": status, "message": message[:500]}


def _make_row(mapper: ImageMapper, row: Row, image: np.ndarray | ImageError, prepared: Any) -> Row:
    try:
        if isinstance(image, ImageError):
            raise image
        made = mapper.make(image, row, prepared)
    except ImageError as error:
        return failed_row(row["image_id"], error.status, error.message)
    height, width = image.shape[:2]
    return made | {
        "image_id": row["image_id"],
        "status": schemas.OK,
        "message": "",
        "height": height,
        "width": width,
    }


def _prepare_ahead(
    mapper: ImageMapper, decoded: Iterator[tuple[Row, np.ndarray | ImageError]]
) -> Iterator[tuple[Row, np.ndarray | ImageError, Any]]:
    """Yields rows with their image and the result of `prepare`, each after the next image is prepared."""
    last = None
    for row, image in decoded:
        ready = row, image, None
        if not isinstance(image, ImageError):
            try:
                ready = row, image, mapper.prepare(image, row)
            except ImageError as error:
                ready = row, error, None
        if last is not None:
            yield last
        last = ready
    if last is not None:
        yield last


def _decode_ahead(batch: pa.Table, max_pixels: int) -> Iterator[tuple[Row, np.ndarray | ImageError]]:
    """Yields rows with their image; a thread decodes the next image while the caller works on this one."""

    def decode(index: int) -> tuple[Row, np.ndarray | ImageError]:
        (row,) = batch.slice(index, 1).to_pylist()
        status, message = row.pop("status"), row.pop("message")
        if status != schemas.OK:
            return row, ImageError(status, message)
        try:
            return row, decode_image(row["data"], max_pixels=max_pixels)
        except ImageError as error:
            return row, error

    if not batch.num_rows:
        return
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(decode, 0)
        for index in range(batch.num_rows):
            decoded = ahead.result()
            if index + 1 < batch.num_rows:
                ahead = pool.submit(decode, index + 1)
            yield decoded
