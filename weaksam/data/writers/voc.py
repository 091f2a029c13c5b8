"""Writes a VOC devkit without images: Annotations, ImageSets, and index images of masks if there are any.

VOC's boxes are 1-based with inclusive whole corners: (x1, y1, x2, y2) becomes (x1 + 1, y1 + 1, x2, y2), each rounded to
the nearest pixel; a box thinner than a pixel becomes its first pixel. Pixels of the i-th object of the XML have value i
in SegmentationObject, and its 1-based class in SegmentationClass; a pixel has one value, so the mask with the higher
score is on top where masks overlap. Only 254 objects of an image can have a mask (0 is background, 255 void).
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from weaksam.core import storage
from weaksam.data.datasets import map_in_threads
from weaksam.data.readers.voc_annotations import VocFiles, read_annotation
from weaksam.data.writers.common import ExportImage, ReadBack
from weaksam.data.writers.format import ExportFormat
from weaksam.data.writers.places import picture_list
from weaksam.errors import DataError

_MOST = 254  # values of a pixel that are neither background nor void


def palette() -> bytes:
    """Returns VOC's 256 colours: a value's bits, lowest first, fill red, green and blue in turn, from the top."""
    values = np.arange(256)
    colours = np.zeros((256, 3), np.int64)
    for place in range(8):
        for channel in range(3):
            colours[:, channel] |= ((values >> (3 * place + channel)) & 1) << (7 - place)
    return colours.astype(np.uint8).tobytes()


def to_corners(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Converts boxes inside the image to VOC's corners.

    Args:
        boxes: (N, 4) float xyxy, 0-based, right and bottom exclusive.
        height: height of the image; `width` is its width.

    Returns:
        (N, 4) int xmin, ymin, xmax, ymax, 1-based, inclusive.
    """
    boxes = boxes.astype(np.float64)
    first, end = np.floor(boxes[:, :2] + 0.5), np.floor(boxes[:, 2:] + 0.5)
    is_thin = end <= first
    first = np.where(is_thin, np.minimum(np.floor(boxes[:, :2]), [width - 1, height - 1]), first)
    end = np.where(is_thin, first + 1, end)
    return np.concatenate([first + 1, end], axis=1).astype(int)


