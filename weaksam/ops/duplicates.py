"""Groups duplicate images: the same bytes, or pictures that hardly differ.

Candidates are pairs of perceptual hashes that differ in few bits, selected without comparing all pairs (Norouzi et al.,
Fast Exact Search in Hamming Space with Multi-Index Hashing, 2014); then the thumbnails of candidates are compared.
Axis legend: N images, P pixels of a thumbnail, U unique hashes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# Standard deviation in grey levels below which a thumbnail is JPEG noise on a single colour. The minimum of 563 photos
# was 4.3, of 900 drawn scenes 2.9.
_FLAT = 2.0
_PAIRS = 1 << 22  # compared at once: bounds memory
_AT_ONCE = 64  # images whose neighbours are searched at once


@dataclass(frozen=True)
class DuplicateRules:
    """Maximum distances of near duplicates.

    Args:
        max_bits: maximum number of bits in which their hashes differ.
        max_difference: maximum root mean square difference of their thumbnails, each shifted and scaled to mean 0 and
            standard deviation 1: 0 for equal images, 1.4 for unrelated images, 2 for a negative.
    """

    max_bits: int
    max_difference: float


@dataclass(frozen=True)
class DuplicateGroups:
    """Groups of images.

    Args:
        group: (N,) int64, the group of each image, -1 for an image without duplicates; numbered from 0 in the order of
            their first images.
        exact: (G,) bool, whether all images of a group have the same bytes.
    """

    group: np.ndarray
    exact: np.ndarray


def group_duplicates(
    contents: Sequence[str], hashes: np.ndarray, thumbnails: np.ndarray, rules: DuplicateRules
) -> DuplicateGroups:
    """Groups images with equal content and near duplicates, transitively; a group has two or more images.

    A picture of a single colour has no near duplicates, because it has no content to compare.

    Args:
        contents: N digests of the images' bytes.
        hashes: (N,) uint64 perceptual hashes.
        thumbnails: (N, P) uint8, grey.

    Raises:
        ValueError: the arguments differ in length.
    """
    if not len(contents) == len(hashes) == len(thumbnails):
        raise ValueError(
            f"contents, hashes and thumbnails must be of one length, got {len(contents)}, {len(hashes)} and "
            f"{len(thumbnails)}"
        )
    if not len(contents):
        return DuplicateGroups(np.zeros(0, np.int64), np.zeros(0, bool))
    _, first, content = np.unique(np.asarray(contents), return_index=True, return_inverse=True)
    joined = _join_near(hashes[first], thumbnails[first], rules)[content]
    _, start, label, size = np.unique(joined, return_index=True, return_inverse=True, return_counts=True)
    several = np.flatnonzero(size > 1)
    several = several[np.argsort(start[several])]
    number = np.full(len(size), -1)
    number[several] = np.arange(len(several))
    group = number[label]
    member = np.flatnonzero(group >= 0)
    contents_in = np.bincount(np.unique(np.stack([group[member], content[member]]), axis=1)[0], minlength=len(several))
    return DuplicateGroups(group, contents_in == 1)


def _join_near(hashes: np.ndarray, thumbnails: np.ndarray, rules: DuplicateRules) -> np.ndarray:
    """Returns (N,) int labels, equal for near duplicates, transitively."""
    looks = thumbnails.astype(np.float32)
    looks -= looks.mean(axis=1, keepdims=True)
    spread = looks.std(axis=1, keepdims=True)
    looks /= np.maximum(spread, _FLAT)
    labels = np.arange(len(hashes))
    pictures = np.flatnonzero(spread[:, 0] >= _FLAT)
    unique, place = np.unique(hashes[pictures], return_inverse=True)
    candidates = join_close_hashes(unique, rules.max_bits)[place]
    order = np.argsort(candidates, kind="stable")
    bounds = np.flatnonzero(np.diff(candidates[order])) + 1
    for members in np.split(pictures[order], bounds):
        if len(members) > 1:
            labels[members] = members[_grow(hashes[members], looks[members], rules)]
    return labels


def _grow(hashes: np.ndarray, looks: np.ndarray, rules: DuplicateRules) -> np.ndarray:
    """Returns (N,) the index of the first image of each image's group.

    Each group grows from its first image and is only compared with images without a group: N images that are all
    alike cost N comparisons, not N squared.
    """
    labels, rest = np.arange(len(hashes)), np.arange(len(hashes))
    least = 1 - rules.max_difference**2 / 2 - 1e-5  # correlation at this difference, less a margin for rounding
    while len(rest):
        seed, edge, rest = rest[0], rest[:1], rest[1:]
        while len(edge) and len(rest):
            now, edge = edge[:_AT_ONCE], edge[_AT_ONCE:]
            close = np.bitwise_count(hashes[now, None] ^ hashes[rest]) <= rules.max_bits
            near = np.flatnonzero(close.any(axis=0))
            alike = close[:, near] & (looks[now] @ looks[rest[near]].T / looks.shape[1] >= least)
            reached = near[alike.any(axis=0)]
            labels[rest[reached]] = seed
            edge, rest = np.concatenate([edge, rest[reached]]), np.delete(rest, reached)
    return labels


def join_close_hashes(unique: np.ndarray, max_bits: int) -> np.ndarray:
    """Returns the connected components of hashes that differ in at most `max_bits` bits.

    Args:
        unique: (U,) uint64, each once.

    Returns:
        (U,) int labels, equal within a component.
    """
    labels = np.arange(len(unique))
    for first, second in _candidate_pairs(unique, max_bits):
        close = np.bitwise_count(unique[first] ^ unique[second]) <= max_bits
        first, second = labels[first[close]], labels[second[close]]
        new = first != second
        if new.any():
            edges = coo_array((new[new], (first[new], second[new])), shape=(len(unique), len(unique)))
            labels = connected_components(edges, directed=False)[1][labels]
    return labels


def _candidate_pairs(unique: np.ndarray, max_bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields batches of index pairs that include every pair that differs in at most `max_bits` bits.

    At least one quarter b (0 to 3) of such a pair differs in at most (max_bits - b) // 4 bits: otherwise the quarters
    would differ in more than max_bits bits in total.
    """
    quarters = np.ascontiguousarray(unique).view(np.uint16).reshape(-1, 4)
    numbers = np.arange(1 << 16, dtype=np.uint16)
    flipped = np.bitwise_count(numbers)
    for band in range(min(4, max_bits + 1)):
        order = np.argsort(quarters[:, band], kind="stable")
        keys = quarters[order, band]
        ends = np.searchsorted(keys, numbers, side="right")
        starts = np.searchsorted(keys, numbers, side="left")
        for mask in numbers[flipped <= (max_bits - band) // 4]:
            other = keys ^ mask
            begin = starts[other] if mask else np.arange(1, len(keys) + 1)
            count = np.where(keys <= other, ends[other] - begin, 0)  # each pair once
            for first, second in _expand(begin, count):
                yield order[first], order[second]


def _expand(begin: np.ndarray, count: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (i, begin[i]), (i, begin[i] + 1), ... `count[i]` times for every i, in batches of some millions."""
    rows = np.flatnonzero(count)
    total = np.cumsum(count[rows])
    cuts = np.searchsorted(total, np.arange(_PAIRS, total[-1], _PAIRS)) if len(rows) else []
    for block in np.split(rows, cuts):
        number = count[block]
        ahead = np.cumsum(number) - number
        yield np.repeat(block, number), np.arange(number.sum()) + np.repeat(begin[block] - ahead, number)
