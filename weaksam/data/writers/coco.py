"""Writes COCO dataset json.

One instances_<split>.json per split, in COCO's format: every annotation has area and iscrowd, ids start at 1 (id 0
means "unmatched" to pycocotools), masks are compressed RLE or polygons. Categories have the dataset's own ids, or those
of `default_category_ids`, like in `coco_results`.
A file is built in memory as text, about 150 bytes per box; it is read back a few images at a time.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from weaksam.core import storage
from weaksam.data.categories import default_category_ids
from weaksam.data.writers.common import ExportImage, ReadBack
from weaksam.data.writers.format import ExportFormat, ExportOptions, ExportRequest
from weaksam.data.writers.json_arrays import append_json, elements, expect_end, to_numbers, to_xywh
from weaksam.data.writers.polygons import draw_polygons, to_polygons


class CocoDataset:
    """Writes annotations/instances_<split>.json.

    Args:
        to: URI of the folder.
        class_names: by 0-based class.
        polygons: tolerance in pixels of masks as polygons; None: masks as RLE.
        image_root: URI of the folder that file names are relative to.
        category_ids: the dataset's own ids, by class; None: `default_category_ids`.
    """

    targets = ("annotations",)
    box_tolerance = 0.01
    verified = "boxes, classes, scores and masks, read by pycocotools' COCO"

    def __init__(
        self,
        to: str,
        class_names: Sequence[str],
        *,
        polygons: float | None,
        image_root: str,
        category_ids: Sequence[int] | None,
    ) -> None:
        self.to, self.class_names, self.polygons, self.image_root = to, list(class_names), polygons, image_root
        ids = category_ids or default_category_ids(class_names)
        self.categories = [{"id": number, "name": name} for number, name in zip(ids, class_names, strict=True)]
        self.lost: Counter[str] = Counter()
        self.files = 0
        self._arrays: dict[str, tuple[io.BytesIO, io.BytesIO]] = {}
        self._counts: Counter[str] = Counter()
        self._rest: dict[str, tuple[Iterator[Any], Iterator[Any]]] = {}

    def uri(self, split: str) -> str:
        """Returns the URI of the file of a split; `split` is its name in the export."""
        return storage.join(self.to, "annotations", f"instances_{split}.json")

    def write(self, images: Sequence[ExportImage]) -> None:
        """Adds the images to the files in memory."""
        for image in images:
            split = image.place.split_name
            entries, annotations = self._arrays.setdefault(split, (io.BytesIO(), io.BytesIO()))
            append_json(entries, image_entry(image))
            for annotation in self.annotations(image):
                self._counts[split] += 1
                append_json(annotations, {"id": self._counts[split], **annotation})

    def annotations(self, image: ExportImage) -> Iterator[dict[str, Any]]:
        """Yields the annotations of an image, without their ids."""
        columns = (to_xywh(image.boxes), image.classes.tolist(), to_numbers(image.scores), image.masks)
        for box, label, score, mask in zip(*columns, strict=True):
            entry = {"image_id": image.place.number, "category_id": self.categories[label]["id"], "bbox": box}
            entry |= {"area": round(box[2] * box[3], 4), "iscrowd": 0, "score": score}
            if mask is not None:
                entry |= {"area": int(coco_mask.area(image.rle(mask))), "segmentation": self._segmentation(image, mask)}
            yield entry

    def _segmentation(self, image: ExportImage, mask: bytes) -> Any:
        if self.polygons is None:
            return {"size": [image.height, image.width], "counts": mask.decode()}
        parts, holes = to_polygons(image, mask, self.polygons)
        self.lost["holes_filled"] += holes
        return [part.reshape(-1).tolist() for part in parts]

    def finish(self) -> None:
        """Writes the files."""
        for split in list(self._arrays):
            entries, annotations = self._arrays.pop(split)
            info = json.dumps({"description": f"split {split}, exported by weaksam", "image_root": self.image_root})
            pieces = [f'{{"info": {info},\n"licenses": [],\n"categories": {json.dumps(self.categories)},\n"images": [']
            content = [pieces[0].encode(), entries.getvalue(), b'],\n"annotations": [', annotations.getvalue(), b"]}\n"]
            del entries, annotations
            storage.write_bytes(self.uri(split), b"".join(content))
            self.files += 1

    def read(self, images: Sequence[ExportImage]) -> Iterable[ReadBack]:
        """Reads the next images and annotations of each file with pycocotools."""
        of_split: dict[str, list[ExportImage]] = {}
        for image in images:
            of_split.setdefault(image.place.split_name, []).append(image)
        indexes = {split: self._index(split, split_images) for split, split_images in of_split.items()}
        return [self._read_image(indexes[image.place.split_name], image) for image in images]

    def _index(self, split: str, images: Sequence[ExportImage]) -> Any:
        if split not in self._rest:
            text = storage.read_bytes(self.uri(split)).decode()
            if list(elements(text, "categories")) != self.categories:
                raise ValueError(f"{self.uri(split)} has other categories than were written")
            self._rest[split] = elements(text, "images"), elements(text, "annotations")
        entries, annotations = self._rest[split]
        coco: Any = COCO()
        coco.dataset = {
            "images": list(itertools.islice(entries, len(images))),
            "annotations": list(itertools.islice(annotations, sum(len(image.boxes) for image in images))),
            "categories": self.categories,
        }
        with contextlib.redirect_stdout(io.StringIO()):  # prints its progress
            coco.createIndex()
        return coco

    def _read_image(self, coco: Any, image: ExportImage) -> ReadBack:
        [entry] = coco.loadImgs([image.place.number])
        annotations = coco.loadAnns(coco.getAnnIds([image.place.number]))
        if entry["file_name"] != image.place.file_name:
            raise ValueError(f"image {image.image_id} is called {entry['file_name']!r} in {self.to}")
        boxes = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        classes = [self.class_names.index(coco.cats[a["category_id"]]["name"]) for a in annotations]
        masks = [coco.annToRLE(a)["counts"] if "segmentation" in a else None for a in annotations]
        masks = [mask.encode() if isinstance(mask, str) else mask for mask in masks]
        scores = np.array([a["score"] for a in annotations])
        return ReadBack(boxes, classes, scores, masks, (entry["height"], entry["width"]))

    def expected_masks(self, image: ExportImage) -> list[bytes | None]:
        """Returns the masks, or the masks of their polygons."""
        tolerance = self.polygons
        if tolerance is None:
            return image.masks
        return [mask and draw_polygons(image, to_polygons(image, mask, tolerance)[0]) for mask in image.masks]

    def check_rest(self) -> None:
        """Raises ValueError if a file has more elements."""
        for split, arrays in self._rest.items():
            for rest in arrays:
                expect_end(rest, self.uri(split))


def image_entry(image: ExportImage) -> dict[str, Any]:
    """Returns the entry of an image in a COCO dataset, with `original_id` if the id is not the dataset's own."""
    place = image.place
    entry = {"id": place.number, "file_name": place.file_name, "width": image.width, "height": image.height}
    return entry if str(place.number) == image.image_id else entry | {"original_id": image.image_id}


def _make(request: ExportRequest) -> CocoDataset:
    tolerance = request.options.polygon_tolerance or 0.0
    return CocoDataset(
        request.to,
        request.class_names,
        polygons=tolerance if request.options.polygons else None,
        image_root=request.image_root,
        category_ids=request.category_ids,
    )


def _fault(options: ExportOptions) -> str | None:
    is_ignored = options.polygon_tolerance is not None and not options.polygons
    return "polygon_tolerance goes with polygons: true" if is_ignored else None


FORMAT = ExportFormat(
    "coco", "a dataset json per split", _make, settings=("polygons", "polygon_tolerance"), fault=_fault
)
