"""COCO instances json (2014, 2017, and others in its form) as tables.

An image's id is COCO's own, as a string. Classes are COCO's categories in the order of their ids, 0-based without
gaps (80 of the ids 1 to 90). Boxes xywh become xyxy. Image-level labels are the classes of an image's annotations;
crowd annotations make no label, as in the WSOD papers' code. An image without annotations shows none of the classes;
only a file without the key `annotations` (image_info_test) gives null labels. Sizes are what the json says; images
are not opened. A box without area inside the image is left out with a warning, but its class stays a label.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from weaksam import storage
from weaksam.data.datasets import (
    Dataset,
    ImageRecord,
    Objects,
    check_unique,
    first_ten,
    fit_boxes,
    make_dataset,
    warn_of,
)
from weaksam.errors import DataError


def read_coco(
    root: str,
    splits: Sequence[str] | Mapping[str, tuple[str, str]],
    *,
    classes: Sequence[str] | None = None,
    crowd_makes_label: bool = False,
    masks: bool = True,
) -> Dataset:
    """A dataset in COCO's form.

    Args:
        root: URI of the folder.
        splits: names, for annotations/instances_{name}.json (or image_info_{name}.json) and images in {name}/;
            or a mapping from name to (json file, image folder), each a URI or a path below `root`.
        classes: names in the order wanted; another name is an error. None: COCO's order.
        crowd_makes_label: whether a crowd annotation makes an image-level label.
        masks: whether to make masks of the segmentations; costs about 0.1 ms per object.

    Raises:
        DataError: names the file and the position, key, image or annotation.
        StorageError: the storage is at fault.
    """
    root = storage.absolute(root)
    names: dict[int, str] = {}
    records: list[ImageRecord] = []
    for split in splits:
        uri, folder = _find_split(root, split, splits[split] if isinstance(splits, Mapping) else None)
        content = _load(uri)
        for number, name in _categories(content, uri).items():
            if names.setdefault(number, name) != name:
                raise DataError(f"{uri}: category {number} is {name!r}, another split says {names[number]!r}")
        records += _read_split(content, uri, folder, split, masks, crowd_makes_label)
    check_unique(
        [record.image_id for record in records],
        f"{root}: splits {list(splits)} (give every image an id of its own, or index the splits in separate steps)",
        "image id",
    )
    return make_dataset(records, classes or [names[number] for number in sorted(names)])


def _find_split(root: str, split: str, given: tuple[str, str] | None) -> tuple[str, str]:
    """URIs of the json and of the image folder."""
    if given is not None:
        uri, folder = (g if "://" in g or g.startswith("/") else storage.join(root, g) for g in given)
        return uri, folder
    folder = storage.join(root, split)
    uri = storage.join(root, "annotations", f"instances_{split}.json")
    without_boxes = storage.join(root, "annotations", f"image_info_{split}.json")
    if not storage.exists(uri) and storage.exists(without_boxes):
        return without_boxes, folder
    return uri, folder


def _load(uri: str) -> dict[str, Any]:
    try:
        content = json.loads(storage.read_bytes(uri))
    except FileNotFoundError as error:
        raise DataError(f"{uri}: no such file: an annotation json was expected") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{uri}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{uri}: not UTF-8 text ({error})") from error
    for key in ("images", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{uri}: not in COCO's form: it has no list under the key {key!r}")
    return content


def _categories(content: dict[str, Any], uri: str) -> dict[int, str]:
    found = [
        (_field(c, "id", (int,), f"{uri}: categories"), _field(c, "name", (str,), uri).strip())
        for c in content["categories"]
    ]
    check_unique([str(number) for number, _ in found], f"{uri}: categories", "id")
    check_unique([name for _, name in found], f"{uri}: categories", "name")
    return dict(found)


def _field(entry: Any, key: str, kinds: tuple[type, ...], where: str) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"{where}: {key!r} must be {wanted}, got {value!r} in {str(entry)[:120]}")
    return value


def _name_of(annotation: Any, uri: str) -> str:
    return f"{uri}: annotation {_id_of(annotation)}"


def _id_of(annotation: Any) -> str:
    return str(annotation.get("id")) if isinstance(annotation, dict) else repr(annotation)[:120]


def _read_split(
    content: dict[str, Any], uri: str, folder: str, split: str, masks: bool, crowd_makes_label: bool
) -> list[ImageRecord]:
    images = {_field(image, "id", (int, str), f"{uri}: images"): image for image in content["images"]}
    check_unique([str(image["id"]) for image in content["images"]], f"{uri}: images", "id")
    paths = {number: _field(image, "file_name", (str,), f"{uri}: image {number}") for number, image in images.items()}
    listing = storage.list_files(folder, recursive=any("/" in path for path in paths.values()))
    files = {file.path: file for file in listing}
    if missing := [path for path in paths.values() if path not in files]:
        raise DataError(f"{uri}: {len(missing)} of {len(paths)} images are not in {folder}: {first_ten(missing)}")
    grouped = _by_image(content, uri, images)
    names = _categories(content, uri)
    records, empty, outside = [], [], []
    for number, image in images.items():
        file, size = files[paths[number]], _size(image)
        labels = objects = None
        if grouped is not None:
            annotations = grouped.get(number, [])
            objects, has_area, is_outside = _objects(annotations, names, size, uri, masks)
            empty += [_id_of(a) for a, keep in zip(annotations, has_area, strict=True) if not keep]
            outside += [_id_of(a) for a, far in zip(annotations, is_outside, strict=True) if far]
            labels = {names[a["category_id"]] for a in annotations if crowd_makes_label or not a.get("iscrowd")}
        source = f"{uri}: image {number}"
        records.append(
            ImageRecord(str(number), file.uri, split, file.size, labels, source, *(size or (None, None)), objects)
        )
    warn_of(uri, "annotations have a box without area inside the image; those boxes are left out", empty)
    warn_of(uri, "annotations have a box beyond the image, cut at its border", outside)
    return records


def _by_image(content: dict[str, Any], uri: str, images: Mapping[int | str, Any]) -> dict[int | str, list[dict]] | None:
    """Annotations by image id; None when the file has no place for any."""
    if "annotations" not in content:
        return None
    grouped: dict[int | str, list[dict]] = {}
    for annotation in content["annotations"]:
        number = _field(annotation, "image_id", (int, str), _name_of(annotation, uri))
        if number not in images:
            raise DataError(f"{_name_of(annotation, uri)}: its image_id {number!r} is not among the images")
        grouped.setdefault(number, []).append(annotation)
    return grouped


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    height, width = (value if isinstance(value, int) else 0 for value in (image.get("height"), image.get("width")))
    return (height, width) if height > 0 and width > 0 else None


def _objects(
    annotations: Sequence[dict], names: Mapping[int, str], size: tuple[int, int] | None, uri: str, masks: bool
) -> tuple[Objects, np.ndarray, np.ndarray]:
    """The objects of one image that have area, and for all its annotations: has_area, is_outside, (N,) bool."""
    corners = []
    for annotation in annotations:
        where = _name_of(annotation, uri)
        if _field(annotation, "category_id", (int,), where) not in names:
            raise DataError(f"{where}: its category_id {annotation['category_id']} is not among the categories")
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(value) for value in box):
            raise DataError(f"{where}: its bbox must be 4 numbers (x, y, width, height), got {box!r}")
        corners.append([box[0], box[1], box[0] + box[2], box[1] + box[3]])
    boxes, has_area, is_outside = fit_boxes(np.array(corners, np.float64).reshape(-1, 4), size)
    kept = [a for a, keep in zip(annotations, has_area, strict=True) if keep]
    objects = Objects(
        names=[names[a["category_id"]] for a in kept],
        boxes=boxes[has_area],
        difficult=[False] * len(kept),
        crowd=[bool(a.get("iscrowd")) for a in kept],
        masks=[_mask(a.get("segmentation"), size, _name_of(a, uri)) if masks else None for a in kept],
        areas=[float(a["area"]) for a in kept] if all(_is_finite(a.get("area")) for a in kept) else None,
    )
    return objects, has_area, is_outside


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _mask(segmentation: Any, size: tuple[int, int] | None, where: str) -> bytes | None:
    """COCO compressed counts of polygons or of either kind of RLE; None where there is no segmentation."""
    if not segmentation:
        return None
    if size is None:
        raise DataError(f"{where}: has a segmentation, but its image has no height and width")
    try:
        if isinstance(segmentation, list):
            # A list of 4 numbers would be taken for a box by pycocotools.
            polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
            merged: Any = coco_mask.merge(coco_mask.frPyObjects(polygons, *size)) if polygons else {}
            return merged.get("counts")
        counts = segmentation["counts"]
        if list(segmentation["size"]) != list(size):
            raise DataError(f"{where}: its RLE is of size {segmentation['size']}, its image of {list(size)}")
        if isinstance(counts, list):
            if sum(counts) != size[0] * size[1]:
                raise DataError(f"{where}: its RLE covers {sum(counts)} pixels, its image has {size[0] * size[1]}")
            packed: Any = coco_mask.frPyObjects(segmentation, *size)
            return packed["counts"]
        return counts.encode() if isinstance(counts, str) else counts
    except DataError:
        raise
    except Exception as error:  # pycocotools raises bare Exceptions too
        raise DataError(f"{where}: its segmentation is neither polygons nor RLE ({error!r})") from error
