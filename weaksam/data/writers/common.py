"""Common parts of all exports: the exported image, and the comparison with the written files.

An exporter writes images, and reads its own files back with another reader; `compare` checks that the files contain
the exported data. Names: `places`; polygons: `polygons`; formats: the other modules.
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

_SAME_MASK = 0.99  # IoU of a mask read back with the expected mask; coordinates are rounded to a thousandth of a pixel


@dataclass(frozen=True)
class ExportImage:
    """An image and its N boxes, best first; height and width are 0 if unknown."""

    image_id: str
    place: Place
    height: int
    width: int
    boxes: np.ndarray  # (N, 4) float32
    classes: np.ndarray  # (N,) int
    scores: np.ndarray  # (N,) float32
    masks: list[bytes | None]  # COCO compressed counts, never of an empty mask
    uncertainty: float | None = None  # in [0, 1]; None: not requested

    @property
    def has_masks(self) -> bool:
        """Whether any of its boxes has a mask."""
        return any(mask is not None for mask in self.masks)

    def rle(self, counts: bytes) -> Any:
        """Returns compressed counts as an RLE of pycocotools."""
        return {"size": [self.height, self.width], "counts": counts}

    def decode(self, counts: bytes) -> np.ndarray:
        """Decodes compressed counts to (H, W) bool."""
        return coco_mask.decode(self.rle(counts)).astype(bool)


@dataclass(frozen=True)
class ReadBack:
    """The content of an export for one image. None, or NaN in a box: the format cannot store it."""

    boxes: np.ndarray  # (N, 4) float
    classes: list[int]
    scores: np.ndarray | None = None
    masks: list[bytes | None] | None = None
    size: tuple[int, int] | None = None  # height, width


class Exporter(Protocol):
    """Writes a format. `write` gets all images in some order, `read` gets them later in the same order."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Files and folders it creates, below its folder."""
        ...

    @property
    def box_tolerance(self) -> float:
        """Maximum shift of a corner by the format's rounding, in pixels."""
        ...

    @property
    def verified(self) -> str:
        """Description of how the files are read back."""
        ...

    @property
    def files(self) -> int:
        """Number of files written."""
        ...

    @property
    def lost(self) -> Counter[str]:
        """Counts of data that the format cannot store."""
        ...

    def write(self, images: Sequence[ExportImage]) -> None:
        """Writes images, or adds them to the file in memory that `finish` writes."""
        ...

    def finish(self) -> None:
        """Writes the files that need all images."""
        ...

    def read(self, images: Sequence[ExportImage]) -> Iterable[ReadBack]:
        """Reads these images back from the files."""
        ...

    def expected_masks(self, image: ExportImage) -> list[bytes | None]:
        """Returns the masks as the format can store them."""
        ...

    def check_rest(self) -> None:
        """Raises ValueError if the export has more than was read, or other classes."""
        ...


# --- comparison


@dataclass
class ExportTotals:
    """Totals of the data that was read back and verified, and of the losses of masks."""

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
        """Adds a mask and the mask that was read back."""
        self.masks += 1
        self.mask_pixels += int(coco_mask.area(image.rle(mask)))
        self.mask_pixels_written += int(coco_mask.area(image.rle(read_mask))) if read_mask is not None else 0
        self.iou_sum += overlap
        if overlap < self.worst_iou:
            self.worst_iou, self.worst_image = overlap, image.image_id


def iou(image: ExportImage, mask: bytes | None, other: bytes | None) -> float:
    """Returns the IoU of two masks of an image; None is an empty mask."""
    if mask == other:
        return 1.0
    if mask is None or other is None:
        return 0.0
    return float(np.asarray(coco_mask.iou([image.rle(mask)], [image.rle(other)], [0]))[0, 0])


def compare(image: ExportImage, read_back: ReadBack, exporter: Exporter, tally: ExportTotals) -> None:
    """Verifies an image that was read back, and adds it to `tally`.

    Raises:
        DataError: the data that was read back differs from the image.
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
            expected = expected or exporter.expected_masks(image)  # expensive, and mostly equal to the mask
            if iou(image, expected[position], read_mask) < _SAME_MASK:
                raise differs(f"pixels of mask {position + 1}", read_mask, expected[position])
        if mask is not None:
            tally.add_mask(image, mask, read_mask, overlap)
