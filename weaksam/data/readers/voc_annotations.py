"""Reads an image's annotation in VOC's form: an XML file and an index image of masks, for `voc` and `voc_folder`."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import PngImagePlugin
from pycocotools import mask as coco_mask

from weaksam.core import storage
from weaksam.core.storage import FileInfo
from weaksam.data.datasets import ImageRecord, Objects, class_list, map_in_threads, warn_of
from weaksam.data.images import MAX_PIXELS
from weaksam.data.readers.voc_xml import VocAnnotation, parse_voc_xml
from weaksam.data.remarks import Remarks
from weaksam.errors import DataError

_VOID = 255  # value of pixels without an object
_MOST_XML = 200  # files that `check_sample` reads


@dataclass(frozen=True)
class VocFiles:
    """The files of an image; `masks_uri` is its SegmentationObject file."""

    xml_uri: str
    masks_uri: str | None = None


def read_annotation(files: VocFiles) -> VocAnnotation:
    """Reads an annotation, with object masks if there is a file of them."""
    annotation = parse_voc_xml(storage.read_bytes(files.xml_uri), files.xml_uri)
    if files.masks_uri is None:
        return annotation
    return with_masks(annotation, storage.read_bytes(files.masks_uri), files.masks_uri)


def with_masks(annotation: VocAnnotation, data: bytes, uri: str) -> VocAnnotation:
    """Adds the masks of a SegmentationObject PNG: value i is object i (from 1), 0 background, 255 void.

    Objects without pixels and objects after the 254th have no mask. A mask without an object, whose class is unknown,
    is skipped, and so is the mask of an object with several boxes. An object without a box gets the box of its mask.

    Raises:
        DataError: the file is not an index PNG, or has another size than the annotation.
    """
    values = _read_values(annotation, data, uri)
    once = {place for place, count in Counter(annotation.places).items() if count == 1 and place < _VOID}
    drawn = once.intersection(np.unique(values).tolist())
    values = np.asfortranarray(values)
    # one plane at a time: the planes of a hundred objects of a photograph exceed a gigabyte
    rles: list[Any] = [
        coco_mask.encode((values == place).view(np.uint8)) if place in drawn else None for place in annotation.places
    ]
    masks = [rle and rle["counts"] for rle in rles]
    has_mask = np.array([rle is not None for rle in rles], bool)
    has_more = bool(((values > max(annotation.places, default=0)) & (values < _VOID)).any())
    boxes, has_area = annotation.boxes.copy(), annotation.has_area.copy()
    for i in np.flatnonzero(annotation.no_bndbox & ~has_area & has_mask):
        left, top, width, height = coco_mask.toBbox(rles[i])
        boxes[i], has_area[i] = (left, top, left + width, top + height), True
    return replace(annotation, masks=masks, has_more_masks=has_more, boxes=boxes, has_area=has_area)


def _read_values(annotation: VocAnnotation, data: bytes, uri: str) -> np.ndarray:
    """Returns the values of an index PNG, (H, W) uint8; its size is checked before it is decoded."""
    size = annotation.height, annotation.width
    try:
        image = PngImagePlugin.PngImageFile(io.BytesIO(data))
        height, width = image.height, image.width
        is_of_size = (height, width) == size if None not in size else height * width <= MAX_PIXELS
        values = np.asarray(image) if is_of_size else None
    except Exception as error:  # Pillow raises many types for damaged files
        raise DataError(f"{uri}: not a readable PNG ({error})") from error
    if values is None:
        stated = f"{annotation.uri} says {size[0]} x {size[1]}"
        limit = f"more than {MAX_PIXELS} pixels"
        raise DataError(f"{uri}: is {height} x {width}, {limit if None in size else stated}")
    if values.ndim != 2 or values.dtype != np.uint8:
        raise DataError(f"{uri}: one 8-bit value per pixel was expected, got {values.dtype} of shape {values.shape}")
    return values


def make_record(
    image_id: str, file: FileInfo, split: str, annotation: VocAnnotation | None, difficult_makes_label: bool
) -> ImageRecord:
    """Returns the record of an image; `annotation` None: not annotated."""
    if annotation is None:
        return ImageRecord(image_id, file.uri, split, file.size, None, file.uri)
    keep = np.flatnonzero(annotation.has_area)
    objects = Objects(
        names=[annotation.names[i] for i in keep],
        boxes=annotation.boxes[keep],
        difficult=[annotation.difficult[i] for i in keep],
        crowd=[False] * len(keep),
        masks=[annotation.masks[i] for i in keep],
    )
    named = zip(annotation.names, annotation.difficult, strict=True)
    labels = {name for name, is_difficult in named if difficult_makes_label or not is_difficult}
    size = annotation.height, annotation.width
    return ImageRecord(image_id, file.uri, split, file.size, labels, annotation.uri, *size, objects)


def warn_of_objects(where: str, annotations: Sequence[VocAnnotation]) -> None:
    """Logs objects with a box without area or far outside their image, and files with too few objects."""
    remarks = Remarks(where)
    for a in annotations:
        entries = [f"{a.uri} object {place}" for place in a.places]
        remarks.add_boxes(entries, a.boxes, a.has_area | a.no_bndbox, a.is_outside)
    remarks.log()
    without = [a.uri for a in annotations if a.no_bndbox.any()]
    several = [a.uri for a in annotations if len(set(a.places)) < len(a.places)]
    problem = (
        "files with objects without <bndbox>; their labels count, and the box around their mask or outline, if any"
    )
    warn_of(where, problem, without)
    warn_of(where, "files with several <bndbox> in an object; each is an object, without a mask", several)
    more = [a.uri for a in annotations if a.has_more_masks]
    warn_of(where, "files with fewer objects than their SegmentationObject has masks; those masks are left out", more)


def check_sample(uris: Sequence[str], classes: Sequence[str] | None) -> tuple[str, str, list[str]]:
    """Reads a sample of XML files for `weaksam check`.

    Args:
        uris: URIs of all XML files.
        classes: the allowed classes; None: any.

    Returns:
        read: describes the files that were read.
        unread: describes the others, followed by `and`; empty if there are none.
        faults: the faults of the files.
    """
    sample = uris[:: -(-len(uris) // _MOST_XML) or 1]
    faults, annotations = [], []
    for result in map_in_threads(_read_or_fault, sample):
        (annotations if isinstance(result, VocAnnotation) else faults).append(result)
    if classes is not None:
        classes = class_list(classes)
        unknown = {name: xml.uri for xml in annotations for name in xml.names if name not in classes}
        faults += [f"{uri}: class {name!r} is not among the classes {classes}" for name, uri in unknown.items()]
    if len(faults) > 20:
        faults[20:] = [f"{len(faults) - 20} more files have faults"]
    unread = f"{len(uris) - len(sample)} other XML files and " if len(sample) < len(uris) else ""
    return f"{len(sample)} of {len(uris)} XML files", unread, faults


def _read_or_fault(uri: str) -> VocAnnotation | str:
    try:
        return read_annotation(VocFiles(uri))
    except (DataError, FileNotFoundError) as error:
        return str(error)
