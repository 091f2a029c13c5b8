"""Peaks of heatmaps, and clusters of peaks."""

from __future__ import annotations

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.cluster.vq import ClusterError

from weaksam.ops import peaks as peaks_module
from weaksam.ops.cams import fuse_views
from weaksam.ops.peaks import cluster_peaks, find_peaks, window_max

KERNELS = st.sampled_from([1, 3, 5, 7, 9, 21])
# Few values, exact in single precision: ties and plateaus are the rule.
MAPS = hnp.arrays(
    np.int64, hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=9), elements=st.integers(0, 4)
)
POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=40)


def greatest_nearby(heatmap: list[list[float]], y: int, x: int, kernel: int) -> float:
    """Greatest value in the window around a pixel."""
    radius = kernel // 2
    return max(max(row[max(0, x - radius) : x + radius + 1]) for row in heatmap[max(0, y - radius) : y + radius + 1])


def slow_plateaus(maxima: dict[tuple[int, int], float]) -> list[tuple[int, int]]:
    """The pixel nearest to the mean of every group of equal maxima that touch."""
    left, middles = set(maxima), []
    while left:
        plateau = [left.pop()]
        for y, x in plateau:  # grows while it is walked
            around = {(y + down, x + right) for down in (-1, 0, 1) for right in (-1, 0, 1)} & left
            same = {pixel for pixel in around if maxima[pixel] == maxima[y, x]}
            left -= same
            plateau += sorted(same)
        mean_y, mean_x = (Fraction(sum(side), len(plateau)) for side in zip(*plateau, strict=True))
        middles.append(min(plateau, key=lambda p, y=mean_y, x=mean_x: ((p[0] - y) ** 2 + (p[1] - x) ** 2, p)))
    return middles


