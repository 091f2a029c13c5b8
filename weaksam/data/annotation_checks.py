"""Checks boxes and masks from outside: annotations of datasets, results of other programs, reviews.

Impossible values (NaN, a run length below 0, a polygon far from its image) raise a DataError that names file and entry,
before pycocotools allocates memory for them. A box partly outside its image is clipped, a box without area is left
out: `Remarks` counts both and logs one warning per kind, with the first ten entries.
`where` is always file and entry, such as `<uri>: annotation 7`.
Boxes are xyxy, absolute pixels, right and bottom exclusive. Masks are COCO compressed counts (bytes).
Axis legend: N boxes, K corners of a polygon, R runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from weaksam.data.remarks import EMPTY_MASK, FEW_CORNERS, Remarks
from weaksam.errors import DataError
from weaksam.ops.box_areas import has_area
from weaksam.ops.rle import rle_to_runs, runs_to_rle

Size = tuple[int, int]  # height, width


MAX_SIDE = 1_000_000  # pixels; five times the largest slide scans
_MAX_PIXELS = 2**32 - 1  # of a mask: pycocotools counts pixels in 32 bits
_OUTSIDE_TOLERANCE = 1.0  # pixels; caused by rounding and 0-based exports; a wrong image size exceeds it
_POLYGON_REACH = 4  # sides of the image; memory of pycocotools grows with the length of a polygon
_NUMBER_DIGITS = 7  # of compressed counts, 5 bits each: 32 bits need no more
_EXCERPT = 80  # characters of a value in a message
_MAX_NUMBER = float(np.finfo(np.float32).max)  # tables hold float32


def excerpt(value: Any) -> str:
    """Returns `value` as text for a message, truncated."""
    text = str(value) if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= _EXCERPT else text[:_EXCERPT] + " ..."


# --- numbers


def as_number(value: Any) -> float | None:
    """Converts a number or its text to a float in the range of float32; None for anything else, NaN and inf too."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= _MAX_NUMBER else None  # False for NaN


def read_size(height: Any, width: Any, where: str) -> Size | None:
    """Parses the size of an image from numbers or text; None (unknown) if a side is missing, empty or not above 0.

    Raises:
        DataError: a side is not a whole number of pixels, or exceeds `MAX_SIDE`.
    """
    sides = []
    for key, value in (("height", height), ("width", width)):
        number = 0.0 if value is None or value == "" else as_number(value)
        if number is None or number % 1 or number > MAX_SIDE:
            raise DataError(
                f"{where}: its {key} must be a whole number of pixels up to {MAX_SIDE}, got {excerpt(value)}"
            )
        sides.append(int(number))
    return (sides[0], sides[1]) if min(sides) > 0 else None


# --- boxes


def read_xywh(value: Any, where: str) -> list[float]:
    """Converts (x, y, width, height) to xyxy; area and position are checked by `fit_boxes`.

    Raises:
        DataError: the value is not four finite numbers.
    """
    is_plain = isinstance(value, list | tuple) and len(value) == 4 and not any(isinstance(item, str) for item in value)
    numbers = [as_number(item) for item in value] if is_plain else [None]
    if None in numbers:
        raise DataError(f"{where}: its bbox must be 4 finite numbers (x, y, width, height), got {excerpt(value)}")
    left, top, width, height = numbers
    return [left, top, left + width, top + height]  # type: ignore[operator]  (None is refused above)


