"""What every export shares: an image to be exported, its names, and the comparison with what was written.

An exporter writes images, and reads its own files back with another reader; `compare` then says whether what is there
is what was meant. Formats: export_coco, export_voc, export_yolo, export_label_studio; polygons: export_polygons.
Axis legend: N boxes of an image, H W pixels.
Boxes are xyxy, absolute pixels, right and bottom exclusive.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from pycocotools import mask as coco_mask

from weaksam.errors import DataError

_LONGEST_NAME = 235  # bytes; with an extension and a number it must fit into the 255 that file systems allow
_NO_SPLIT = "all"
_NUMBER = re.compile(r"0|-?[1-9][0-9]*")
_SAME_MASK = 0.99  # IoU of a mask read back with what was meant; coordinates are rounded to a thousandth of a pixel


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


@dataclass(frozen=True)
class ExportImage:
    """One image and its N boxes, best first; height and width are 0 where nobody knows them."""

    image_id: str
    place: Place
    height: int
    width: int
    boxes: np.ndarray  # (N, 4) float32
    classes: np.ndarray  # (N,) int
    scores: np.ndarray  # (N,) float32
    masks: list[bytes | None]  # COCO compressed counts; never of an empty mask
    uncertainty: float | None = None  # in [0, 1]; None: not asked for

    @property
    def has_masks(self) -> bool:
        """Whether any of its boxes has a mask."""
        return any(mask is not None for mask in self.masks)

    def rle(self, counts: bytes) -> Any:
        """Compressed counts in the form pycocotools takes."""
        return {"size": [self.height, self.width], "counts": counts}

    def decode(self, counts: bytes) -> np.ndarray:
        """(H, W) bool."""
        return coco_mask.decode(self.rle(counts)).astype(bool)


@dataclass(frozen=True)
class Found:
    """What a reader finds in an export for one image. None, or NaN in a box: the format has no place for it."""

    boxes: np.ndarray  # (N, 4) float
    classes: list[int]
    scores: np.ndarray | None = None
    masks: list[bytes | None] | None = None
    size: tuple[int, int] | None = None  # height, width


class Exporter(Protocol):
    """Writes one format. `write` gets all images in some order, `read` later the same images in the same order."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Files and folders it makes, below its folder."""
        ...

    @property
    def box_tolerance(self) -> float:
        """How far a corner may move by the format's rounding, pixels."""
        ...

    @property
    def verified(self) -> str:
        """How what was written is read back, in words."""
        ...

    @property
    def files(self) -> int:
        """How many were written."""
        ...

    @property
    def lost(self) -> Counter[str]:
        """What the format has no place for, in numbers."""
        ...

    def write(self, images: Sequence[ExportImage]) -> None:
        """Writes some images, or keeps them in memory in the form of the file that `finish` writes."""
        ...

    def finish(self) -> None:
        """Writes what can only be written when all images are known."""
        ...

    def read(self, images: Sequence[ExportImage]) -> Iterable[Found]:
        """What another reader finds in the files for these images."""
        ...

    def expected_masks(self, image: ExportImage) -> list[bytes | None]:
        """The masks as far as the format can hold them."""
        ...

    def check_rest(self) -> None:
        """Raises ValueError when the export holds more than what was read, or other classes."""
        ...


# --- names


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


# --- comparison


@dataclass
class Tally:
    """What was read back and found to be right, and what masks lost on the way."""

    images: int = 0
    boxes: int = 0
    masks: int = 0
    mask_pixels: int = 0
    mask_pixels_written: int = 0
    iou_sum: float = 0.0
    worst_iou: float = 1.0
    worst_image: str | None = None
    splits: Counter[str] = field(default_factory=Counter)

    def add_mask(self, image: ExportImage, mask: bytes, found: bytes | None, overlap: float) -> None:
        """Notes how much of a mask is there."""
        self.masks += 1
        self.mask_pixels += int(coco_mask.area(image.rle(mask)))
        self.mask_pixels_written += int(coco_mask.area(image.rle(found))) if found is not None else 0
        self.iou_sum += overlap
        if overlap < self.worst_iou:
            self.worst_iou, self.worst_image = overlap, image.image_id


def iou(image: ExportImage, one: bytes | None, other: bytes | None) -> float:
    """IoU of two masks of an image; None is a mask without pixels."""
    if one == other:
        return 1.0
    if one is None or other is None:
        return 0.0
    return float(np.asarray(coco_mask.iou([image.rle(one)], [image.rle(other)], [0]))[0, 0])


def compare(image: ExportImage, found: Found, exporter: Exporter, tally: Tally) -> None:
    """Adds an image to `tally`.

    Raises:
        DataError: what was read back is not what was to be written.
    """

    def differs(what: str, got: Any, wanted: Any) -> DataError:
        return DataError(
            f"image {image.image_id}: read back, its {what} are {got}, but {wanted} was to be written: if another "
            "program writes there, name another folder; if not, this format cannot hold it: take another one"
        )

    if found.size is not None and found.size != (image.height, image.width):
        raise differs("height and width", found.size, (image.height, image.width))
    if found.classes != image.classes.tolist():
        raise differs("classes", found.classes, image.classes.tolist())
    boxes = np.where(np.isnan(found.boxes), image.boxes, found.boxes)
    if np.abs(boxes - image.boxes).max(initial=0) > exporter.box_tolerance:
        raise differs("boxes", found.boxes.tolist(), image.boxes.tolist())
    if found.scores is not None and not np.allclose(found.scores, image.scores, rtol=1e-6, atol=0):
        raise differs("scores", found.scores.tolist(), image.scores.tolist())
    if found.masks is not None:
        _compare_masks(image, found.masks, exporter, tally, differs)
    tally.images += 1
    tally.boxes += len(image.boxes)
    tally.splits[image.place.split] += 1


def _compare_masks(
    image: ExportImage, masks: list[bytes | None], exporter: Exporter, tally: Tally, differs: Any
) -> None:
    expected = None
    for position, (mask, found) in enumerate(zip(image.masks, masks, strict=True)):
        overlap = iou(image, mask, found)
        if overlap < 1:
            expected = expected or exporter.expected_masks(image)  # costly, and mostly the mask itself
            if iou(image, expected[position], found) < _SAME_MASK:
                raise differs(f"pixels of mask {position + 1}", found, expected[position])
        if mask is not None:
            tally.add_mask(image, mask, found, overlap)
