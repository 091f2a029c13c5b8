"""Views for a classifier: functions of their seed alone, within the limits of the recipe, each operation as defined."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from weaksam.data import augment
from weaksam.data.augment import (
    IMAGE_MEAN,
    IMAGE_STD,
    augment_for_classification,
    draw_crop,
    normalise,
    resize_for_classification,
)

FILL = [124, 116, 104]  # 255 * IMAGE_MEAN
AS_IT_IS = {"mean": (0, 0, 0), "std": (1 / 255,) * 3}  # pixels keep their values, as float32


def noise(height: int = 48, width: int = 64, *, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (height, width, 3), dtype=np.uint8)


def ramp(height: int = 48, width: int = 64) -> np.ndarray:
    """Red grows to the right, green downwards: a crop tells where it came from."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x, y, np.full_like(x, 77)], -1).astype(np.uint8)


def view(seed: int, *, size: int = 24, **options: object) -> np.ndarray:
    return augment_for_classification(noise(), np.random.default_rng(seed), size=size, **options)


def bicubic(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def test_a_view_is_a_function_of_its_seed() -> None:
    for seed in range(30):
        np.testing.assert_array_equal(view(seed, erase=1.0), view(seed, erase=1.0))
    assert len({view(seed).tobytes() for seed in range(30)}) == 30


def test_the_generators_of_the_process_play_no_part_and_are_left_alone() -> None:
    expected = view(3, erase=1.0)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for seed in range(40):
        view(seed, erase=1.0)
    np.testing.assert_array_equal(view(3, erase=1.0), expected)
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1][1])
    assert np.random.get_state()[2] == before[1][2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_threads_make_the_same_views() -> None:
    alone = [view(seed, erase=0.5) for seed in range(60)]
    start = threading.Barrier(6)

    def work(worker: int) -> list[tuple[int, np.ndarray]]:
        start.wait(30)
        return [(seed, view(seed, erase=0.5)) for seed in np.random.default_rng(worker).permutation(60).tolist()]

    with ThreadPoolExecutor(6) as pool:
        for views in pool.map(work, range(6)):
            for seed, pixels in views:
                np.testing.assert_array_equal(pixels, alone[seed])


def test_the_image_is_not_changed_and_may_be_read_only_or_a_slice() -> None:
    image = noise()
    image.flags.writeable = False
    np.testing.assert_array_equal(augment_for_classification(image, np.random.default_rng(5), size=24), view(5))
    padded = np.zeros((60, 80, 3), np.uint8)
    padded[5:53, 7:71] = image
    part = padded[5:53, 7:71]
    np.testing.assert_array_equal(augment_for_classification(part, np.random.default_rng(5), size=24), view(5))


@pytest.mark.parametrize("hw", [(1, 1), (1, 2), (3, 2), (1, 16_000), (16_000, 1), (7, 900), (300, 200)])
@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_every_shape_gives_a_square_of_finite_floats(hw: tuple[int, int], size: int) -> None:
    image = noise(*hw)
    views = [augment_for_classification(image, np.random.default_rng(seed), size=size, erase=1.0) for seed in range(20)]
    for pixels in [*views, resize_for_classification(image, size=size)]:
        assert pixels.shape == (3, size, size)
        assert pixels.dtype == np.float32
        assert pixels.flags.c_contiguous
        assert np.isfinite(pixels).all()


def test_one_pixel_stays_its_colour() -> None:
    image = np.array([[[10, 20, 30]]], np.uint8)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        pixels = augment_for_classification(image, rng, size=4, rand_augment=0, erase=0, **AS_IT_IS)
        np.testing.assert_allclose(pixels, np.broadcast_to(np.array([10, 20, 30])[:, None, None], (3, 4, 4)), atol=1e-4)
    np.testing.assert_allclose(resize_for_classification(image, size=4, **AS_IT_IS)[:, 3, 0], [10, 20, 30], atol=1e-4)


@pytest.mark.parametrize("hw", [(48, 64), (50, 50), (64, 48), (9, 10)])
def test_without_its_random_parts_it_is_a_plain_resize(hw: tuple[int, int]) -> None:
    image = noise(*hw)
    whole = normalise(bicubic(image, 24), mean=IMAGE_MEAN, std=IMAGE_STD)
    flipped = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        pixels = augment_for_classification(image, rng, size=24, min_scale=1.0, rand_augment=0, erase=0)
        mirrored = not np.array_equal(pixels, whole)
        np.testing.assert_array_equal(pixels, whole[:, :, ::-1] if mirrored else whole)
        flipped += mirrored
    assert 10 <= flipped <= 30


def test_normalise_by_hand() -> None:
    image = np.array([[[0, 255, 51]], [[255, 0, 102]]], np.uint8)
    pixels = normalise(image, mean=(0.5, 0.25, 0.2), std=(0.5, 0.25, 0.1))
    np.testing.assert_allclose(pixels, [[[-1], [1]], [[3], [-1]], [[0], [2]]], atol=1e-6)
    expected = (image / 255 - IMAGE_MEAN) / IMAGE_STD
    np.testing.assert_allclose(normalise(image, mean=IMAGE_MEAN, std=IMAGE_STD), expected.transpose(2, 0, 1), atol=1e-6)


def test_mean_and_std_reach_both_views() -> None:
    for make in (partial(view, 4, erase=0), partial(resize_for_classification, noise(), size=24)):
        np.testing.assert_allclose(
            make(mean=(0.1, 0.2, 0.3), std=(0.5, 2, 1)) * np.array([0.5, 2, 1])[:, None, None],
            make(mean=(0, 0, 0), std=(1, 1, 1)) - np.array([0.1, 0.2, 0.3])[:, None, None],
            atol=1e-6,
        )


@pytest.mark.parametrize("hw", [(300, 300), (300, 600), (200, 100), (80, 120)])
def test_the_evaluation_view_is_the_centre_of_the_image_with_its_shorter_side_at_8_sevenths(hw: tuple) -> None:
    image = noise(*hw)
    height, width = (256 * side // min(hw) for side in hw)
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    y, x = (height - 224) // 2, (width - 224) // 2
    expected = resized[y : y + 224, x : x + 224].transpose(2, 0, 1)
    got = resize_for_classification(image, size=224, **AS_IT_IS)
    assert np.abs(got - expected).max() <= 1.01  # both round to whole numbers; Pillow's boxes are float32
    assert (np.abs(got - expected) > 0.01).mean() < 0.01


def test_a_crop_takes_the_pixels_it_drew() -> None:
    image = ramp()
    for seed in range(60):
        left, top, width, height = draw_crop(np.random.default_rng(seed), 48, 64, 0.08)
        rng = np.random.default_rng(seed)
        pixels = augment_for_classification(image, rng, size=16, rand_augment=0, erase=0, **AS_IT_IS)
        red, green = pixels[0].mean(0), pixels[1].mean(1)
        centres = (np.arange(16) + 0.5) / 16
        expected = left + width * centres - 0.5
        # Half a grey level of rounding; the outermost columns see the border of the image, where the ramp ends.
        np.testing.assert_allclose(np.sort(red)[2:-2], expected[2:-2], atol=0.6)
        np.testing.assert_allclose(green[2:-2], (top + height * centres - 0.5)[2:-2], atol=0.6)


@pytest.mark.parametrize("hw", [(480, 640), (1500, 1000), (40, 40)])
@pytest.mark.parametrize("size", [16, 64])
def test_cutting_before_the_resize_changes_nothing(hw: tuple[int, int], size: int) -> None:
    image = noise(*hw)
    for seed in range(8):
        left, top, width, height = draw_crop(np.random.default_rng(seed), *hw, 0.08)
        rng = np.random.default_rng(seed)
        pixels = augment_for_classification(image, rng, size=size, rand_augment=0, erase=0, **AS_IT_IS)
        box = (left, top, left + width, top + height)
        whole = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))
        whole = whole.transpose(2, 0, 1).astype(float)
        # Boxes are float32 inside Pillow: some values round the other way.
        assert min(np.abs(pixels - whole).max(), np.abs(pixels - whole[:, :, ::-1]).max()) <= 1.01


