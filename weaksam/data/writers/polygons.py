"""Converts masks to polygons, and back.

Polygons run along the sides of pixels: their corners are corners of pixels, so pycocotools draws the same pixels,
except holes. (Its `rleFrPoly` includes a pixel if its centre is inside.)
Axis legend: K corners of a polygon, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

from weaksam.data.annotation_checks import fill_polygons
from weaksam.data.writers.common import ExportImage


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Returns the closed lines along the sides of pixels that separate a mask from the background.

    Pixels that share a side belong to the same part; pixels that only touch at a corner do not.

    Args:
        mask: (H, W) bool.

    Returns:
        (K, 2) int64 each, x then y, the corners in order; clockwise on the screen around a part, so `signed_area`
        is positive, and counterclockwise around a hole.
    """
    padded = np.pad(mask, 1)
    stride = mask.shape[1] + 1  # corners of pixels in a row
    # A side of a set pixel whose neighbour is not set, walked with the mask on the right. Its direction is 0 east
    # (the top side), 1 south (right), 2 west (bottom), 3 north (left); (row, column) is where it starts.
    neighbours = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
    starts = ((0, 0), (0, 1), (1, 1), (1, 0))
    sides = []
    for direction, (neighbour, (down, right)) in enumerate(zip(neighbours, starts, strict=True)):
        pixels = np.flatnonzero(mask & ~neighbour)
        # Pixel p in row r starts at corner p + r: a row has one more corner than pixels.
        sides.append((pixels + pixels // mask.shape[1] + down * stride + right) * 4 + direction)
    keys = np.sort(np.concatenate(sides))
    direction = keys % 4
    ends = keys // 4 + np.array([1, stride, -1, -stride])[direction]
    following = np.zeros(len(keys), np.int64)
    for turn in (3, 0, 1):  # left, straight, right: the last existing one wins, so pixels at a corner stay apart
        next_keys = ends * 4 + (direction + turn) % 4
        at = np.minimum(np.searchsorted(keys, next_keys), max(len(keys) - 1, 0))
        following = np.where(keys[at] == next_keys, at, following)
    is_corner = direction[following] != direction
    return [_corners(ends[ring][is_corner[ring]], stride) for ring in _cycles(following.tolist())]


def _cycles(following: list[int]) -> list[list[int]]:
    visited = bytearray(len(following))
    cycles = []
    for first in range(len(following)):
        cycle, at = [], first
        while not visited[at]:
            visited[at] = 1
            cycle.append(at)
            at = following[at]
        if cycle:
            cycles.append(cycle)
    return cycles


def _corners(keys: np.ndarray, stride: int) -> np.ndarray:
    return np.stack([keys % stride, keys // stride], axis=1)


def signed_area(polygon: np.ndarray) -> float:
    """Returns the area of a (K, 2) polygon, negative if it runs counterclockwise on the screen."""
    x, y = polygon.astype(np.float64).T
    return float(x[:-1] @ y[1:] - x[1:] @ y[:-1] + x[-1] * y[0] - x[0] * y[-1]) / 2


def simplify(polygon: np.ndarray, tolerance: float) -> np.ndarray:
    """Removes corners of a polygon that are at most `tolerance` pixels from the simplified polygon (Douglas-Peucker).

    A polygon that would lose its area is returned unchanged.
    """
    if tolerance <= 0:
        return polygon
    closed = np.concatenate([polygon, polygon[:1]]).astype(np.float64)
    keep = np.zeros(len(closed), bool)
    keep[[0, int(np.square(closed - closed[0]).sum(1).argmax()), -1]] = True
    while True:  # all stretches between kept corners at once: each keeps the corner farthest from its chord
        ends = np.flatnonzero(keep)
        stretch = np.minimum(np.searchsorted(ends, np.arange(len(closed)), side="right") - 1, len(ends) - 2)
        distances = _distances(closed, closed[ends[stretch]], closed[ends[stretch + 1]])
        farthest = np.maximum.reduceat(distances, ends[:-1])
        at = np.flatnonzero((distances == farthest[stretch]) & (distances > tolerance))
        if not len(at):
            break
        keep[at[np.unique(stretch[at], return_index=True)[1]]] = True
    kept = polygon[keep[:-1]]
    return kept if len(kept) >= 3 and signed_area(kept) > 0 else polygon


def _distances(points: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns the distance of each of (K, 2) points to its own line segment from start to end."""
    along = ends - starts
    share = np.clip(((points - starts) * along).sum(1) / np.maximum(np.square(along).sum(1), 1e-12), 0, 1)
    return np.sqrt(np.square(points - starts - share[:, None] * along).sum(1))


def to_polygons(image: ExportImage, counts: bytes, tolerance: float = 0.0) -> tuple[list[np.ndarray], int]:
    """Converts the parts of a mask to polygons, the largest first; returns them and the number of filled holes.

    A part inside a hole of another part is omitted: the hole is filled.

    Args:
        image: the image of the mask.
        counts: COCO compressed counts.
        tolerance: pixels; 0 = keep every corner.
    """
    left, top, width, height = (int(value) for value in coco_mask.toBbox(image.rle(counts)))
    window = image.decode(counts)[top : top + height, left : left + width]
    rings = [ring + np.array([left, top]) for ring in outlines(window)]
    areas = np.array([signed_area(ring) for ring in rings])
    parts = [rings[i] for i in np.argsort(-areas, kind="stable") if areas[i] > 0]
    holes = len(rings) - len(parts)
    if holes:
        parts = _outermost(parts)
    return [simplify(part, tolerance) for part in parts], holes


def _outermost(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns the parts that are not inside a hole of another part; `parts` are sorted, largest first."""
    first = np.array([part.min(0) for part in parts]).reshape(-1, 2)
    end = np.array([part.max(0) for part in parts]).reshape(-1, 2)
    kept = []
    for i, part in enumerate(parts):
        x, y = part[np.lexsort((part[:, 0], part[:, 1]))[0]] + 0.5  # middle of its first pixel
        around = np.flatnonzero(((first[:i] < [x, y]) & (end[:i] > [x, y])).all(1)).tolist()
        if not any(_holds(parts[other], x, y) for other in around):
            kept.append(part)
    return kept


def _holds(polygon: np.ndarray, x: float, y: float) -> bool:
    """Whether the centre of a pixel is inside a (K, 2) polygon of sides of pixels."""
    (x1, y1), (x2, y2) = polygon.T, np.roll(polygon, -1, axis=0).T
    crossed = (x1 == x2) & (x1 < x) & ((y1 > y) != (y2 > y))  # vertical sides crossed by a ray to the left
    return bool(crossed.sum() % 2)


def join_polygons(polygons: Sequence[np.ndarray]) -> np.ndarray:
    """Joins polygons to one, by short lines between corners that are traversed in both directions."""
    joined = polygons[0]
    for other in polygons[1:]:
        joined_index = _nearest(joined, other.mean(0))
        other_index = _nearest(other, joined[joined_index])
        round_trip = np.concatenate([other[other_index:], other[: other_index + 1]])
        joined = np.concatenate([joined[: joined_index + 1], round_trip, joined[joined_index:]])
    return joined


def _nearest(points: np.ndarray, point: np.ndarray) -> int:
    return int(np.square(points - point).sum(1).argmin())


def draw_polygons(image: ExportImage, polygons: Sequence[np.ndarray]) -> bytes:
    """Returns COCO compressed counts of the pixels of an image inside any of the polygons."""
    return fill_polygons(polygons, (image.height, image.width))