def to_xml(image: ExportImage, class_names: Sequence[str]) -> bytes:
    """Returns the annotation file of an image."""
    root = ET.Element("annotation")
    _add(root, "folder", "JPEGImages")
    _add(root, "filename", image.place.picture)
    size = _add(root, "size")
    for key, value in (("width", image.width), ("height", image.height), ("depth", 3)):
        _add(size, key, value)
    _add(root, "segmented", int(image.has_masks))
    corners = to_corners(image.boxes, image.height, image.width)
    for label, box in zip(image.classes, corners, strict=True):
        element = _add(root, "object")
        for key, value in (("name", class_names[label]), ("pose", "Unspecified"), ("truncated", 0), ("difficult", 0)):
            _add(element, key, value)
        place = _add(element, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            _add(place, key, value)
    ET.indent(root)
    return ET.tostring(root, encoding="utf-8") + b"\n"


def _add(parent: ET.Element, name: str, text: object = None) -> ET.Element:
    element = ET.SubElement(parent, name)
    element.text = None if text is None else str(text)
    return element


def paint_masks(image: ExportImage) -> np.ndarray:
    """Returns (H, W) uint8: the 1-based index of each pixel's object, 0 for background."""
    values = np.zeros((image.height, image.width), np.uint8)
    for position in reversed(range(min(len(image.masks), _MOST))):  # sorted, best first: the best is painted last
        if (mask := image.masks[position]) is not None:
            values[image.decode(mask)] = position + 1
    return values


def to_png(values: np.ndarray) -> bytes:
    """Encodes (H, W) uint8 as an index image in VOC's colours."""
    picture = Image.fromarray(values)
    picture.putpalette(palette())
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


class VocDevkit:
    """Writes a devkit folder, without JPEGImages.

    Args:
        to: URI of the folder.
        class_names: by 0-based class.

    Raises:
        DataError: more classes than SegmentationClass can represent.
    """

    targets = ("Annotations", "ImageSets", "SegmentationObject", "SegmentationClass", "images.csv")
    box_tolerance = 1.0  # for boxes thinner than a pixel; half of it for others
    verified = "boxes to the pixel, classes and masks, read by weaksam.data.readers.voc_annotations"

    def __init__(self, to: str, class_names: Sequence[str]) -> None:
        if len(class_names) > _MOST:
            raise DataError(f"format voc has room for {_MOST} classes, there are {len(class_names)}: use coco")
        self.to, self.class_names = to, list(class_names)
        self.files = 0
        self.lost: Counter[str] = Counter()
        self._lists: dict[str, list[str]] = {}
        self._pictures: list[tuple[str, str]] = []

    def _uri(self, folder: str, image: ExportImage) -> str:
        extension = "xml" if folder == "Annotations" else "png"
        return storage.join(self.to, folder, f"{image.place.name}.{extension}")

    def write(self, images: Sequence[ExportImage]) -> None:
        """Writes the files of each image."""
        self.files += sum(map_in_threads(self._write_image, images))
        for image in images:
            place = image.place
            self._lists.setdefault(f"Main/{place.split_name}", []).append(place.name)
            if image.has_masks:
                self._lists.setdefault(f"Segmentation/{place.split_name}", []).append(place.name)
            self._pictures.append((f"JPEGImages/{place.picture}", place.uri))
            self.lost["scores"] += len(image.boxes)
            self.lost["masks_beyond_254"] += sum(mask is not None for mask in image.masks[_MOST:])

    def _write_image(self, image: ExportImage) -> int:
        storage.write_bytes(self._uri("Annotations", image), to_xml(image, self.class_names))
        if not image.has_masks:
            return 1
        objects = paint_masks(image)
        classes = np.concatenate([[0], image.classes[:_MOST] + 1]).astype(np.uint8)[objects]
        storage.write_bytes(self._uri("SegmentationObject", image), to_png(objects))
        storage.write_bytes(self._uri("SegmentationClass", image), to_png(classes))
        return 3

    def finish(self) -> None:
        """Writes the lists of images."""
        for name, ids in self._lists.items():
            content = "".join(f"{image_id}\n" for image_id in sorted(ids))
            storage.write_bytes(storage.join(self.to, "ImageSets", f"{name}.txt"), content.encode())
        storage.write_bytes(storage.join(self.to, "images.csv"), picture_list(sorted(self._pictures)))
        self.files += len(self._lists) + 1

    def read(self, images: Sequence[ExportImage]) -> Iterable[ReadBack]:
        """Reads each image's annotation with the reader of the `index` stage."""
        return list(map_in_threads(self._read_image, images))

    def _read_image(self, image: ExportImage) -> ReadBack:
        masks = self._uri("SegmentationObject", image) if image.has_masks else None
        annotation = read_annotation(VocFiles(self._uri("Annotations", image), masks))
        size = (annotation.height or 0, annotation.width or 0)
        classes = [self.class_names.index(name) for name in annotation.names]
        return ReadBack(annotation.boxes, classes, None, annotation.masks if masks else None, size)

    def expected_masks(self, image: ExportImage) -> list[bytes | None]:
        """Returns the part of each mask that no better mask covers."""
        values = paint_masks(image)
        visible = set(np.unique(values).tolist())
        values = np.asfortranarray(values)
        rles: list[Any] = [
            coco_mask.encode((values == i).view(np.uint8)) if i in visible else None
            for i in range(1, min(len(image.masks), _MOST) + 1)
        ]
        return [rle and rle["counts"] for rle in rles] + [None] * (len(image.masks) - len(rles))

    def check_rest(self) -> None:
        """Raises ValueError if there are other annotations or lists than were written."""
        for name, ids in self._lists.items():
            uri = storage.join(self.to, "ImageSets", f"{name}.txt")
            if storage.read_bytes(uri).decode().split() != sorted(ids):
                raise ValueError(f"{uri} lists other images than were written")
        files = storage.list_files(storage.join(self.to, "Annotations"))
        if len(files) != len(self._pictures):
            raise ValueError(f"{self.to}/Annotations has {len(files)} files, {len(self._pictures)} were written")


FORMAT = ExportFormat(
    "voc",
    "a devkit: XML files, lists, index images of masks",
    lambda request: VocDevkit(request.to, request.class_names),
    keeps_file_names=False,
    keeps_spaces=False,
    masks_overlap=False,
)
