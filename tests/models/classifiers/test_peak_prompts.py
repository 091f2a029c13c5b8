"""From an image to labels and peaks, on a tiny classifier with random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weaksam.models.classifiers.peak_prompts import (
    KINDS,
    PeakPromptRules,
    PeakRule,
    choose_labels,
    compute_views,
    find_peak_prompts,
    make_heatmaps,
    shrink,
    view_size,
)
from weaksam.models.classifiers.weaktr import WeakTr, WeakTrSize

RULES = PeakPromptRules(
    cross_layers=(0, 1),
    peaks={"coarse": PeakRule(5), "fine": PeakRule(5), "cross": PeakRule(9, cluster="per_class")},
)


@pytest.fixture(scope="module")
def model() -> WeakTr:
    torch.manual_seed(0)
    return WeakTr(4, WeakTrSize(dim=16, depth=2, heads=2, patch=8, grid=4)).eval().requires_grad_(False)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_given_labels_are_the_only_ones_looked_at(model: WeakTr) -> None:
    prompts, heatmaps = find_peak_prompts(model, picture(40, 64), [2, 0, 2], RULES)
    assert prompts.labels.tolist() == [0, 2]
    assert heatmaps["coarse"].shape == heatmaps["fine"].shape == (2, 1, 40, 64)
    assert heatmaps["cross"].shape == (2, 4, 40, 64)
    assert set(prompts.point_labels.tolist()) <= {0, 2}
    assert set(prompts.kinds.tolist()) <= {0, 1, 2}
    assert len(prompts.points) == len(prompts.scores) == len(prompts.kinds) == len(prompts.point_labels) > 0
    assert (prompts.scores >= 0.9).all()
    assert (prompts.points >= 0).all()
    assert (prompts.points < [64, 40]).all()


def test_an_image_known_to_hold_nothing_has_no_peaks(model: WeakTr) -> None:
    prompts, heatmaps = find_peak_prompts(model, picture(24, 24), [], RULES)
    assert prompts.labels.tolist() == []
    assert prompts.points.shape == (0, 2)
    assert heatmaps["cross"].shape == (0, 4, 24, 24)


def test_without_labels_the_classifier_is_asked(model: WeakTr) -> None:
    prompts, _ = find_peak_prompts(model, picture(40, 64), None, RULES)
    expected = np.flatnonzero(prompts.probabilities > RULES.label_threshold)
    assert prompts.labels.tolist() == (expected.tolist() or [prompts.probabilities.argmax()])


def test_labels_are_all_above_the_threshold_or_the_likeliest() -> None:
    assert choose_labels(np.array([0.1, 0.5, 0.4]), threshold=0.378).tolist() == [1, 2]
    assert choose_labels(np.array([0.1, 0.2, 0.05]), threshold=0.378).tolist() == [1]


def test_without_any_kind_there_are_no_peaks(model: WeakTr) -> None:
    prompts, heatmaps = find_peak_prompts(model, picture(24, 24), [1], PeakPromptRules(peaks={}))
    assert prompts.points.shape == (0, 2)
    assert heatmaps == {}
    assert prompts.probabilities.shape == (4,)


def test_a_mirrored_image_has_mirrored_heatmaps(model: WeakTr) -> None:
    image = picture(48, 64)
    labels = np.array([1, 3], np.int32)
    one, other = (
        make_heatmaps(compute_views(model, x, RULES), labels, (48, 64)) for x in (image, image[:, ::-1].copy())
    )
    for kind in KINDS:
        torch.testing.assert_close(one[kind], other[kind].flip(-1), rtol=1e-3, atol=1e-3)


def test_each_scale_is_one_forward_of_the_image_and_its_mirror_image(model: WeakTr) -> None:
    sizes = []
    whole = WeakTr.find_maps

    class Counting(WeakTr):
        def find_maps(self, images, *, cross_layers):
            sizes.append(tuple(images.shape))
            return whole(self, images, cross_layers=cross_layers)

    model.__class__ = Counting
    try:
        find_peak_prompts(model, picture(40, 64), [0], RULES)
    finally:
        model.__class__ = WeakTr
    assert sizes == [(2, 3, 40, 64), (2, 3, 32, 48), (2, 3, 48, 80)]


def test_a_large_image_is_shrunk_and_its_peaks_are_in_its_own_pixels(model: WeakTr) -> None:
    rules = PeakPromptRules(scales=(1.0,), max_side=64, peaks={"coarse": PeakRule(5)})
    small = picture(32, 64)
    large = np.repeat(np.repeat(small, 10, 0), 10, 1)
    assert shrink(large, 64).shape == (32, 64, 3)
    assert shrink(small, 64) is small
    prompts, heatmaps = find_peak_prompts(model, large, [1], rules)
    assert heatmaps["coarse"].shape == (1, 1, 32, 64)
    heat = heatmaps["coarse"][0, 0].numpy()
    x, y = (prompts.points[prompts.scores.argmax()] + 0.5) / 10 - 0.5
    assert heat[round(y), round(x)] == pytest.approx(heat.max(), abs=1e-6)  # neighbours may tie for the highest
    assert (x, y) == pytest.approx((round(x), round(y)))


def test_a_one_pixel_image_is_looked_at(model: WeakTr) -> None:
    prompts, heatmaps = find_peak_prompts(model, picture(1, 1), [0], RULES)
    assert heatmaps["fine"].shape == (1, 1, 1, 1)
    assert prompts.points.shape == (0, 2)  # a heatmap of one pixel has no highest place


def test_sides_of_views() -> None:
    assert view_size((375, 500), 1.0, 16, snap=True) == (368, 496)
    assert view_size((375, 500), 0.8, 16, snap=False) == (300, 400)
    assert view_size((3, 500), 0.8, 16, snap=False) == (16, 400)


def test_pooled_clusters_belong_to_no_class(model: WeakTr) -> None:
    rules = PeakPromptRules(cross_layers=(1,), peaks={"cross": PeakRule(9, cluster="pooled", centre="mean")})
    prompts, _ = find_peak_prompts(model, picture(40, 64), [0, 1], rules)
    assert len(prompts.points)
    assert set(prompts.point_labels.tolist()) == {-1}
