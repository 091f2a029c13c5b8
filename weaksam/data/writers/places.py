"""What images and splits are called in an export: numbers, file names, each once and the same in every export."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LONGEST_NAME = 235  # bytes; with an extension and a number it must fit into the 255 that file systems allow
_NO_SPLIT = "all"
_NUMBER = re.compile(r"0|-?[1-9][0-9]*")


@dataclass(frozen=True)
class Place:
    """What an image is called in an export. `number` is its integer id, `name` that of its own files, unique."""

    number: int
    own_id: int | str  # as the dataset writes it
    split: str
    split_name: str  # of the files and folders of the split, unique
    uri: str
    file_name: str  # below the folder that all exported images have in common
    name: str  # without extension
    height: int | None
    width: int | None

    @property
    def picture(self) -> str:
        """`name` with the extension of the image file."""
        _, dot, extension = self.file_name.rpartition("/")[2].rpartition(".")
        return f"{self.name}{dot}{extension}" if dot else self.name


def place_images(
    rows: Iterable[Mapping[str, Any]],
    chosen: Collection[str],
    *,
    keep_spaces: bool = True,
    ids_are_numbers: bool | None = None,
) -> tuple[dict[str, Place], str]:
    """Names and numbers of the images to be exported, and the folder they have in common.

    An id that is a number in the dataset is its own number, and so is one of digits, with or without leading zeros,
    when all ids of the dataset are of that kind; else images are numbered from 1 in the order of their ids, those that
    are not exported too: the numbers of two exports of a dataset agree.

    Args:
        rows: of the `images` table, all of them.
        chosen: ids to be exported.
        keep_spaces: whether names may have spaces; else they become underscores.
        ids_are_numbers: whether the dataset's own ids are numbers; None: they are when all look like it.
    """
    rows = sorted(rows, key=lambda row: row["image_id"])
    if ids_are_numbers is None:
        ids_are_numbers = all(_NUMBER.fullmatch(row["image_id"]) for row in rows)
    numbers = _numbers([row["image_id"] for row in rows], ids_are_numbers)
    splits = _split_names({row["split"] or _NO_SPLIT for row in rows})
    rows = [row for row in rows if row["image_id"] in chosen]
    folders = [row["uri"].split("/")[:-1] for row in rows]
    common = _common_start(min(folders), max(folders)) if folders else []
    paths = {row["image_id"]: "/".join(row["uri"].split("/")[len(common) :]) for row in rows}
    names = _names(paths, keep_spaces=keep_spaces)
    places = {}
    for row in rows:
        image_id = row["image_id"]
        split = row["split"] or _NO_SPLIT
        places[image_id] = Place(
            number=numbers[image_id],
            own_id=int(image_id) if ids_are_numbers else image_id,
            split=split,
            split_name=splits[split],
            file_name=paths[image_id],
            name=names[image_id],
            **{key: row[key] for key in ("uri", "height", "width")},
        )
    return places, "/".join(common)


def _numbers(image_ids: Sequence[str], ids_are_numbers: bool) -> dict[str, int]:
    """Number by image id; `image_ids` are sorted."""
    if ids_are_numbers:
        return {image_id: int(image_id) for image_id in image_ids}
    if all(image_id.isascii() and image_id.isdigit() and len(image_id) <= 15 for image_id in image_ids):
        numbers = [int(image_id) for image_id in image_ids]
        if len(set(numbers)) == len(numbers):
            return dict(zip(image_ids, numbers, strict=True))
    return {image_id: number for number, image_id in enumerate(image_ids, start=1)}


def _common_start(first: Sequence[str], last: Sequence[str]) -> list[str]:
    """What two lists start with; of the first and last of many in order this is what all start with."""
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return list(first[:length])


def _split_names(splits: Collection[str]) -> dict[str, str]:
    """A name for the files and folders of each split, unique and below the folder of the export."""
    cleaned = {split: re.sub(r"^\.+|[/\x00-\x1f\x7f-\x9f]", "_", split) for split in sorted(splits)}
    # a split that keeps its name comes first, so that no other takes it
    return _unique(dict(sorted(cleaned.items(), key=lambda item: item[0] != item[1])))


def _names(paths: Mapping[str, str], *, keep_spaces: bool) -> dict[str, str]:
    """File names without folder and extension, unique and short enough for any extension.

    Where files of two folders have one name, all names have their folders in them; files that differ in their
    extension alone have it in the name, as a_jpg and a_png; what is still the same gets numbers.
    """

    def clean(path: str) -> str:
        path = path.replace("/", "_")
        return path if keep_spaces else re.sub(r"\s", "_", path)

    stems = {i: re.sub(r"(?<=[^/])\.[^./]*$", "", path) for i, path in paths.items()}
    names = {i: clean(stem.rpartition("/")[2]) for i, stem in stems.items()}
    if len(set(names.values())) < len(set(stems.values())):
        names = {i: clean(stem) for i, stem in stems.items()}
    counts = Counter(names.values())
    for i, path in paths.items():
        if counts[names[i]] > 1:
            names[i] = clean(names[i] + path[len(stems[i]) :].replace(".", "_"))
    return _unique(names)


def _unique(names: Mapping[str, str]) -> dict[str, str]:
    """`names` short enough for any extension, each once: the second of a name gets a number, in the order of names."""
    taken: dict[str, str] = {}
    for key, name in names.items():
        short, number = _shortened(name), 1
        while (unique := short if number == 1 else f"{short}_{number}") in taken:
            number += 1
        taken[unique] = key
    return {key: name for name, key in taken.items()}


def _shortened(name: str) -> str:
    """A name of at most `_LONGEST_NAME` bytes; a longer one ends with a hash of all of it."""
    data = name.encode()
    if len(data) <= _LONGEST_NAME:
        return name
    return data[: _LONGEST_NAME - 9].decode(errors="ignore") + "_" + hashlib.sha256(data).hexdigest()[:8]


def picture_list(pictures: Iterable[tuple[str, str]]) -> bytes:
    """CSV of where each image file must lie for an export to be used, and the URI where it lies now."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([("file", "uri"), *pictures])
    return stream.getvalue().encode()
