"""Finds peaks of heatmaps, the point prompts of SAM, and clusters them.

Source: Algorithm 1 of the WeakSAM paper and its published code, `collapse_plateaus=False` here. Differs from it by
default: a plateau is a single peak. Bilinear resizing is constant outside the outermost patch centres, so a maximum in
a corner of the image has 7 x 7 equal pixels, which use all 25 candidates of the published code: other objects are lost.

Axis legend: K heatmaps, H W pixels, N peaks or candidates, M clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import ClusterError, kmeans2
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

# Right, and the three below; the other four neighbours give the same pairs.
_HALF_NEIGHBOURHOOD = ((0, 1), (1, -1), (1, 0), (1, 1))
_KMEANS_STEPS = 30  # kmeans2 never stops early; groups of a few hundred peaks have converged by then


@dataclass(frozen=True)
class Peaks:
    """Peaks of several heatmaps, sorted by map.

    Attributes:
        points: (N, 2) int32, x then y, pixels.
        scores: (N,) float32, values of the heatmap; descending within a map.
        maps: (N,) int32, index of the heatmap.
    """

    points: np.ndarray
    scores: np.ndarray
    maps: np.ndarray


def window_max(maps: Tensor, kernel: int) -> Tensor:
    """Returns the maximum in a centred window around every pixel, bit-identical to `max_pool2d` with stride 1.

    The window is clipped at the border. Columns, then rows, each with about log2(kernel) maxima of whole maps.

    Args:
        maps: (K, H, W) float.
        kernel: odd side of the window in pixels; may exceed the map.

    Returns:
        (K, H, W) of the same dtype and device.

    Raises:
        ValueError: `kernel` is even or below 1.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd and positive, got {kernel}")
    if maps.device.type != "cpu":
        return _max_along(_max_along(maps, kernel, dim=1), kernel, dim=2)
    pooled = torch.empty_like(maps)
    for index in range(len(maps)):  # a single map fits in the cache: 7 times faster than all at once
        heatmap = maps[index : index + 1]
        pooled[index] = _max_along(_max_along(heatmap, kernel, dim=1), kernel, dim=2)[0]
    return pooled


