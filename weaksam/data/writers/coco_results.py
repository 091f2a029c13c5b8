"""Writes COCO results json: one list of detections.

Categories have the dataset's own ids, or those of `default_category_ids`. The file is built in memory as text; it is
read back a few images at a time.
"""

from __future__ import annotations

import io
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weaksam.core import storage
from weaksam.data.categories import default_category_ids
from weaksam.data.readers.coco_results import read_results
from weaksam.data.writers.common import ExportImage, ReadBack
from weaksam.data.writers.format import ExportFormat, ExportRequest
from weaksam.data.writers.json_arrays import append_json, elements, expect_end, to_numbers, to_xywh


class CocoResults:
    """Writes results.json, a list of detections.

    Args:
        to: URI of the folder.
        class_names: by 0-based class.
        number_images: whether images have the numbers of `CocoDataset`; else their own ids.
        category_ids: the dataset's own ids, by class; None: `default_category_ids`.
    """

    targets = ("results.json",)
    box_tolerance = 0.01
    verified = "boxes, classes, scores and masks, read by weaksam.data.readers.coco_results"

    def __init__(
        self, to: str, class_names: Sequence[str], *, number_images: bool, category_ids: Sequence[int] | None
    ) -> None:
        self.uri, self.class_names, self.number_images = storage.join(to, "results.json"), class_names, number_images
        self.lost: Counter[str] = Counter()
        self.files = 0
        self._categories = list(category_ids or default_category_ids(class_names))
        self._entries = io.BytesIO()
        self._rest: Iterator[Any] | None = None

    def _id(self, image: ExportImage) -> int | str:
        return image.place.number if self.number_images else image.place.own_id

    def write(self, images: Sequence[ExportImage]) -> None:
        """Adds the images to the file in memory."""
        for image in images:
            self.lost["images_without_boxes"] += not len(image.boxes)
            columns = (to_xywh(image.boxes), image.classes.tolist(), to_numbers(image.scores), image.masks)
            for box, label, score, mask in zip(*columns, strict=True):
                entry = {"image_id": self._id(image), "category_id": self._categories[label]}
                entry |= {"bbox": box, "score": score}
                if mask is not None:
                    entry["segmentation"] = {"size": [image.height, image.width], "counts": mask.decode()}
                append_json(self._entries, entry)

    def finish(self) -> None:
        """Writes the file."""
        content, self._entries = self._entries.getvalue(), io.BytesIO()
        storage.write_bytes(self.uri, b"[" + content + b"]\n")
        self.files = 1

    def read(self, images: Sequence[ExportImage]) -> Iterable[ReadBack]:
        """Reads the next entries of the file, written to a temporary file, with `read_results`."""
        if self._rest is None:
            self._rest = elements(storage.read_bytes(self.uri).decode())
        entries = list(itertools.islice(self._rest, sum(len(image.boxes) for image in images)))
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "results.json")
            path.write_text(json.dumps(entries))
            ids = [str(self._id(image)) for image in images]
            rows = read_results(str(path), ids, self.class_names, category_ids=self._categories)
        for row in rows.to_pylist():
            boxes = np.array(row["boxes"], np.float64).reshape(-1, 4)
            masks: list[bytes | None] = row["masks"] or [None] * len(boxes)
            yield ReadBack(boxes, row["classes"], np.array(row["scores"]), masks)

    def expected_masks(self, image: ExportImage) -> list[bytes | None]:
        """Returns the masks."""
        return image.masks

    def check_rest(self) -> None:
        """Raises ValueError if the file has more entries."""
        expect_end(self._rest if self._rest is not None else iter(()), self.uri)


def _make(request: ExportRequest) -> CocoResults:
    return CocoResults(
        request.to,
        request.class_names,
        number_images=request.options.number_images,
        category_ids=request.category_ids,
    )


FORMAT = ExportFormat("coco_results", "a list of detections", _make, settings=("number_images",), needs_sizes=False)