@pytest.mark.parametrize("min_scale", [0.08, 0.5])
def test_crops_keep_to_their_limits_and_fill_them(min_scale: float) -> None:
    boxes = np.array([draw_crop(np.random.default_rng(seed), 240, 320, min_scale) for seed in range(2000)])
    left, top, width, height = boxes.T
    share, ratio = width * height / (240 * 320), width / height
    assert min_scale - 1e-9 <= share.min() < min_scale + 0.02
    assert 0.97 < share.max() <= 1 + 1e-9
    assert 3 / 4 - 1e-9 <= ratio.min() < 0.76
    assert 1.32 < ratio.max() <= 4 / 3 + 1e-9
    assert left.min() >= 0
    assert top.min() >= 0
    assert (left + width).max() <= 320 + 1e-9
    assert (top + height).max() <= 240 + 1e-9
    room = 320 - width > 20
    assert abs((left[room] / (320 - width[room])).mean() - 0.5) < 0.03


def test_shares_are_uniform_and_ratios_log_uniform_where_every_draw_fits() -> None:
    # At most 0.2 of a square is asked for here, so nothing is ever drawn again.
    sides = [
        augment._draw_sides(np.random.default_rng(seed), 50.0, (0.08, 0.2), (3 / 4, 4 / 3)) for seed in range(4000)
    ]
    width, height = np.array(sides).T
    share = np.sort((width * height / 50 - 0.08) / 0.12)
    shape = np.sort(np.log(width / height) / np.log(16 / 9) + 0.5)
    uniform = (np.arange(4000) + 0.5) / 4000
    # Kolmogorov-Smirnov: 1.95 / sqrt(4000) = 0.031 at one in a thousand.
    assert np.abs(share - uniform).max() < 0.031
    assert np.abs(shape - uniform).max() < 0.031


