"""Writes Label Studio's tasks.json, one task per image with its boxes as predictions, and a matching label_config.xml.

Coordinates are in percent of the image. A mask becomes one polygon per connected part, as children of the region of its
box (`parentID`); holes are filled. Polygons are simplified, because people correct them by hand.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from weaksam.core import storage
from weaksam.data.writers.common import ExportImage, ReadBack
from weaksam.data.writers.format import ExportFormat, ExportRequest
from weaksam.data.writers.json_arrays import append_json, elements, expect_end, to_numbers
from weaksam.data.writers.polygons import draw_polygons, to_polygons


def label_config(class_names: Sequence[str], *, masks: bool) -> bytes:
    """Returns the labelling interface, to be pasted into a project's settings."""
    view = ET.Element("View")
    ET.SubElement(view, "Image", name="image", value="$image", zoom="true")
    kinds = [("RectangleLabels", "box"), *([("PolygonLabels", "mask")] if masks else [])]
    for tag, name in kinds:
        labels = ET.SubElement(view, tag, name=name, toName="image")
        for class_name in class_names:
            ET.SubElement(labels, "Label", value=class_name)
    ET.indent(view)
    return ET.tostring(view, encoding="utf-8") + b"\n"


class LabelStudioTasks:
    """Writes tasks.json and label_config.xml.

    Args:
        to: URI of the folder.
        class_names: by 0-based class.
        tolerance: tolerance of polygons, in pixels.
        model_version: the `model_version` of the predictions.
        image_prefix: prefix of an image's file name in its URL; None: tasks contain the URI.
    """

    targets = ("tasks.json", "label_config.xml")
    box_tolerance = 0.01
    verified = "boxes, classes and scores from the decoded tasks; polygons drawn by pycocotools"

    def __init__(
        self, to: str, class_names: Sequence[str], *, tolerance: float, model_version: str, image_prefix: str | None
    ) -> None:
        self.to, self.class_names, self.tolerance = to, list(class_names), tolerance
        self.model_version, self.image_prefix = model_version, image_prefix
        self.files = 0
        self.lost: Counter[str] = Counter()
        self._tasks = io.BytesIO()
        self._has_masks = False
        self._rest: Iterator[Any] | None = None

    def write(self, images: Sequence[ExportImage]) -> None:
        """Adds the images to the file in memory."""
        for image in images:
            self._has_masks |= image.has_masks
            append_json(self._tasks, self.task(image))

    def task(self, image: ExportImage) -> dict[str, Any]:
        """Returns the task of an image with its predictions."""
        regions = [region for position in range(len(image.boxes)) for region in self._regions(image, position)]
        best = max(to_numbers(image.scores), default=0.0)
        return {
            "data": self._data(image),
            "predictions": [{"model_version": self.model_version, "score": best, "result": regions}],
        }

    def _data(self, image: ExportImage) -> dict[str, Any]:
        """Returns the data of a task; `image_id` identifies the image of a review (`readers.label_studio`)."""
        data = {"image": self._url(image), "image_id": image.image_id, "split": image.place.split}
        return data if image.uncertainty is None else data | {"uncertainty": round(image.uncertainty, 6)}

    def _url(self, image: ExportImage) -> str:
        return image.place.uri if self.image_prefix is None else self.image_prefix + quote(image.place.file_name)

    def _regions(self, image: ExportImage, position: int) -> Iterator[dict[str, Any]]:
        """Yields the regions of a box and of the parts of its mask."""
        name = self.class_names[image.classes[position]]
        scale = 100 / np.array([image.width, image.height])
        fixed = {"to_name": "image", "original_width": image.width, "original_height": image.height}
        fixed |= {"image_rotation": 0, "score": to_numbers(image.scores[position : position + 1])[0]}
        corners = image.boxes[position].astype(np.float64).reshape(2, 2) * scale
        x, y, width, height = np.round([*corners[0], *(corners[1] - corners[0])], 6).tolist()
        value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": [name]}
        box = {"id": f"box{position}", "from_name": "box", "type": "rectanglelabels", "value": value}
        yield box | fixed
        if (mask := image.masks[position]) is None:
            return
        parts, holes = to_polygons(image, mask, self.tolerance)
        self.lost["holes_filled"] += holes
        for number, part in enumerate(parts):
            value = {"points": np.round(part * scale, 6).tolist(), "closed": True, "polygonlabels": [name]}
            region = {"id": f"mask{position}.{number}", "parentID": box["id"], "from_name": "mask"}
            yield region | {"type": "polygonlabels", "value": value} | fixed

    def finish(self) -> None:
        """Writes both files."""
        content, self._tasks = self._tasks.getvalue(), io.BytesIO()
        storage.write_bytes(storage.join(self.to, "tasks.json"), b"[" + content + b"]\n")
        config = label_config(self.class_names, masks=self._has_masks)
        storage.write_bytes(storage.join(self.to, "label_config.xml"), config)
        self.files = 2

    def read(self, images: Sequence[ExportImage]) -> Iterable[ReadBack]:
        """Reads the next tasks of the file."""
        if self._rest is None:
            self._rest = elements(storage.read_bytes(storage.join(self.to, "tasks.json")).decode())
        for image in images:
            task = next(self._rest, None)
            if task is None or task["data"] != self._data(image):
                raise ValueError(f"image {image.image_id} is not in its place in {self.to}/tasks.json")
            [prediction] = task["predictions"]
            yield self._read_image(image, prediction["result"])

    def _read_image(self, image: ExportImage, regions: Sequence[dict[str, Any]]) -> ReadBack:
        scale = np.array([image.width, image.height]) / 100
        rectangles = [region for region in regions if region["type"] == "rectanglelabels"]
        polygons: dict[str, list[np.ndarray]] = {}
        for region in regions:
            if region["type"] == "polygonlabels":
                polygons.setdefault(region["parentID"], []).append(np.array(region["value"]["points"]) * scale)
        corners = [[region["value"][key] for key in ("x", "y", "width", "height")] for region in rectangles]
        boxes = np.array(corners).reshape(-1, 4) * np.tile(scale, 2)
        boxes[:, 2:] += boxes[:, :2]
        drawn = [polygons.get(region["id"]) for region in rectangles]
        return ReadBack(
            boxes,
            [self.class_names.index(region["value"]["rectanglelabels"][0]) for region in rectangles],
            np.array([region["score"] for region in rectangles]),
            [None if parts is None else draw_polygons(image, parts) for parts in drawn],
        )

    def expected_masks(self, image: ExportImage) -> list[bytes | None]:
        """Returns the masks of their polygons."""
        return [mask and draw_polygons(image, to_polygons(image, mask, self.tolerance)[0]) for mask in image.masks]

    def check_rest(self) -> None:
        """Raises ValueError if there are more tasks, or other labels."""
        expect_end(self._rest if self._rest is not None else iter(()), f"{self.to}/tasks.json")
        config = ET.fromstring(storage.read_bytes(storage.join(self.to, "label_config.xml")))
        for control in config:
            if control.tag != "Image" and [label.get("value") for label in control] != self.class_names:
                raise ValueError(f"{self.to}/label_config.xml has other labels than were written")


def _make(request: ExportRequest) -> LabelStudioTasks:
    tolerance = request.options.polygon_tolerance
    return LabelStudioTasks(
        request.to,
        request.class_names,
        tolerance=1.0 if tolerance is None else tolerance,
        model_version=request.model_version,
        image_prefix=request.options.image_prefix,
    )


FORMAT = ExportFormat(
    "label_studio",
    "tasks with predictions, for people to correct",
    _make,
    settings=("polygon_tolerance", "image_prefix", "most_uncertain"),
)