def slow_peaks(
    heatmap: list[list[float]], *, kernel: int, threshold: float, max_peaks: int, collapse_plateaus: bool
) -> list[tuple[int, int, float]]:
    """The slow twin: x, y, score of one map's peaks, in the order of the published code."""
    pixels = [(y, x) for y in range(len(heatmap)) for x in range(len(heatmap[0]))]
    maxima = {(y, x): heatmap[y][x] for y, x in pixels if 0 < heatmap[y][x] == greatest_nearby(heatmap, y, x, kernel)}
    candidates = slow_plateaus(maxima) if collapse_plateaus else list(maxima)
    candidates = sorted(candidates, key=lambda pixel: (-maxima[pixel], pixel))[:max_peaks]
    accepted: list[tuple[int, int]] = []
    for y, x in candidates:
        if all(abs(y - other[0]) + abs(x - other[1]) >= (kernel - 1) // 2 for other in accepted):
            accepted.append((y, x))
    return [(x, y, maxima[y, x]) for y, x in accepted if maxima[y, x] >= threshold]


def corner_and_interior() -> torch.Tensor:
    """375 x 500: greatest in a corner of the image, 0.97 at an object inside."""
    patches = torch.zeros(1, 28, 38)
    patches[0, 0, 0], patches[0, 14, 24] = 1.0, 0.97
    return fuse_views([patches], (375, 500))


@pytest.mark.parametrize("collapse", [True, False])
def test_no_maps(collapse):
    peaks = find_peaks(torch.zeros(0, 5, 6), kernel=3, threshold=0.5, collapse_plateaus=collapse)
    assert peaks.points.shape == (0, 2)
    assert [part.dtype for part in (peaks.points, peaks.scores, peaks.maps)] == [np.int32, np.float32, np.int32]
    assert window_max(torch.zeros(0, 5, 6), 3).shape == (0, 5, 6)


@pytest.mark.parametrize("collapse", [True, False])
def test_zero_maps_have_no_peaks(collapse):
    peaks = find_peaks(torch.zeros(2, 5, 6), kernel=3, threshold=0.0, collapse_plateaus=collapse)
    assert peaks.points.shape == (0, 2)


@pytest.mark.parametrize("collapse", [True, False])
def test_a_map_of_one_pixel(collapse):
    peaks = find_peaks(torch.full((1, 1, 1), 0.9375), kernel=129, threshold=0.9, collapse_plateaus=collapse)
    assert (peaks.points.tolist(), peaks.scores.tolist(), peaks.maps.tolist()) == ([[0, 0]], [0.9375], [0])


def test_a_constant_map_is_one_plateau():
    peaks = find_peaks(torch.ones(2, 375, 500), kernel=17, threshold=0.9)
    assert peaks.points.tolist() == [[249, 187], [249, 187]]  # the mean is at x 249.5, y 187
    assert peaks.maps.tolist() == [0, 1]


@given(MAPS, KERNELS)
def test_window_max_is_max_pool(maps, kernel):
    given_maps = torch.from_numpy(maps).float() / 4
    assert torch.equal(window_max(given_maps, kernel), F.max_pool2d(given_maps, kernel, 1, kernel // 2))


@pytest.mark.parametrize(("hw", "kernel"), [((60, 70), 17), ((60, 70), 33), ((40, 90), 129), ((1, 1), 129)])
def test_window_max_of_large_windows_is_max_pool(hw, kernel):
    maps = torch.randn(3, *hw, generator=torch.Generator().manual_seed(0))
    assert torch.equal(window_max(maps, kernel), F.max_pool2d(maps, kernel, 1, kernel // 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peaks_are_the_same_on_a_gpu():
    maps = torch.rand(6, 37, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(window_max(maps.cuda(), 17).cpu(), window_max(maps, 17))
    ours, theirs = (find_peaks(given_maps, kernel=9, threshold=0.5) for given_maps in (maps, maps.cuda()))
    np.testing.assert_array_equal(ours.points, theirs.points)
    np.testing.assert_array_equal(ours.scores, theirs.scores)


@pytest.mark.parametrize("kernel", [0, 4, -3])
def test_windows_without_a_middle_are_refused(kernel):
    with pytest.raises(ValueError, match=f"kernel must be odd and positive, got {kernel}"):
        find_peaks(torch.zeros(1, 3, 3), kernel=kernel, threshold=0.5)


def test_a_single_map_without_its_axis_is_refused():
    with pytest.raises(ValueError, match=r"heatmaps must be \(K, H, W\), got shape \(3, 4\)"):
        find_peaks(torch.zeros(3, 4), kernel=3, threshold=0.5)


@given(MAPS, KERNELS, st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([1, 3, 25]), st.booleans())
def test_peaks_are_the_slow_ones(maps, kernel, threshold, max_peaks, collapse):
    arguments = {"kernel": kernel, "threshold": threshold, "max_peaks": max_peaks, "collapse_plateaus": collapse}
    found = find_peaks(torch.from_numpy(maps).float() / 4, **arguments)
    expected = [
        (index, *peak) for index, heatmap in enumerate(maps / 4) for peak in slow_peaks(heatmap.tolist(), **arguments)
    ]
    rows = zip(found.maps.tolist(), *found.points.T.tolist(), found.scores.tolist(), strict=True)
    assert list(rows) == expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("collapse", [True, False])
def test_peaks_of_larger_maps_are_the_slow_ones(seed, collapse):
    heatmap = np.random.default_rng(seed).integers(0, 17, (24, 30)) // 4 / 4
    arguments = {"kernel": 3, "threshold": 0.5, "max_peaks": 25, "collapse_plateaus": collapse}
    found = find_peaks(torch.from_numpy(heatmap)[None], **arguments)
    expected = slow_peaks(heatmap.tolist(), **arguments)
    assert list(zip(*found.points.T.tolist(), found.scores.tolist(), strict=True)) == expected
    assert len(expected) > 3


def test_a_plateau_in_a_corner_does_not_hide_other_objects():
    """The published code looks at the 25 first of 49 tied pixels and at nothing else."""
    heatmaps = corner_and_interior()
    assert (heatmaps == heatmaps.max()).sum() == 49
    collapsed = find_peaks(heatmaps, kernel=17, threshold=0.9)
    assert collapsed.points[0].tolist() == [3, 3]
    assert abs(collapsed.points[1] - [322, 194]).max() <= 1  # middle of patch 24, 14
    published = find_peaks(heatmaps, kernel=17, threshold=0.9, collapse_plateaus=False)
    assert (published.points < 8).all()


def test_equal_neighbours_on_the_next_line_or_map_are_other_plateaus():
    heatmaps = torch.zeros(2, 3, 5)
    heatmaps[0, 0, 4] = heatmaps[0, 1, 0] = heatmaps[0, 2, 4] = heatmaps[1, 0, 0] = 1.0
    peaks = find_peaks(heatmaps, kernel=3, threshold=0.5)
    assert peaks.points.tolist() == [[4, 0], [0, 1], [4, 2], [0, 0]]
    assert peaks.maps.tolist() == [0, 0, 0, 1]


def test_no_peaks_no_clusters():
    points, scores, groups = cluster_peaks(np.zeros((0, 2), np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    assert (points.shape, scores.shape, groups.shape) == ((0, 2), (0,), (0,))
    assert [part.dtype for part in (points, scores, groups)] == [np.float32, np.float32, np.int32]


def test_fewer_peaks_than_a_cluster_give_one_point():
    points = np.array([[10, 10], [20, 10], [14, 11]], dtype=np.int32)
    scores, groups = np.array([0.9, 0.95, 1.0], dtype=np.float32), np.array([4, 4, 4])
    member, best, owner = cluster_peaks(points, scores, groups)
    assert (member.tolist(), best.tolist(), owner.tolist()) == ([[14, 11]], [1.0], [4])
    mean, _, _ = cluster_peaks(points, scores, groups, centre="mean")
    assert mean.tolist() == [[14, 10]]  # 14.67 and 10.33, cut


def test_clusters_far_apart_are_found():
    middles = np.array([[20, 20], [200, 30], [60, 300]])
    points = np.concatenate([middles + offset for offset in ([0, 0], [2, 0], [-2, 0], [0, 2], [0, -2])])
    scores = np.linspace(0.9, 0.95, 15, dtype=np.float32)
    found, best, _ = cluster_peaks(points, scores, np.zeros(15))
    assert found.tolist() == middles[::-1].tolist()
    assert best.tolist() == scores[:-4:-1].tolist()


def test_groups_share_no_cluster():
    points = np.tile([[50, 50], [52, 50]], (4, 1))
    found, best, groups = cluster_peaks(points, np.arange(8) / 8, np.array([3, 0] * 4))
    assert found.tolist() == [[52, 50], [50, 50]]
    assert groups.tolist() == [0, 3]
    assert best.tolist() == [7 / 8, 6 / 8]
    pooled, _, _ = cluster_peaks(points, np.arange(8) / 8, np.zeros(8), centre="mean")
    assert pooled.tolist() == [[51, 50]]


def test_other_groups_do_not_change_a_groups_clusters():
    generator = np.random.default_rng(0)
    points, scores, groups = generator.integers(0, 400, (90, 2)), generator.random(90), np.arange(90) % 2
    together, _, owners = cluster_peaks(points, scores, groups)
    alone, _, _ = cluster_peaks(points[groups == 1], scores[groups == 1], groups[groups == 1])
    np.testing.assert_array_equal(together[owners == 1], alone)


@given(POINTS, st.integers(1, 6), st.sampled_from(["member", "mean"]))
def test_clusters_of_any_peaks(rows, peaks_per_cluster, centre):
    points, groups = np.array(rows)[:, :2], np.array(rows)[:, 2]
    scores = np.random.default_rng(0).random(len(rows)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, best, owners = cluster_peaks(points, scores, groups, peaks_per_cluster=peaks_per_cluster, centre=centre)
    assert np.isfinite(found).all()
    for group in set(groups.tolist()):
        inside, mine = groups == group, owners == group
        assert 1 <= mine.sum() <= max(1, inside.sum() // peaks_per_cluster)
        assert best[mine].max() == scores[inside].max()
        assert (np.diff(best[mine]) <= 0).all()
        if centre == "member":
            assert set(map(tuple, found[mine].tolist())) <= set(map(tuple, points[inside].tolist()))
    assert sorted(set(groups.tolist())) == sorted(set(owners.tolist()))


def test_a_cluster_that_loses_all_members_is_left_out(monkeypatch):
    real = peaks_module.kmeans2

    def three_at_most(points, count, *args, **options):
        if count > 3:
            raise ClusterError("One of the clusters is empty.")
        return real(points, count, *args, **options)

    monkeypatch.setattr(peaks_module, "kmeans2", three_at_most)
    points = np.random.default_rng(0).integers(0, 400, (60, 2))
    assert len(cluster_peaks(points, np.ones(60), np.zeros(60))[0]) == 3


def test_many_peaks_at_one_place_are_one_cluster():
    found, best, _ = cluster_peaks(np.full((50, 2), 7), np.full(50, 0.5), np.zeros(50))
    assert (found.tolist(), best.tolist()) == ([[7, 7]], [0.5])


def test_clusters_depend_on_the_seed_alone():
    points = np.random.default_rng(1).integers(0, 500, (120, 2))
    before = np.random.get_state()[1].tolist()
    first = cluster_peaks(points, np.ones(120), np.zeros(120))
    assert np.random.get_state()[1].tolist() == before
    np.random.seed(5)
    again = cluster_peaks(points, np.ones(120), np.zeros(120))
    np.testing.assert_array_equal(first[0], again[0])


def test_an_unknown_centre_of_clusters_is_refused() -> None:
    with pytest.raises(ValueError, match="centre must be one of 'member', 'mean', got 'median'"):
        cluster_peaks(np.zeros((3, 2)), np.ones(3), np.zeros(3), centre="median")  # type: ignore[arg-type]