def test_where_no_crop_fits_the_largest_in_the_centre_is_taken() -> None:
    rng = np.random.default_rng(0)
    assert draw_crop(rng, 30, 900, 0.9) == (430, 0, 40, 30)
    assert draw_crop(rng, 900, 30, 0.9) == (0, 430, 30, 40)
    assert draw_crop(rng, 30, 36, 1.0) == (0, 0, 36, 30)
    assert draw_crop(rng, 1, 16_000, 0.9) == pytest.approx((8000 - 2 / 3, 0, 4 / 3, 1))


def erased(seed: int, size: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A view without and with erasing, and (H, W) bool where they differ."""
    without, with_noise = view(seed, size=size, erase=0), view(seed, size=size, erase=1.0)
    return without, with_noise, (without != with_noise).any(0)


def test_erasing_replaces_one_rectangle_of_the_right_share_and_nothing_else() -> None:
    shares, ratios, values, places = [], [], [], []
    for seed in range(300):
        _, with_noise, changed = erased(seed)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert changed.sum() == height * width  # a full rectangle, the rest equal to the bit
        shares.append(height * width / 1600)
        ratios.append(width / height)
        values.append(with_noise[:, changed].ravel())
        if max(height, width) < 40:
            places.append((columns[0] / (40 - width), rows[0] / (40 - height)))
    assert 0.013 < min(shares) < 0.04  # 0.02 and 1/3, up to the rounding of the sides
    assert 0.31 < max(shares) < 0.36
    assert min(ratios) < 0.4
    assert max(ratios) > 2.5
    assert 0.26 < min(ratios) < max(ratios) < 3.9
    for along in np.array(places).T:
        assert along.min() == 0
        assert along.max() == 1
        assert abs(along.mean() - 0.5) < 0.06  # the deviation is 0.017
    noise_values = np.concatenate(values)
    assert abs(noise_values.mean()) < 0.02
    assert abs(noise_values.std() - 1) < 0.02


def test_a_tiny_view_is_erased_too() -> None:
    assert all(erased(seed, size=3)[2].any() for seed in range(100))


def test_erasing_happens_as_often_as_asked() -> None:
    plain = [view(seed, size=8, erase=0) for seed in range(1000)]
    changed = sum(not np.array_equal(pixels, view(seed, size=8, erase=0.25)) for seed, pixels in enumerate(plain))
    assert abs(changed - 250) < 55  # the deviation is 14