def fit_boxes(boxes: np.ndarray, size: Size | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clips boxes to the image.

    Args:
        boxes: (N, 4) float64 xyxy, 0-based, right and bottom exclusive.
        size: (height, width) of the image; None: unknown, boxes are clipped at the left and top border only.

    Returns:
        boxes: (N, 4) float32, finite.
        has_area: (N,) bool; False for a box without area inside the image.
        is_outside: (N,) bool; True for a box that extended more than a pixel beyond the image.

    Raises:
        ValueError: a coordinate is NaN.
    """
    if np.isnan(boxes).any():
        raise ValueError(f"boxes must not have NaN, got {boxes[np.isnan(boxes).any(axis=1)].tolist()}")
    height, width = size or (MAX_SIDE, MAX_SIDE)
    limits = np.array([width, height, width, height])
    cut = np.clip(boxes, 0, limits)
    is_outside = np.abs(boxes - cut).max(axis=1, initial=0) > _OUTSIDE_TOLERANCE
    cut = cut.astype(np.float32)
    return cut, has_area(cut), is_outside


# --- masks


def read_segmentation(
    value: Any, size: Size | None, where: str, remarks: Remarks, entry: str
) -> tuple[list[float] | None, bytes | None, Size | None]:
    """Parses a segmentation of COCO: polygons or RLE, compressed or not.

    Args:
        value: the segmentation; null or empty: no segmentation.
        size: size of its image; None: unknown.
        where: file and entry.
        remarks: collects polygons and masks that are left out.
        entry: the entry, for `remarks`.

    Returns:
        the bounding box, xyxy; the mask, None if the size is unknown or the mask is empty; the size of the mask.

    Raises:
        DataError: the value is neither polygons nor RLE, is damaged, or has another size than the image.
    """
    if not value:
        return None, None, None
    if isinstance(value, Mapping):
        mask, size = read_rle(value, size, where)
        if _is_empty(mask, size):
            remarks.add(EMPTY_MASK, entry)
            return None, None, size
        left, top, width, height = coco_mask.toBbox({"size": list(size), "counts": mask}).tolist()  # type: ignore[arg-type]
        return [left, top, left + width, top + height], mask, size
    polygons = read_polygons(value, size, where)
    whole = [polygon for polygon in polygons if len(polygon) >= 3]
    for _ in range(len(polygons) - len(whole)):
        remarks.add(FEW_CORNERS, entry)
    if not whole:
        return None, None, None
    corners = np.concatenate(whole)
    box = [*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist()]
    mask = None if size is None else fill_polygons(whole, size)
    if mask is not None and size is not None and _is_empty(mask, size):
        remarks.add(EMPTY_MASK, entry)
        mask = None
    return box, mask, size


def _is_empty(mask: bytes, size: Size) -> bool:
    return not coco_mask.area({"size": list(size), "counts": mask})  # type: ignore[arg-type]  (bytes are taken)


def read_polygons(value: Any, size: Size | None, where: str) -> list[np.ndarray]:
    """Parses polygons to (K, 2) float64 each, x then y; K may be less than 3.

    Args:
        value: lists of numbers x, y, x, y ...
        size: size of the image.
        where: file and entry.

    Raises:
        DataError: a value is not a number, the count is odd, or coordinates are far from the image.
    """
    polygons = []
    for part in value if isinstance(value, list) else [None]:
        try:
            numbers = np.array(part)
        except ValueError:  # lists in lists, of different lengths
            numbers = np.array(None)
        if numbers.ndim != 1 or numbers.dtype.kind not in "iuf" or not np.isfinite(numbers).all():
            raise DataError(f"{where}: its segmentation is neither polygons nor RLE: {excerpt(value)}")
        if len(numbers) % 2:
            raise DataError(
                f"{where}: its polygon has {len(numbers)} numbers, an odd count: one is missing, so x and y are "
                "ambiguous: correct it, or read boxes alone (masks: false)"
            )
        polygon = numbers.astype(np.float64).reshape(-1, 2)
        check_polygon(polygon, size, where)
        polygons.append(polygon)
    return polygons


def check_polygon(polygon: np.ndarray, size: Size | None, where: str) -> None:
    """Raises DataError if (K, 2) corners are so far from their image that drawing them would exhaust memory."""
    height, width = size or (MAX_SIDE, MAX_SIDE)
    reach = np.abs(polygon).max(initial=0)
    if not reach <= _POLYGON_REACH * max(height, width):
        raise DataError(
            f"{where}: its polygon has the coordinate {polygon.flat[np.abs(polygon).argmax()]:.10g}, its image is "
            f"{height} x {width} (height x width): are two numbers joined to one?"
        )
    # Even an outline around every second pixel of the image is shorter.
    length = np.abs(np.diff(polygon, axis=0, append=polygon[:1])).max(axis=1, initial=0).sum()
    if size is not None and length > 64 * (height + width) + 4 * height * width:
        raise DataError(
            f"{where}: its polygon of {len(polygon)} corners is {length:.0f} pixels long, its image is "
            f"{height} x {width} (height x width): correct it, or read boxes alone (masks: false)"
        )


def fill_polygons(polygons: Sequence[np.ndarray], hw: Size) -> bytes:
    """Returns COCO compressed counts of the pixels inside any of the polygons, by pycocotools.

    Args:
        polygons: (K, 2) float each, at least one, K at least 3; run `check_polygon` on untrusted ones before.
        hw: height and width of the image.
    """
    flat: Any = [polygon.astype(np.float64).reshape(-1).tolist() for polygon in polygons]
    merged: Any = coco_mask.merge(coco_mask.frPyObjects(flat, *hw))
    return merged["counts"]


def read_rle(value: Mapping[str, Any], size: Size | None, where: str) -> tuple[bytes, Size]:
    """Returns compressed counts and (height, width) of an RLE of either kind. Only the first run may be empty.

    Raises:
        DataError: the RLE has no size or counts, is damaged, does not cover its size, or does not have `size`.
    """
    stated, counts = value.get("size"), value.get("counts")
    if not isinstance(stated, list | tuple) or len(stated) != 2 or not isinstance(counts, str | bytes | list):
        raise DataError(f"{where}: its segmentation is neither polygons nor RLE: {excerpt(dict(value))}")
    own = read_size(*stated, where=f"{where}: RLE")
    if own is None or (size is not None and own != size):
        image = f", its image of {list(size)}" if size is not None else ""
        raise DataError(f"{where}: its RLE is of size {list(stated)}{image}")
    runs = _listed_runs(counts, where) if isinstance(counts, list) else _written_runs(counts, where)
    covered, pixels = sum(runs.tolist()), own[0] * own[1]
    if covered != pixels:
        raise DataError(f"{where}: its RLE covers {covered} pixels, its image has {pixels}")
    if pixels > _MAX_PIXELS:
        raise DataError(f"{where}: its image has {pixels} pixels, more than a mask can have ({_MAX_PIXELS})")
    if isinstance(counts, list) or not runs[1:].all():
        return _compress(runs), own
    return counts.encode() if isinstance(counts, str) else counts, own


def _listed_runs(counts: list[Any], where: str) -> np.ndarray:
    """Returns the (R,) int64 run lengths of uncompressed counts."""
    runs = np.array(counts) if not any(isinstance(run, list | tuple | bool) for run in counts) else np.array(None)
    if runs.size and (runs.dtype.kind not in "iuf" or not (np.abs(runs) <= _MAX_PIXELS).all() or (runs % 1).any()):
        raise DataError(f"{where}: its RLE has runs that are no whole numbers of pixels: {excerpt(counts)}")
    return _checked(runs.astype(np.int64), counts, where)


def _written_runs(counts: str | bytes, where: str) -> np.ndarray:
    """Returns the (R,) int64 run lengths of compressed counts; rejects counts that cocoapi would read past the end."""
    written = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
    if written[:2] in (b"b'", b'b"'):
        raise DataError(
            f"{where}: its RLE is the text of a Python bytes object ({excerpt(counts)}): write counts.decode() instead "
            "of str(counts)"
        )
    digits = np.frombuffer(written, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((digits & 32) == 0)
    is_whole = len(ends) > 0 and ends[-1] == len(digits) - 1 and np.diff(ends, prepend=-1).max() <= _NUMBER_DIGITS
    if len(digits) and (digits.min() < 0 or digits.max() > 63 or not is_whole):
        raise DataError(f"{where}: its RLE is damaged, these are no compressed counts: {excerpt(counts)}")
    return _checked(rle_to_runs(written), counts, where)


def _checked(runs: np.ndarray, counts: Any, where: str) -> np.ndarray:
    if runs.min(initial=0) < 0:
        raise DataError(f"{where}: its RLE is damaged, it has a run of {runs.min()} pixels: {excerpt(counts)}")
    return runs


def _compress(runs: np.ndarray) -> bytes:
    """Returns compressed counts without inner empty runs: two of them make pycocotools end an overlap too early."""
    nonempty = np.flatnonzero(runs)
    values, runs = nonempty % 2, runs[nonempty]
    starts = np.flatnonzero(np.diff(values, prepend=2))
    joined = np.add.reduceat(runs, starts)
    return runs_to_rle(np.concatenate([[0], joined]) if values[0] else joined)
