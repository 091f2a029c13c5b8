"""What every export shares: an image to be exported, and the comparison with what was written.

An exporter writes images, and reads its own files back with another reader; `compare` then says whether what is there
is what was meant. Names: `places`; polygons: `polygons`; formats: the other modules.
Axis legend: N boxes of an image, H W pixels.
Boxes are xyxy, absolute pixels, right and bottom exclusive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from pycocotools import mask as coco_mask

from weaksam.data.writers.places import Place
from weaksam.errors import DataError

_SAME_MASK = 0.99  # IoU of a mask read back with what was meant; coordinates are rounded to a thousandth of a pixel


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
class ReadBack:
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

    def read(self, images: Sequence[ExportImage]) -> Iterable[ReadBack]:
        """What another reader finds in the files for these images."""
        ...

    def expected_masks(self, image: ExportImage) -> list[bytes | None]:
        """The masks as far as the format can hold them."""
        ...

    def check_rest(self) -> None:
        """Raises ValueError when the export holds more than what was read, or other classes."""
        ...


# --- comparison


@dataclass
class ExportTotals:
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

    def add_mask(self, image: ExportImage, mask: bytes, read_mask: bytes | None, overlap: float) -> None:
        """Notes how much of a mask is there."""
        self.masks += 1
        self.mask_pixels += int(coco_mask.area(image.rle(mask)))
        self.mask_pixels_written += int(coco_mask.area(image.rle(read_mask))) if read_mask is not None else 0
        self.iou_sum += overlap
        if overlap < self.worst_iou:
            self.worst_iou, self.worst_image = overlap, image.image_id


def iou(image: ExportImage, mask: bytes | None, other: bytes | None) -> float:
    """IoU of two masks of an image; None is a mask without pixels."""
    if mask == other:
        return 1.0
    if mask is None or other is None:
        return 0.0
    return float(np.asarray(coco_mask.iou([image.rle(mask)], [image.rle(other)], [0]))[0, 0])


def compare(image: ExportImage, read_back: ReadBack, exporter: Exporter, tally: ExportTotals) -> None:
    """Adds an image to `tally`.

    Raises:
        DataError: what was read back is not what was to be written.
    """

    def differs(what: str, got: Any, expected: Any) -> DataError:
        return DataError(
            f"image {image.image_id}: read back, its {what} are {got}, but {expected} was to be written: if another "
            "program writes there, name another folder; if not, this format cannot hold it: take another one"
        )

    if read_back.size is not None and read_back.size != (image.height, image.width):
        raise differs("height and width", read_back.size, (image.height, image.width))
    if read_back.classes != image.classes.tolist():
        raise differs("classes", read_back.classes, image.classes.tolist())
    boxes = np.where(np.isnan(read_back.boxes), image.boxes, read_back.boxes)
    if np.abs(boxes - image.boxes).max(initial=0) > exporter.box_tolerance:
        raise differs("boxes", read_back.boxes.tolist(), image.boxes.tolist())
    if read_back.scores is not None and not np.allclose(read_back.scores, image.scores, rtol=1e-6, atol=0):
        raise differs("scores", read_back.scores.tolist(), image.scores.tolist())
    if read_back.masks is not None:
        _compare_masks(image, read_back.masks, exporter, tally, differs)
    tally.images += 1
    tally.boxes += len(image.boxes)
    tally.splits[image.place.split] += 1


def _compare_masks(
    image: ExportImage, masks: list[bytes | None], exporter: Exporter, tally: ExportTotals, differs: Any
) -> None:
    expected = None
    for position, (mask, read_mask) in enumerate(zip(image.masks, masks, strict=True)):
        overlap = iou(image, mask, read_mask)
        if overlap < 1:
            expected = expected or exporter.expected_masks(image)  # costly, and mostly the mask itself
            if iou(image, expected[position], read_mask) < _SAME_MASK:
                raise differs(f"pixels of mask {position + 1}", read_mask, expected[position])
        if mask is not None:
            tally.add_mask(image, mask, read_mask, overlap)
