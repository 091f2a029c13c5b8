"""Reads Pascal VOC devkits (2007 and 2012 layout) as tables.

VOC's boxes are 1-based with inclusive corners: (xmin, ymin, xmax, ymax) becomes (xmin - 1, ymin - 1, xmax, ymax).
Image-level labels are the classes of an image's objects; objects flagged difficult give no label, as in the WSOD
papers' code. An image without an annotation file has null labels. Sizes are those in the annotation; images are
not opened. A box without area inside the image is left out with a warning, but its class remains a label: the
annotator did see the object. The class of an object without <bndbox> is a label too; its box is the bounding box of
its <robndbox>, <polygon> or mask, if it has any. Each <bndbox> of an object with several becomes an object.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import PngImagePlugin
from pycocotools import mask as coco_mask

from weaksam.core import storage
from weaksam.core.storage import FileInfo
from weaksam.data.annotation_checks import fit_boxes, read_size
from weaksam.data.datasets import (
    Dataset,
    ImageRecord,
    MapFiles,
    Objects,
    by_stem,
    check_unique,
    first_ten,
    make_dataset,
    map_in_threads,
    warn_of,
)
from weaksam.data.images import EXTENSIONS, MAX_PIXELS
from weaksam.data.readers.voc_xml import number, outline, read_difficult
from weaksam.data.remarks import Remarks
from weaksam.errors import DataError

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_VOID = 255  # value of pixels without an object
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_OF_CLASS = re.compile(r"\S\s+(?:-1|0|1)\s*$")


@dataclass(frozen=True)
class VocAnnotation:
    """An annotation file with all its N objects, including those whose box has no area."""

    uri: str
    height: int | None  # None: not in the file
    width: int | None
    names: list[str]
    boxes: np.ndarray  # (N, 4) float32, 0-based xyxy, right and bottom exclusive, clipped to the image
    difficult: list[bool]
    has_area: np.ndarray  # (N,) bool
    is_outside: np.ndarray  # (N,) bool: the box extended more than a pixel beyond the image
    masks: list[bytes | None]  # COCO compressed counts
    places: list[int]  # index of the <object> in the file, from 1; shared by its boxes
    no_bndbox: np.ndarray  # (N,) bool: the object has no <bndbox>; without an outline or a mask it has no area
    has_more_masks: bool = False  # more masks than objects


@dataclass(frozen=True)
class VocFiles:
    """The files of an image; `masks_uri` is its SegmentationObject file."""

    xml_uri: str
    masks_uri: str | None = None


def read_voc(
    root: str,
    splits: Sequence[str],
    *,
    classes: Sequence[str] | None = None,
    difficult_makes_label: bool = False,
    masks: bool = True,
    map_files: MapFiles = map_in_threads,
) -> Dataset:
    """Reads a VOC devkit.

    Args:
        root: URI of the folder with ImageSets and JPEGImages, or of a VOCdevkit folder with one such folder.
        splits: names of files in ImageSets/Main without `.txt`; a name with a slash is relative to ImageSets.
        classes: names in class order. None: the 20 of VOC if no other occurs, else the names that occur, sorted.
        difficult_makes_label: whether an object flagged difficult gives an image-level label.
        masks: whether to read SegmentationObject if it exists: its value i is the i-th object of the XML.
        map_files: calls a function on 10^5 `VocFiles`, like the builtin `map`.

    Raises:
        DataError: the data is invalid; names the file and line, or the first ten image ids.
        StorageError: the storage is at fault.
    """
    root = find_devkit(storage.absolute(root))
    pictures = by_stem(storage.list_files(storage.join(root, "JPEGImages"), recursive=False), EXTENSIONS)
    ids = read_splits(root, splits, pictures)
    annotations = _read_annotations(root, [i for split_ids in ids.values() for i in split_ids], masks, map_files)
    images = []
    for split, split_ids in ids.items():
        unlabelled = [i for i in split_ids if i not in annotations]
        if len(unlabelled) < len(split_ids):
            warn_of(root, f"images of split {split!r} have no annotation file, their labels are null", unlabelled)
        for i in split_ids:
            images.append(make_record(i, pictures[i], split, annotations.get(i), difficult_makes_label))
    warn_of_objects(root, list(annotations.values()))
    return make_dataset(images, classes or default_classes(images))


def read_splits(root: str, splits: Sequence[str], pictures: Collection[str]) -> dict[str, list[str]]:
    """Reads the image ids of each split of the devkit `root`.

    Args:
        root: URI of the folder with ImageSets and JPEGImages.
        splits: see `read_voc`.
        pictures: names in JPEGImages without extension; must include every id.

    Raises:
        DataError: a list is invalid; names the list and the line, or the first ten image ids.
    """
    ids = {split: _read_split(root, split, pictures) for split in splits}
    check_unique([i for split_ids in ids.values() for i in split_ids], f"{root}: splits {list(splits)}", "image id")
    for split, split_ids in ids.items():
        if missing := [i for i in split_ids if i not in pictures]:
            raise DataError(
                f"{root}/ImageSets: {len(missing)} of {len(split_ids)} ids of split {split!r} have no file in "
                f"JPEGImages: {first_ten(missing)}"
            )
    return ids


def find_devkit(root: str) -> str:
    """Returns the folder with ImageSets and JPEGImages: `root`, or the only VOC folder in it.

    Raises:
        DataError: there is no such folder, or more than one.
    """
    folders = storage.list_folders(root)
    if {"ImageSets", "JPEGImages"} <= set(folders):
        return root
    inner = [name for name in folders if name.startswith("VOC")]
    if len(inner) == 1:
        return find_devkit(storage.join(root, inner[0]))
    if inner:
        raise DataError(
            f"{root}: holds {', '.join(inner)}: say which, for example root: {storage.join(root, inner[0])}"
        )
    raise DataError(
        f"{root}: not a VOC devkit: ImageSets and JPEGImages were expected, "
        + (f"found {first_ten(folders)}" if folders else "found no folder")
    )


def _read_split(root: str, split: str, pictures: Collection[str]) -> list[str]:
    uri = storage.join(root, "ImageSets", (split if "/" in split else f"Main/{split}") + ".txt")
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except FileNotFoundError as error:
        listed = storage.list_files(uri.rpartition("/")[0], recursive=False)
        names = [file.path.removesuffix(".txt") for file in listed if file.path.endswith(".txt")]
        per_class = tuple(f"{name}_" for name in CLASSES)
        names = [name for name in names if not name.startswith(per_class)]
        raise DataError(f"{uri}: no such split; there are: {first_ten(names) or 'none'}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{uri}: not a text file ({error})") from error
    ids = [line.strip() for line in text.splitlines() if line.strip()]
    # Names may contain blanks; in the list of a class each id is followed by 1, 0 or -1 (difficult).
    for count, line in enumerate(text.splitlines(), start=1):
        if _OF_CLASS.search(line) and line.strip() not in pictures:
            raise DataError(f"{uri}, line {count}: one image id was expected, got {line!r} (a list of one class?)")
    if not ids:
        raise DataError(f"{uri}: lists no image id")
    check_unique(ids, uri, "image id")
    return ids


def _read_annotations(root: str, ids: Sequence[str], masks: bool, map_files: MapFiles) -> dict[str, VocAnnotation]:
    xmls = by_stem(storage.list_files(storage.join(root, "Annotations"), recursive=False), (".xml",))
    pngs: dict[str, FileInfo] = {}
    if masks:
        pngs = by_stem(storage.list_files(storage.join(root, "SegmentationObject"), recursive=False), (".png",))
    annotated = [i for i in ids if i in xmls]
    files = [VocFiles(xmls[i].uri, pngs[i].uri if i in pngs else None) for i in annotated]
    return dict(zip(annotated, map_files(read_annotation, files), strict=True))


def read_annotation(files: VocFiles) -> VocAnnotation:
    """Reads an annotation, with object masks if there is a file of them."""
    annotation = parse_voc_xml(storage.read_bytes(files.xml_uri), files.xml_uri)
    if files.masks_uri is None:
        return annotation
    return with_masks(annotation, storage.read_bytes(files.masks_uri), files.masks_uri)


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


def default_classes(images: Sequence[ImageRecord]) -> list[str]:
    """Returns the 20 classes of VOC if no other occurs, else the names that occur, sorted."""
    names = {name for image in images if image.objects for name in image.objects.names}
    names |= {name for image in images for name in image.labels or ()}
    return list(CLASSES) if names <= set(CLASSES) else sorted(names)


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


def parse_voc_xml(data: bytes, uri: str) -> VocAnnotation:
    """Parses an annotation file in VOC format; `uri` is for messages. A pure function, so it can run in parallel.

    A missing or zero <size> gives no height and width; a missing or unspecified <difficult> is false; coordinates
    may have decimals. Other elements are ignored, including <part>, and <filename>, which is often wrong.

    Raises:
        DataError: not XML, or an object lacks a name or a number; names file and line or object.
    """
    try:
        root = ET.fromstring(data)
    except ET.ParseError as error:
        raise DataError(f"{uri}, line {error.position[0]}: not well-formed XML ({error})") from error
    except (ValueError, LookupError) as error:
        raise DataError(f"{uri}: not readable as XML ({error})") from error
    if root.tag != "annotation":
        raise DataError(f"{uri}: not an annotation in VOC's form: <annotation> was expected, got <{root.tag}>")
    size = read_size(*((root.findtext(f"size/{key}") or "").strip() for key in ("height", "width")), where=uri)
    names, corners, difficult, places, no_bndbox = [], [], [], [], []
    for index, element in enumerate(root.findall("object"), start=1):
        name = (element.findtext("name") or "").strip()
        where = f"{uri}: object {index} ({name})"
        if not name:
            raise DataError(f"{uri}: object {index} has no <name>")
        bndboxes = [[number(box, key, where, "bndbox") for key in _CORNERS] for box in element.findall("bndbox")]
        no_bndbox += [not bndboxes] * max(len(bndboxes), 1)
        for box in bndboxes or [outline(element, where)]:
            names.append(name)
            corners.append(box)
            difficult.append(read_difficult(element, where))
            places.append(index)
    boxes = np.array(corners, np.float64).reshape(-1, 4) - [1, 1, 0, 0]
    fitted = fit_boxes(boxes, size)
    masks: list[bytes | None] = [None] * len(names)
    rest = masks, places, np.array(no_bndbox, bool)
    return VocAnnotation(uri, *(size or (None, None)), names, fitted[0], difficult, *fitted[1:], *rest)


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
