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

from weaksam.core import storage
from weaksam.core.look import Look
from weaksam.data.annotation_checks import excerpt, read_size
from weaksam.data.categories import complete_category_ids
from weaksam.data.datasets import Dataset, ImageRecord, check_unique, first_ten, make_dataset, warn_of
from weaksam.data.readers.coco_annotations import field_of, id_of, is_crowd, name_of, read_objects
from weaksam.data.readers.format import DatasetFormat, DatasetSource, Listed, Whole, look_by_reading
from weaksam.data.remarks import Remarks
from weaksam.errors import DataError

_TWICE = "annotations are there twice, all the same, and count once"
_SAME_ID = "annotations have the id of another that differs, and count too (were files joined?)"
_SAME_FILE = (
    "images have the file of another image, and each counts (are the annotations of a picture spread over them?)"
)
_MOST_BYTES = 32 * 1024**2  # limit for json files that `weaksam check` reads whole: a second or two
_HEAD = 4096


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
        (field_of(c, "id", (int,), f"{uri}: categories"), field_of(c, "name", (str,), uri).strip())
        for c in content["categories"]
    ]
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


def _read_split(
    content: dict[str, Any], uri: str, folder: str, split: str, masks: bool, crowd_makes_label: bool
) -> list[ImageRecord]:
    images = {field_of(image, "id", (int, str), f"{uri}: images"): image for image in content["images"]}
    check_unique([str(image["id"]) for image in content["images"]], f"{uri}: images", "id")
    paths = {number: field_of(image, "file_name", (str,), f"{uri}: image {number}") for number, image in images.items()}
    listing = storage.list_files(folder, recursive=any("/" in path for path in paths.values()))
    files = {file.path: file for file in listing}
    if missing := [path for path in paths.values() if path not in files]:
        raise DataError(f"{uri}: {len(missing)} of {len(paths)} images are not in {folder}: {first_ten(missing)}")
    records, remarks = [], Remarks(uri)
    first_of_path: dict[str, int | str] = {}
    grouped = _by_image(content, uri, images, remarks)
    names = _categories(content, uri)
    if not images:
        raise DataError(f"{uri}: lists no image")
    for number, image in images.items():
        file, source = files[paths[number]], f"{uri}: image {number}"
        if first_of_path.setdefault(paths[number], number) != number:
            remarks.add(_SAME_FILE, f"image {number} ({paths[number]})")
        size = read_size(image.get("height"), image.get("width"), source)
        labels = objects = None
        if grouped is not None:
            annotations = grouped.get(number, [])
            objects = read_objects(annotations, names, size, uri, masks, remarks)
            labels = {names[a["category_id"]] for a in annotations if crowd_makes_label or not is_crowd(a, uri)}
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
        number = field_of(annotation, "image_id", (int, str), name_of(annotation, uri))
        if number not in images:
            raise DataError(f"{name_of(annotation, uri)}: its image_id {number!r} is not among the images")
        own = annotation.get("id")
        first = firsts.setdefault(own, annotation) if isinstance(own, int | str) else annotation
        if first is not annotation:
            remarks.add(_SAME_ID if first != annotation else _TWICE, f"annotation {id_of(annotation)}")
            if first == annotation:
                continue
        grouped.setdefault(number, []).append(annotation)
    return grouped


# --- the format


def _read(source: DatasetSource) -> Dataset:
    return read_coco(
        source.root,
        {split: _uris_of(source, split) for split in source.splits or []},
        classes=source.classes,
        crowd_makes_label=source.crowd_makes_label,
        masks=source.masks,
    )


def _look(source: DatasetSource) -> Look:
    """Reads small files whole, and the beginning of large ones."""
    uris = [_uris_of(source, split)[0] for split in source.splits or []]
    if sum(storage.size(uri) for uri in uris) <= _MOST_BYTES:
        return look_by_reading(_read, source, ", ".join(uris))
    faults = []
    for uri in uris:
        head = storage.read_bytes(uri, length=_HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not head.startswith(b"{"):
            faults.append(f"{uri}: not in COCO's form: it begins with {head[:20]!r}, not with an object")
    return Look(f"the beginning of {', '.join(uris)}", "the rest of what is larger than 32 MB, and the images", faults)


def _uris_of(source: DatasetSource, split: str) -> tuple[str, str]:
    """Returns the URIs of a split's annotations and of its image folder."""
    annotations = source.annotations.get(split, f"annotations/instances_{split}.json")
    return source.uri_of(annotations), source.uri_of(source.image_folders.get(split, split))


def _contents(source: DatasetSource) -> dict[str, Listed | Whole]:
    contents: dict[str, Listed | Whole] = {}
    for split in source.splits or []:
        annotations, folder = _uris_of(source, split)
        contents |= {f"annotations.{split}": Whole(annotations), f"images.{split}": Listed(folder)}
    return contents


def _places(source: DatasetSource) -> dict[str, str]:
    return {f"images.{split}": _uris_of(source, split)[1] for split in source.splits or []}


FORMAT = DatasetFormat(
    "coco",
    "instances json and image folders",
    _read,
    _look,
    contents=_contents,
    places=_places,
    settings=("annotations", "image_folders", "crowd_makes_label"),
    needs_splits=True,
)
