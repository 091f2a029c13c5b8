"""Heatmaps from the maps of several views."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from weaksam.ops.cams import fuse_views, snap_to_patches
from weaksam.ops.peaks import find_peaks


def slow_heatmaps(views: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """The slow twin: one view and one map at a time, in double precision."""
    heatmaps = torch.zeros(len(views[0]), *size, dtype=torch.float64)
    for view in views:
        for index in range(len(view)):
            one = view[index].double()[None, None]
            heatmaps[index] += F.interpolate(one, size, mode="bilinear", align_corners=False)[0, 0]
    for index in range(len(heatmaps)):
        low, high = heatmaps[index].min(), heatmaps[index].max()
        heatmaps[index] = (heatmaps[index] - low) / (high - low + 1e-8)
    return heatmaps


def random_views(seed: int, *, num_maps: int = 3) -> list[torch.Tensor]:
    """Two views, one mirrored and brought back, of each of three resolutions."""
    generator = torch.Generator().manual_seed(seed)
    views = []
    for hw in ((5, 7), (4, 6), (6, 8)):
        views.append(torch.rand(num_maps, *hw, generator=generator))
        views.append(torch.rand(num_maps, *hw, generator=generator).flip(-1))
    return views


def test_no_maps():
    assert fuse_views([torch.zeros(0, 3, 4), torch.zeros(0, 2, 5)], (30, 40)).shape == (0, 30, 40)


def test_no_views_are_refused():
    with pytest.raises(ValueError, match="views must hold at least one view, got none"):
        fuse_views([], (3, 4))


def test_views_of_different_numbers_of_maps_are_refused():
    with pytest.raises(ValueError, match=r"same number of maps, got \[2, 3\]"):
        fuse_views([torch.zeros(2, 3, 4), torch.zeros(3, 3, 4)], (6, 8))


@pytest.mark.parametrize("seed", range(5))
def test_fused_views_are_the_slow_ones(seed):
    views = random_views(seed)
    heatmaps = fuse_views(views, (41, 53))
    assert heatmaps.dtype == torch.float32
    torch.testing.assert_close(heatmaps.double(), slow_heatmaps(views, (41, 53)), atol=1e-5, rtol=0)


def test_half_precision_views_are_summed_in_single():
    views = [view.half() for view in random_views(0)]
    expected = slow_heatmaps(views, (41, 53))
    torch.testing.assert_close(fuse_views(views, (41, 53)).double(), expected, atol=1e-5, rtol=0)


def test_views_are_left_as_they_are():
    views = random_views(1)
    copies = [view.clone() for view in views]
    fuse_views(views, (20, 30))
    assert all(torch.equal(view, copy) for view, copy in zip(views, copies, strict=True))


@pytest.mark.parametrize("value", [0.0, 0.3, -7.1, 1234.5])
def test_a_constant_map_becomes_0(value):
    varied = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(0))
    views = [torch.cat([torch.full((1, 4, 6), value), varied]), torch.full((2, 5, 7), value / 3)]
    heatmaps = fuse_views(views, (41, 53))
    assert heatmaps[0].eq(0).all()
    assert heatmaps[1].min() == 0
    assert heatmaps[1].max() == pytest.approx(1)


@pytest.mark.parametrize(
    ("hw", "scale", "expected"),
    [
        ((375, 500), 1.0, (368, 496)),
        ((375, 500), 0.8, (304, 400)),
        ((375, 500), 1.2, (448, 608)),
        ((1, 9), 1, (16, 16)),
    ],
)
def test_views_are_snapped_to_whole_patches(hw, scale, expected):
    assert snap_to_patches(hw, scale=scale, patch=16) == expected


@given(st.integers(1, 2000), st.integers(1, 2000), st.floats(0.1, 3), st.sampled_from([8, 14, 16]))
def test_a_snapped_side_is_within_half_a_patch_or_one_patch(height, width, scale, patch):
    for side, snapped in zip((height, width), snap_to_patches((height, width), scale=scale, patch=patch), strict=True):
        assert snapped % patch == 0
        assert snapped == patch or abs(snapped - side * scale) <= patch / 2 + 1e-6


def peak_through_view(view_hw: tuple[int, int], y: float, x: float) -> tuple[int, int]:
    """Where a spot at (y, x) of a 375 x 500 image peaks after a view of `view_hw` and its whole patches of 16."""
    ys, xs = torch.arange(375.0)[:, None] + 0.5, torch.arange(500.0)[None] + 0.5
    image = (-((ys - y) ** 2 + (xs - x) ** 2) / (2 * 20**2)).exp()
    view = F.interpolate(image[None, None], view_hw, mode="bilinear", align_corners=False)
    peaks = find_peaks(fuse_views([F.avg_pool2d(view, 16)[0]], (375, 500)), kernel=17, threshold=0.9)
    ((peak_x, peak_y),) = peaks.points.tolist()
    return peak_y, peak_x


@pytest.mark.parametrize("scale", [0.8, 1.0, 1.2])
def test_peaks_of_snapped_views_do_not_drift(scale):
    height, width = snap_to_patches((375, 500), scale=scale, patch=16)
    y, x = 375 * (1 - 1.5 * 16 / height), 500 * (1 - 1.5 * 16 / width)  # middle of the last patch but one
    peak_y, peak_x = peak_through_view((height, width), y, x)
    assert abs(peak_y + 0.5 - y) <= 1
    assert abs(peak_x + 0.5 - x) <= 1


def test_peaks_of_views_that_are_not_snapped_drift():
    # 300 rows hold 18 patches: the map of 288 is stretched over all 375 pixels.
    y = 16.5 * 16 / 0.8
    assert peak_through_view((300, 400), y, 250)[0] - y > 12
