"""The result type of all readers, and their common checks.

A reader creates one `ImageRecord` per image, with class names, and `make_dataset` converts the records to tables.
Axis legend: N boxes of an image.
"""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa

from weaksam.core import schemas, tables
from weaksam.core.storage import FileInfo
from weaksam.data.images import read_sizes
from weaksam.errors import DataError

logger = logging.getLogger(__name__)

# Signature of the builtin `map`: a function and its inputs; results in the same order.
MapFiles = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]

_READ_THREADS = 32  # reads from object storage mostly wait
# Exports write names into XML and lines of text; with invisible characters two names could look the same.
_CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff"
_UNSEEN = r"\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
_UNWRITABLE = re.compile(f"[{_CONTROL}{_UNSEEN}]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # JSON can hold half of a character, tables cannot

_REPEATED = "images have an object twice, of the same class and box, and both count (were annotations written twice?)"
_ALIKE = "classes differ in capital letters alone and are different classes"
_NO_NAME = "classes are named as programs write an empty cell or a list (are they labels?)"
_EMPTY_OR_LIST = re.compile(r"nan|none|null|<na>|[\[({].*[\])}]", re.IGNORECASE)


@dataclass(frozen=True)
class Dataset:
    """A dataset as tables.

    Attributes:
        class_names: names by 0-based class id.
        images: rows of `schemas.IMAGES`, split after split, in the order of the dataset's own lists.
        ground_truth: rows of `schemas.GROUND_TRUTH`, one per annotated image (N may be 0); None if the dataset has
            no boxes.
        category_ids: the dataset's own ids of the classes, in the order of `class_names`; None: it has none.
        ids_are_numbers: whether the dataset's own image ids are numbers, not texts; None: unknown or mixed.
    """

    class_names: list[str]
    images: pa.Table
    ground_truth: pa.Table | None
    category_ids: list[int] | None = None
    ids_are_numbers: bool | None = None


@dataclass(frozen=True)
class Objects:
    """The annotated objects of one image; all of length N."""

    names: list[str]
    boxes: np.ndarray  # (N, 4) float32, 0-based xyxy, right and bottom exclusive
    difficult: list[bool]
    crowd: list[bool]
    masks: list[bytes | None]  # COCO compressed counts
    areas: list[float] | None = None  # from the dataset, square pixels


@dataclass(frozen=True)
class ImageRecord:
    """An image with class names instead of ids; `source` is the file or line to check if it has a fault."""

    image_id: str
    uri: str
    split: str
    num_bytes: int
    labels: Collection[str] | None  # None: not annotated
    source: str
    height: int | None = None
    width: int | None = None
    objects: Objects | None = field(default=None, repr=False)  # None: no boxes known


def sample_dataset(dataset: Dataset, count: int) -> Dataset:
    """Returns a deterministic sample with at most `count` images of each split, in their order.

    Images are chosen by a hash of their ids. Each class in the labels of a split keeps at least one image, as far as
    `count` allows, the rarest classes first.
    """
    places: dict[str, list[int]] = {}
    for row, split in enumerate(dataset.images.column("split").to_pylist()):
        places.setdefault(split, []).append(row)
    ids, labels = (dataset.images.column(name).to_pylist() for name in ("image_id", "labels"))
    order = {row: hashlib.sha256(image_id.encode()).digest() for row, image_id in enumerate(ids)}
    kept: list[int] = []
    for rows in places.values():
        rows.sort(key=order.__getitem__)
        kept += _with_every_class({row: labels[row] or () for row in rows}, count)
    images = dataset.images.take(pa.array(sorted(kept), pa.int64()))
    truth = dataset.ground_truth
    if truth is not None:
        truth = tables.with_ids(truth, images.column("image_id").to_pylist())
    return replace(dataset, images=images, ground_truth=truth)


def _with_every_class(labels: dict[int, Collection[int]], count: int) -> list[int]:
    """Returns `count` rows: first a row for each class not yet covered, the rarest first, then the others in order."""
    frequency = Counter(label for present in labels.values() for label in present)
    chosen: dict[int, None] = {}
    covered: set[int] = set()
    for label in sorted(frequency, key=lambda key: (frequency[key], key)):
        if label not in covered:
            row = next(row for row, present in labels.items() if label in present)
            chosen[row] = None
            covered.update(labels[row])
    chosen |= dict.fromkeys(labels)
    return list(chosen)[:count]


def make_dataset(images: Sequence[ImageRecord], class_names: Sequence[str]) -> Dataset:
    """Converts `images` to tables.

    Raises:
        DataError: no image, an image id that is repeated or not UTF-8, a class that is not in `class_names`, a name
            that `class_list` rejects, or the name of a split that no export can write.
    """
    if not images:
        raise DataError("the dataset: lists no image")
    class_names = class_list(class_names)
    _check_splits(dict.fromkeys(image.split for image in images))
    check_unique([image.image_id for image in images], "the dataset", "image id")
    if bad := [repr(image.image_id) for image in images if _SURROGATE.search(image.image_id)]:
        raise DataError(f"the dataset: image ids that are not UTF-8: {first_ten(bad)}: give these images other ids")
    ids = {name: index for index, name in enumerate(class_names)}
    rows, truths, repeated = [], [], []
    for image in images:
        labels = None if image.labels is None else sorted({_class_id(name, ids, image) for name in image.labels})
        rows.append(
            {
                "image_id": image.image_id,
                "uri": image.uri,
                "height": image.height,
                "width": image.width,
                "split": image.split,
                "labels": labels,
                "bytes": image.num_bytes,
            }
        )
        if image.objects is not None:
            if _has_repeated(image.objects):
                repeated.append(image.source)
            truth = {f.name: getattr(image.objects, f.name) for f in fields(Objects)}
            classes = [_class_id(name, ids, image) for name in truth.pop("names")]
            truths.append(truth | {"image_id": image.image_id, "classes": classes, "boxes": truth["boxes"].tolist()})
    _warn_of_names(class_names)
    warn_of("the dataset", _REPEATED, repeated)
    table = schemas.to_table(truths, schemas.GROUND_TRUTH) if truths else None
    return Dataset(list(class_names), schemas.to_table(rows, schemas.IMAGES), table)


def _has_repeated(objects: Objects) -> bool:
    """Whether two objects have the same class, box and mask."""
    keys = zip(objects.names, map(tuple, objects.boxes.tolist()), objects.masks, strict=True)
    return len(set(keys)) < len(objects.names)


def _warn_of_names(class_names: Sequence[str]) -> None:
    forms = Counter(name.casefold() for name in class_names)
    warn_of("the list of classes", _ALIKE, [name for name in class_names if forms[name.casefold()] > 1])
    warn_of("the list of classes", _NO_NAME, [name for name in class_names if _EMPTY_OR_LIST.fullmatch(name)])


def keep_splits(records: Sequence[ImageRecord], splits: Sequence[str] | None, root: str) -> list[ImageRecord]:
    """Returns the records of `splits` in their order; None: of all splits, sorted.

    Raises:
        DataError: no record is of a requested split; names `root` and the splits that there are.
    """
    available = sorted({record.split for record in records})
    check_split_names(splits, available, root)
    return [record for split in splits or available for record in records if record.split == split]


def check_split_names(splits: Sequence[str] | None, available: Collection[str], root: str) -> None:
    """Raises DataError that lists the `available` splits if one of `splits` is not among them."""
    if unknown := [split for split in splits or () if split not in available]:
        raise DataError(f"{root}: no split {', '.join(unknown)}; there are: {first_ten(sorted(available))}")


def class_list(names: Iterable[str]) -> list[str]:
    """Strips class names and checks them, for all readers.

    Raises:
        DataError: a name is empty, repeated, looks like another, or has characters that XML or text cannot contain.
    """
    names = [name.strip() for name in names]
    check_unique(names, "the list of classes", "class")
    forms = Counter(unicodedata.normalize("NFC", name) for name in names)
    if alike := [ascii(name) for name in names if forms[unicodedata.normalize("NFC", name)] > 1]:
        raise DataError(
            f"the list of classes: {first_ten(alike)}: the same letters as different characters of Unicode: write them "
            "in one way"
        )
    if bad := [repr(name) for name in names if not name or _UNWRITABLE.search(name)]:
        raise DataError(
            f"the list of classes: {first_ten(bad)}: a name needs letters, and no control characters or unseen ones"
        )
    return names


def _check_splits(splits: Collection[str]) -> None:
    """Raises DataError if a split cannot be a file name: exports have a file or folder for each split."""
    parts = {split: split.split("/") for split in splits}
    if bad := [repr(s) for s in splits if _UNWRITABLE.search(s) or any(not p or p[0] == "." for p in parts[s])]:
        raise DataError(
            f"the splits: {first_ten(bad)}: a name needs letters, no dot before them, and no control characters or "
            "unseen ones"
        )


def _class_id(name: str, ids: dict[str, int], image: ImageRecord) -> int:
    if name not in ids:
        raise DataError(f"{image.source}: class {name!r} is not among the classes {list(ids)}: correct it or add it")
    return ids[name]


def fill_sizes(images: pa.Table) -> pa.Table:
    """Fills null heights and widths from the headers of the files; an unreadable image keeps its nulls.

    Raises:
        StorageError: the storage, not a single image, is at fault.
    """
    heights, widths = images["height"].to_pylist(), images["width"].to_pylist()
    unknown = [i for i, (h, w) in enumerate(zip(heights, widths, strict=True)) if h is None or w is None]
    uris = images["uri"].take(pa.array(unknown, pa.int64())).to_pylist()
    for i, size in zip(unknown, read_sizes(uris), strict=True):
        heights[i], widths[i] = size or (None, None)
    for name, values in (("height", heights), ("width", widths)):
        column = images.schema.get_field_index(name)
        images = images.set_column(column, images.schema.field(name), pa.array(values, pa.int32()))
    return images


def by_stem(files: Sequence[FileInfo], extensions: tuple[str, ...]) -> dict[str, FileInfo]:
    """Returns the files with one of `extensions` (any case), by their path without the extension.

    Raises:
        DataError: two files differ only in the extension, so their annotation is ambiguous.
    """
    file_of_stem: dict[str, FileInfo] = {}
    for file in files:
        stem, dot, extension = file.path.rpartition(".")
        if dot + extension.lower() not in extensions:
            continue
        if stem in file_of_stem:
            raise DataError(f"{file.uri} and {file_of_stem[stem].uri}: two files of one image: remove one")
        file_of_stem[stem] = file
    return file_of_stem


def map_in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
    """`map` in a thread pool, for reading many small files; the default of every reader's `map_files`."""
    with ThreadPoolExecutor(max_workers=_READ_THREADS) as pool:
        yield from pool.map(function, items)


def check_unique(values: Sequence[str], where: str, what: str) -> None:
    """Raises DataError naming the first ten of `values` that occur more than once."""
    known: set[str] = set()
    twice = dict.fromkeys(value for value in values if value in known or known.add(value))
    if twice:
        raise DataError(f"{where}: {len(twice)} {what}(s) occur more than once: {first_ten(twice)}")


def warn_of(where: str, problem: str, entries: Collection[str]) -> None:
    """Logs `problem` once, with the number of `entries` and the first ten; logs nothing without entries."""
    if entries:
        logger.warning("%s: %d %s: %s", where, len(entries), problem, first_ten(entries))


def first_ten(entries: Collection[str]) -> str:
    """Returns the first ten of `entries` as text, and the number of others."""
    more = f" and {len(entries) - 10} more" if len(entries) > 10 else ""
    return ", ".join(list(entries)[:10]) + more
