"""Reads COCO instances json (2014, 2017, and other files of this format) as tables.

An image's id is COCO's own, as a string; the tables record whether it is a number, and results are written that way.
Classes are the categories in the order of their ids, 0-based without gaps (COCO's own are 80 of the ids 1 to 90); the
ids are kept in the tables, so results are read and written with them. Boxes are converted from xywh to xyxy.
Image-level labels are the classes of an image's annotations; crowd annotations give no label, as in the WSOD papers'
code. An image without annotations has no labels; labels are null only if the key `annotations` is missing or null
(image_info_test). Sizes are those in the json; images are not opened. A box without area inside the image is left out
with a warning, but its class remains a label. An annotation without a box gets the box of its segmentation if it has
one; otherwise only its label is used.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from weaksam.core import storage
from weaksam.data.annotation_checks import Size, as_number, excerpt, fit_boxes, read_segmentation, read_size, read_xywh
from weaksam.data.categories import complete_category_ids
from weaksam.data.datasets import Dataset, ImageRecord, Objects, check_unique, first_ten, make_dataset, warn_of
from weaksam.data.remarks import BOX_OF_SEGMENTATION, NO_BOX, Remarks
from weaksam.errors import DataError

_TWICE = "annotations are there twice, all the same, and count once"
_SAME_ID = "annotations have the id of another that differs, and count too (were files joined?)"


def read_coco(
    root: str,
    splits: Sequence[str] | Mapping[str, tuple[str, str]],
    *,
    classes: Sequence[str] | None = None,
    crowd_makes_label: bool = False,
    masks: bool = True,
) -> Dataset:
    """Reads a dataset in COCO format.

    Args:
        root: URI of the folder.
        splits: names, for annotations/instances_{name}.json (or image_info_{name}.json) and images in {name}/;
            or a mapping from name to (json file, image folder), each a URI or a path below `root`.
        classes: names in class order; any other name is an error. None: COCO's order.
        crowd_makes_label: whether a crowd annotation gives an image-level label.
        masks: whether to convert segmentations to masks; takes about 0.1 ms per object.

    Raises:
        DataError: the data is invalid; names the file and the position, key, image or annotation.
        StorageError: the storage is at fault.
    """
    root = storage.absolute(root)
    names: dict[int, str] = {}
    used: set[int] = set()
    records: list[ImageRecord] = []
    kinds: set[type] = set()  # types of image ids
    for split in splits:
        uri, folder = _find_split(root, split, splits[split] if isinstance(splits, Mapping) else None)
        content = _load(uri)
        for number, name in _categories(content, uri).items():
            if names.setdefault(number, name) != name:
                raise DataError(f"{uri}: category {number} is {name!r}, another split says {names[number]!r}")
        records += _read_split(content, uri, folder, split, masks, crowd_makes_label)
        kinds |= {type(image["id"]) for image in content["images"]}
        used |= {annotation["category_id"] for annotation in content.get("annotations") or ()}
    check_unique(
        [record.image_id for record in records],
        f"{root}: splits {list(splits)} (give every image an id of its own, or index the splits in separate steps)",
        "image id",
    )
    ids = _ids_by_name(names, used, root)
    dataset = make_dataset(records, classes or list(ids))
    known = [ids.get(name) for name in dataset.class_names]
    ids_are_numbers = None if len(kinds) > 1 else kinds == {int}
    return replace(dataset, category_ids=complete_category_ids(known, names), ids_are_numbers=ids_are_numbers)


def _find_split(root: str, split: str, paths: tuple[str, str] | None) -> tuple[str, str]:
    """Returns the URIs of the json and of the image folder."""
    if paths is not None:
        uri, folder = (g if storage.is_uri(g) or g.startswith("/") else storage.join(root, g) for g in paths)
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
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, too deep nesting
        raise DataError(f"{uri}: cannot be read as JSON ({error})") from error
    for key in ("images", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{uri}: not in COCO's form: it has no list under the key {key!r}")
    return content


def _categories(content: dict[str, Any], uri: str) -> dict[int, str]:
    categories = [
        (_field(c, "id", (int,), f"{uri}: categories"), _field(c, "name", (str,), uri).strip())
        for c in content["categories"]
    ]
    categories = [(number, name.strip()) for number, name in categories]
    check_unique([str(number) for number, _ in categories], f"{uri}: categories", "id")
    return dict(categories)


def _ids_by_name(names: Mapping[int, str], used: Collection[int], root: str) -> dict[str, int]:
    """Returns the id of each class, in the order of ids. If names are repeated, the category with annotations is used.

    Raises:
        DataError: two categories with the same name have annotations.
    """
    numbers: dict[str, list[int]] = {}
    for number in sorted(names):
        numbers.setdefault(names[number], []).append(number)
    ids: dict[str, int] = {}
    passed_over = []
    for name, several in numbers.items():
        with_annotations = [number for number in several if number in used]
        if len(with_annotations) > 1:
            raise DataError(
                f"{root}: categories {' and '.join(map(str, with_annotations))} are both called {name!r} and have "
                "annotations: give each a name of its own, or make one of them"
            )
        ids[name] = (with_annotations or several)[0]
        passed_over += [f"{number} {name}" for number in several if number != ids[name]]
    warn_of(root, "categories have no annotation and the name of another and are left out", passed_over)
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def _field(entry: Any, key: str, kinds: tuple[type, ...], where: str) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kinds) or isinstance(value, bool):  # JSON's true is Python's 1
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"{where}: {key!r} must be {expected}, got {value!r} in {str(entry)[:120]}")
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
    records, remarks = [], Remarks(uri)
    grouped = _by_image(content, uri, images, remarks)
    names = _categories(content, uri)
    if not images:
        raise DataError(f"{uri}: lists no image")
    for number, image in images.items():
        file, source = files[paths[number]], f"{uri}: image {number}"
        size = read_size(image.get("height"), image.get("width"), source)
        labels = objects = None
        if grouped is not None:
            annotations = grouped.get(number, [])
            objects = read_objects(annotations, names, size, uri, masks, remarks)
            labels = {names[a["category_id"]] for a in annotations if crowd_makes_label or not _is_crowd(a, uri)}
        records.append(
            ImageRecord(str(number), file.uri, split, file.size, labels, source, *(size or (None, None)), objects)
        )
    remarks.log()
    return records


def _by_image(
    content: dict[str, Any], uri: str, images: Mapping[int | str, Any], remarks: Remarks
) -> dict[int | str, list[dict]] | None:
    """Returns annotations by image id, without duplicates; None if the key `annotations` is missing or null."""
    if content.get("annotations") is None:
        return None
    if not isinstance(content["annotations"], list):
        raise DataError(f"{uri}: not in COCO's form: 'annotations' is {excerpt(content['annotations'])}, not a list")
    grouped: dict[int | str, list[dict]] = {}
    firsts: dict[int | str, dict] = {}
    for annotation in content["annotations"]:
        number = _field(annotation, "image_id", (int, str), _name_of(annotation, uri))
        if number not in images:
            raise DataError(f"{_name_of(annotation, uri)}: its image_id {number!r} is not among the images")
        own = annotation.get("id")
        first = firsts.setdefault(own, annotation) if isinstance(own, int | str) else annotation
        if first is not annotation:
            remarks.add(_SAME_ID if first != annotation else _TWICE, f"annotation {_id_of(annotation)}")
            if first == annotation:
                continue
        grouped.setdefault(number, []).append(annotation)
    return grouped


def read_objects(
    annotations: Sequence[dict],
    names: Mapping[int, str],
    size: Size | None,
    uri: str,
    masks: bool,
    remarks: Remarks,
) -> Objects:
    """Returns the objects of an image whose box has area; `remarks` collects clipped and dropped ones."""
    kept, corners, drawn = [], [], []
    for annotation in annotations:
        where, entry = _name_of(annotation, uri), f"annotation {_id_of(annotation)}"
        if _field(annotation, "category_id", (int,), where) not in names:
            raise DataError(f"{where}: its category_id {annotation['category_id']} is not among the categories")
        box, segmentation = annotation.get("bbox"), annotation.get("segmentation")
        has_box = box is not None and box != []
        around = mask = None
        if segmentation and (masks or not has_box):
            if masks and size is None:
                raise DataError(f"{where}: has a segmentation, but its image has no height and width")
            around, mask, _ = read_segmentation(segmentation, size, where, remarks, entry)
        if has_box:
            around = read_xywh(box, where)
        else:
            remarks.add(NO_BOX if around is None else BOX_OF_SEGMENTATION, entry)
        if around is not None:
            kept.append(annotation)
            corners.append(around)
            drawn.append(mask if masks else None)
    boxes, has_area, is_outside = fit_boxes(np.array(corners, np.float64).reshape(-1, 4), size)
    remarks.add_boxes([f"annotation {_id_of(a)}" for a in kept], boxes, has_area, is_outside)
    indices = np.flatnonzero(has_area).tolist()
    kept = [kept[i] for i in indices]
    return Objects(
        names=[names[a["category_id"]] for a in kept],
        boxes=boxes[has_area],
        difficult=[False] * len(kept),
        crowd=[_is_crowd(a, uri) for a in kept],
        masks=[drawn[i] for i in indices],
        areas=_areas(kept, uri),
    )


def _areas(annotations: Sequence[dict], uri: str) -> list[float] | None:
    """Returns the areas in the dataset; None if an annotation has none."""
    areas = []
    for annotation in annotations:
        value = annotation.get("area")
        area = None if value is None else as_number(value)
        if value is not None and (area is None or area < 0):
            raise DataError(f"{_name_of(annotation, uri)}: its area must be a number from 0, got {excerpt(value)}")
        areas.append(area)
    return None if None in areas else areas  # type: ignore[return-value]


def _is_crowd(annotation: dict, uri: str) -> bool:
    value = annotation.get("iscrowd")
    if value in (None, 0, "0"):
        return False
    if value in (1, "1"):
        return True
    raise DataError(f"{_name_of(annotation, uri)}: its iscrowd must be 0 or 1, got {excerpt(value)}")
