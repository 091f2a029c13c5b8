"""Assigns numbers and file names to images and splits of an export, unique and the same in every export."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LONGEST_NAME = 235  # bytes; with an extension and a number it must fit into the 255 bytes of file systems
_NO_SPLIT = "all"
_NUMBER = re.compile(r"0|-?[1-9][0-9]*")
_UNWRITABLE = re.compile(r"^\.+|[/\x00-\x1f\x7f-\x9f\ufffe\uffff]")  # hidden, or no character of a file name or of XML


@dataclass(frozen=True)
class Place:
    """Names of an image in an export. `number` is its integer id, `name` the unique name of its own files."""

    number: int
    own_id: int | str  # as the dataset writes it
    split: str
    split_name: str  # unique name of the files and folders of the split
    uri: str
    file_name: str  # relative to the common folder of all exported images
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
    """Returns names and numbers of the images to export, and their common folder.

    If ids are numbers in the dataset, or all ids of the dataset consist of digits, an image's number is its id without
    leading zeros. Otherwise all images of the dataset, exported or not, are numbered from 1 in the order of their ids,
    so the numbers of two exports agree.

    Args:
        rows: all rows of the `images` table.
        chosen: ids to export.
        keep_spaces: whether names may have spaces; else they become underscores.
        ids_are_numbers: whether the dataset's own ids are numbers; None: if all of them look like numbers.
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
    """Returns the number of each image id; `image_ids` are sorted."""
    if ids_are_numbers:
        return {image_id: int(image_id) for image_id in image_ids}
    if all(image_id.isascii() and image_id.isdigit() and len(image_id) <= 15 for image_id in image_ids):
        numbers = [int(image_id) for image_id in image_ids]
        if len(set(numbers)) == len(numbers):
            return dict(zip(image_ids, numbers, strict=True))
    return {image_id: number for number, image_id in enumerate(image_ids, start=1)}


def _common_start(first: Sequence[str], last: Sequence[str]) -> list[str]:
    """Returns the common prefix of two lists; for the first and last of sorted lists it is the prefix of all."""
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return list(first[:length])


def _split_names(splits: Collection[str]) -> dict[str, str]:
    """Returns a name for the files and folders of each split, unique and inside the folder of the export."""
    cleaned = {split: _UNWRITABLE.sub("_", split) for split in sorted(splits)}
    # splits with unchanged names come first, so that no other split takes them
    return _unique(dict(sorted(cleaned.items(), key=lambda item: item[0] != item[1])))


def _names(paths: Mapping[str, str], *, keep_spaces: bool) -> dict[str, str]:
    """Returns file names without folder and extension, unique and short enough for any extension.

    If files of two folders have the same name, all names include their folders; files that differ only in their
    extension include it in the name, as a_jpg and a_png; remaining duplicates get numbers.
    """

    def clean(path: str) -> str:
        path = _UNWRITABLE.sub("_", path)
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
    """Returns `names` short enough for any extension and unique: repeated names get numbers, in the order of names."""
    taken: dict[str, str] = {}
    for key, name in names.items():
        short, number = _shortened(name), 1
        while (unique := short if number == 1 else f"{short}_{number}") in taken:
            number += 1
        taken[unique] = key
    return {key: name for name, key in taken.items()}


def _shortened(name: str) -> str:
    """Truncates a name to at most `_LONGEST_NAME` bytes; a truncated name ends with a hash of the full name."""
    data = name.encode()
    if len(data) <= _LONGEST_NAME:
        return name
    return data[: _LONGEST_NAME - 9].decode(errors="ignore") + "_" + hashlib.sha256(data).hexdigest()[:8]


def picture_list(pictures: Iterable[tuple[str, str]]) -> bytes:
    """Returns CSV with the path of each image file that the export needs, and its current URI."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([("file", "uri"), *pictures])
    return stream.getvalue().encode()