def _max_along(maps: Tensor, kernel: int, *, dim: int) -> Tensor:
    """Computes `window_max` along one axis: windows of 1, 2, 4, ... pixels, finally two that overlap."""
    length = maps.shape[dim]
    radius = min(kernel // 2, length - 1)
    window = 2 * radius + 1
    padding = (0, 0, radius, radius) if dim == 1 else (radius, radius)
    best = F.pad(maps, padding, value=float("-inf"))
    reach = 1
    while 2 * reach <= window:
        count = best.shape[dim] - reach
        best = torch.maximum(best.narrow(dim, 0, count), best.narrow(dim, reach, count))
        reach *= 2
    return torch.maximum(best.narrow(dim, 0, length), best.narrow(dim, window - reach, length))


def find_peaks(
    heatmaps: Tensor, *, kernel: int, threshold: float, max_peaks: int = 25, collapse_plateaus: bool = True
) -> Peaks:
    """Returns the local maxima of heatmaps that reach `threshold` and have a minimum distance from better ones.

    Candidates of a map are its positive pixels that equal the maximum in their window, best first, ties in row-major
    order. Of the first `max_peaks` candidates, each is accepted if its L1 distance from every accepted one is at least
    (kernel - 1) // 2. An all-zero map has no peaks.

    Args:
        heatmaps: (K, H, W) float, values in [0, 1].
        kernel: odd side of the window, in pixels.
        threshold: minimum value of a peak.
        max_peaks: maximum number of candidates in each map.
        collapse_plateaus: a plateau (equal candidates, connected at edges or corners) is a single candidate, the pixel
            nearest to its mean. False: every pixel is a candidate, as published.

    Returns:
        Peaks by map, then in the order of acceptance.

    Raises:
        ValueError: `heatmaps` is not 3-D, `kernel` is even or `max_peaks` below 1.
    """
    if heatmaps.ndim != 3:
        raise ValueError(f"heatmaps must be (K, H, W), got shape {tuple(heatmaps.shape)}")
    if max_peaks < 1:
        raise ValueError(f"max_peaks must be positive, got {max_peaks}")
    coordinates, scores = _find_candidates(heatmaps.float(), kernel, threshold)
    if collapse_plateaus:
        middles = _nearest_to_mean(coordinates[:, 1:], _label_plateaus(coordinates, scores))
        coordinates, scores = coordinates[middles], scores[middles]
    maps, ys, xs = coordinates.T
    order = np.lexsort((xs, ys, -scores, maps))
    kept = order[_keep_distance(coordinates[order], distance=(kernel - 1) // 2, max_peaks=max_peaks)]
    coordinates = coordinates[kept].astype(np.int32)
    return Peaks(points=coordinates[:, [2, 1]], scores=scores[kept], maps=coordinates[:, 0])


def _find_candidates(heatmaps: Tensor, kernel: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns (N, 3) int64 map, y, x and (N,) float32 values of the local maxima, row-major.

    The published code applies the threshold last; the result is the same, because candidates are sorted.
    """
    is_candidate = (heatmaps == window_max(heatmaps, kernel)) & (heatmaps >= threshold) & (heatmaps > 0)
    coordinates = is_candidate.nonzero()
    return coordinates.cpu().numpy(), heatmaps[tuple(coordinates.T)].cpu().numpy()


def _label_plateaus(coordinates: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns the plateau of each candidate, (N,) 0-based. Candidates are row-major."""
    maps, ys, xs = coordinates.T
    # With an empty row and column, no pixel's neighbour is on the next line or map.
    height, row = int(ys.max(initial=0)) + 2, int(xs.max(initial=0)) + 2
    keys = (maps * height + ys) * row + xs
    pairs = []
    for down, right in _HALF_NEIGHBOURHOOD:
        neighbours = keys + down * row + right
        positions = np.searchsorted(keys, neighbours).clip(max=max(0, len(keys) - 1))
        # Neighbours may differ in value when the window is a single pixel.
        (joined,) = np.nonzero((keys[positions] == neighbours) & (scores[positions] == scores))
        pairs.append(np.stack([joined, positions[joined]]))
    ends = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(ends.shape[1], dtype=bool), (ends[0], ends[1])), shape=(len(keys), len(keys)))
    return connected_components(graph, directed=False)[1]


def _nearest_to_mean(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns (M,) the member nearest to the mean of each cluster 0 to M - 1, the first of ties; none is empty."""
    counts = np.bincount(labels)[:, None]
    sums = np.stack([np.bincount(labels, weights=column) for column in points.T], axis=1)
    # Distances are scaled by the count, so all numbers are whole and ties are exact.
    distances = ((counts[labels] * points - sums[labels]) ** 2).sum(axis=1)
    order = np.lexsort((distances, labels))
    return order[np.searchsorted(labels[order], np.arange(len(counts)))]


def _keep_distance(coordinates: np.ndarray, *, distance: int, max_peaks: int) -> np.ndarray:
    """Returns (M,) indices of candidates that are far enough from all kept ones. Candidates are by map, best first."""
    kept: list[int] = []
    starts = np.unique(coordinates[:, 0], return_index=True)[1].tolist()
    for start, end in pairwise([*starts, len(coordinates)]):
        accepted: list[tuple[int, int]] = []
        nearby = coordinates[start : min(end, start + max_peaks), 1:].tolist()
        for index, (y, x) in enumerate(nearby, start):
            if all(abs(y - other_y) + abs(x - other_x) >= distance for other_y, other_x in accepted):
                accepted.append((y, x))
                kept.append(index)
    return np.array(kept, dtype=np.int64)


def cluster_peaks(
    points: np.ndarray,
    scores: np.ndarray,
    groups: np.ndarray,
    *,
    peaks_per_cluster: int = 5,
    centre: Literal["member", "mean"] = "member",
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns one point for each k-means cluster of the peaks of a group, about `peaks_per_cluster` peaks each.

    A group of N peaks gives at most max(1, N // peaks_per_cluster) points. Without peaks there are no points; the
    published code adds a point at (100, 100). It also pools all classes (groups of zeros) and uses the mean, which can
    lie between two objects; a member cannot.

    Args:
        points: (N, 2) whole numbers, x then y, pixels. N may be 0.
        scores: (N,) float.
        groups: (N,) int; peaks of different groups, such as classes, share no cluster.
        centre: the member nearest to the cluster's mean, or the mean truncated to whole pixels, as published.
        seed: seed of the initial means, used for each group.

    Returns:
        points: (M, 2) float32, by ascending group, then descending score.
        scores: (M,) float32, the maximum of each cluster.
        groups: (M,) int32.

    Raises:
        ValueError: `peaks_per_cluster` is below 1, or `centre` is unknown.
    """
    if centre not in ("member", "mean"):
        raise ValueError(f"centre must be one of 'member', 'mean', got {centre!r}")
    if peaks_per_cluster < 1:
        raise ValueError(f"peaks_per_cluster must be positive, got {peaks_per_cluster}")
    centres, bests, owners = np.zeros((0, 2), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)
    for group in np.unique(groups):
        members = points[groups == group].astype(np.float64)
        labels = _k_means(members, max(1, len(members) // peaks_per_cluster), seed)
        if centre == "member":
            chosen = members[_nearest_to_mean(members, labels)]
        else:
            sums = np.stack([np.bincount(labels, weights=column) for column in members.T], axis=1)
            chosen = np.trunc(sums / np.bincount(labels)[:, None])
        best = np.full(len(chosen), -np.inf, dtype=np.float32)
        np.maximum.at(best, labels, scores[groups == group])
        order = np.argsort(-best, kind="stable")
        centres = np.concatenate([centres, chosen[order].astype(np.float32)])
        bests = np.concatenate([bests, best[order]])
        owners = np.concatenate([owners, np.full(len(order), group, dtype=np.int32)])
    return centres, bests, owners


def _k_means(points: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """Returns the cluster of each point, (N,) 0-based; no cluster is empty."""
    # With at least as many clusters as unique points, kmeans2 would divide by a distance of 0 in its initialisation.
    places, at_place = np.unique(points, axis=0, return_inverse=True)
    if num_clusters >= len(places):
        return at_place.reshape(-1)
    for count in range(num_clusters, 1, -1):
        try:
            start = np.random.default_rng(seed)
            return kmeans2(  # since SciPy 1.15 the name is rng, but 1.12 knows only seed; both take seed
                points,
                count,
                _KMEANS_STEPS,
                minit="++",
                missing="raise",
                seed=start,  # pyright: ignore[reportCallIssue]
            )[1]
        except ClusterError:  # a cluster lost its last member: retry with one fewer
            continue
    return np.zeros(len(points), dtype=np.int64)
