"""The operations that a view for a classifier may go through, each as defined."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.data.test_augment import FILL, noise, view
from weaksam.data import augment
from weaksam.data.augment import OPERATIONS


def apply(name: str, image: np.ndarray, level: float, sign: int = 1) -> np.ndarray:
    return np.asarray(OPERATIONS[name](Image.fromarray(image), level, sign))


def grey(*values: int) -> np.ndarray:
    """One row of pixels."""
    return np.repeat(np.array([values], np.uint8)[:, :, None], 3, axis=2)


def test_there_are_fifteen_operations_and_each_is_drawn_as_often() -> None:
    seen: dict[str, list[tuple[float, int]]] = {name: [] for name in OPERATIONS}

    def spy(name: str) -> augment.Operation:
        def operation(image: Image.Image, level: float, sign: int) -> Image.Image:
            seen[name].append((level, sign))
            return image

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setitem(OPERATIONS, name, spy(name))
        for seed in range(3000):
            view(seed, size=2, erase=0)
    assert len(seen) == 15
    draws = [draw for of_one in seen.values() for draw in of_one]
    assert abs(len(draws) - 3000) < 200  # two a view, each with probability 0.5; the deviation is 39
    assert all(abs(len(of_one) - 200) < 60 for of_one in seen.values())  # the deviation is 14
    levels, signs = np.array(draws).T
    assert levels.max() == 1.0
    assert abs(np.median(levels) - 0.9) < 0.01
    assert abs((levels < 0.85).mean() - 0.159) < 0.03  # one deviation below 9 is 8.5
    assert set(signs) == {-1, 1}
    assert abs(signs.mean()) < 0.1


def test_rand_augment_of_zero_is_none_and_of_nine_is_some() -> None:
    plain = {"erase": 0, "size": 16}
    changed = sum(not np.array_equal(view(s, rand_augment=0, **plain), view(s, **plain)) for s in range(100))
    assert 55 <= changed <= 90  # 75 draw an operation, a few of those change nothing


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_gives_rgb_of_the_same_size_and_changes_it_at_full_level(name: str, sign: int) -> None:
    for hw in [(1, 1), (2, 2), (33, 20)]:
        result = OPERATIONS[name](Image.fromarray(noise(*hw)), 1.0, sign)
        assert result.mode == "RGB"
        assert result.size == hw[::-1]
    image = noise(40, 40, low=20, high=200)
    image[:, :20] //= 2
    before = image.copy()
    assert np.abs(apply(name, image, 1.0, sign).astype(int) - image).max() > 15
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "name", [n for n in OPERATIONS if n not in {"auto_contrast", "equalize", "invert", "posterize"}]
)
def test_level_zero_changes_nothing(name: str, sign: int) -> None:
    np.testing.assert_array_equal(apply(name, noise(), 0.0, sign), noise())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("name", "weak", "strong"),
    [(n, 0.2, 0.9) for n in OPERATIONS if n not in {"auto_contrast", "equalize", "invert"} and "_x" not in n]
    + [(n, 0.1, 0.9) for n in ("shear_x", "translate_x")],
)
def test_a_higher_level_changes_more(name: str, weak: float, strong: float, sign: int) -> None:
    y, x = np.mgrid[0:48, 0:64]
    image = np.stack([x * 3 + 30, y * 4 + 30, (x + y) + 60], -1).astype(np.uint8)
    image[20:28, 20:40] = 250
    moved = [np.abs(apply(name, image, level, sign).astype(float) - image).mean() for level in (weak, strong)]
    assert moved[1] > moved[0] + 0.1


def test_invert_posterize_solarize_and_solarize_add_by_hand() -> None:
    row = grey(0, 1, 17, 100, 127, 128, 200, 255)
    cases: dict[tuple[str, float], list[int]] = {
        ("invert", 0.3): [255, 254, 238, 155, 128, 127, 55, 0],
        ("posterize", 0.0): [0, 0, 16, 96, 112, 128, 192, 240],  # 4 bits
        ("posterize", 0.3): [0, 0, 0, 96, 96, 128, 192, 224],  # 3
        ("posterize", 0.5): [0, 0, 0, 64, 64, 128, 192, 192],  # 2
        ("posterize", 0.9): [0, 0, 0, 0, 0, 128, 128, 128],  # 1
        ("posterize", 1.0): [0, 0, 0, 0, 0, 128, 128, 128],  # not 0
        ("solarize", 0.5): [0, 1, 17, 100, 127, 127, 55, 0],  # from 128
        ("solarize", 0.9): [0, 1, 17, 155, 128, 127, 55, 0],  # from 26
        ("solarize", 1.0): [255, 254, 238, 155, 128, 127, 55, 0],
        ("solarize_add", 0.5): [55, 56, 72, 155, 182, 128, 200, 255],
        ("solarize_add", 1.0): [110, 111, 127, 210, 237, 128, 200, 255],
    }
    for (name, level), expected in cases.items():
        for sign in (1, -1):
            assert apply(name, row, level, sign).tolist() == grey(*expected).tolist(), (name, level)


def test_contrast_and_histogram_operations_by_hand() -> None:
    row = grey(50, 100, 150)
    assert apply("auto_contrast", row, 0.9).tolist() == grey(0, 127, 255).tolist()
    assert apply("brightness", row, 1.0, 1).tolist() == grey(95, 190, 255).tolist()
    assert apply("brightness", row, 0.5, -1).tolist() == grey(27, 55, 82).tolist()
    assert apply("brightness", row, 1.0, -1).tolist() == grey(5, 10, 15).tolist()
    assert apply("contrast", row, 1.0, -1).tolist() == grey(95, 100, 105).tolist()
    assert apply("contrast", row, 1.0, 1).tolist() == grey(5, 100, 195).tolist()
    # A tenth of the way from the grey of the same luminance, 119, to the colour; grey stays as it is.
    colored = np.array([[[200, 100, 0], [80, 80, 80]]], np.uint8)
    np.testing.assert_allclose(apply("color", colored, 1.0, -1), [[[127, 117, 107], [80, 80, 80]]], atol=1)
    # Two outliers stop a linear stretch, not an equalisation.
    packed = noise(30, 30, low=100, high=130)
    packed[0, :2] = [[0], [255]]
    assert 5 < packed.std() < 15
    assert apply("equalize", packed, 0.9).std() > 65
    edge = grey(*[60] * 4, *[180] * 4).repeat(5, axis=0)
    soft, sharp = (apply("sharpness", edge, 1.0, sign)[2, :, 0].astype(int) for sign in (-1, 1))
    assert soft[4] - soft[3] < 120 < sharp[4] - sharp[3]
    assert soft[[0, 7]].tolist() == sharp[[0, 7]].tolist() == [60, 180]


def test_translation_moves_content_right_and_down_for_a_positive_sign() -> None:
    image = noise(20, 40)
    right, left = apply("translate_x", image, 1.0, 1), apply("translate_x", image, 1.0, -1)
    np.testing.assert_array_equal(right[:, 18:], image[:, :-18])  # 0.45 * 40
    np.testing.assert_array_equal(left[:, :-18], image[:, 18:])
    down, up = apply("translate_y", image, 1.0, 1), apply("translate_y", image, 1.0, -1)
    np.testing.assert_array_equal(down[9:], image[:-9])  # 0.45 * 20
    np.testing.assert_array_equal(up[:-9], image[9:])
    for empty in (right[:, :18], left[:, -18:], down[:9], up[-9:]):
        assert (empty == FILL).all()
    np.testing.assert_array_equal(apply("translate_y", image, 1 / 9, -1)[:-1], image[1:])


def test_shears_move_rows_and_columns_in_proportion_to_their_distance() -> None:
    image = np.zeros((41, 81, 3), np.uint8)
    image[:, 40] = 255
    for sign in (1, -1):
        sheared = apply("shear_x", image, 1.0, sign)[..., 0].astype(float)
        # Only columns that no fill can reach: it is not black.
        centres = (sheared[:, 15:65] * np.arange(15, 65)).sum(1) / sheared[:, 15:65].sum(1)
        expected = 40 + sign * 0.3 * (np.arange(41) + 0.5)
        np.testing.assert_allclose(centres, expected, atol=0.1)
    np.testing.assert_array_equal(
        apply("shear_y", image.transpose(1, 0, 2), 1.0, 1), apply("shear_x", image, 1.0, 1).transpose(1, 0, 2)
    )


def test_rotation_is_thirty_degrees_at_full_level_about_the_centre() -> None:
    y, x = np.mgrid[0:61, 0:61] - 30
    image = np.zeros((61, 61, 3), np.uint8)
    image[(np.abs(y) <= 1) & (x > 0) & (x <= 20)] = 255  # a hand that points right
    for level, sign in [(1.0, 1), (1.0, -1), (0.5, 1)]:
        weight = apply("rotate", image, level, sign)[..., 0].astype(float) * (np.hypot(y, x) < 24)
        angle = np.degrees(np.arctan2(-(weight * y).sum(), (weight * x).sum()))
        assert angle == pytest.approx(sign * level * 30, abs=0.5)
    assert apply("rotate", image, 1.0)[0, 0].tolist() == FILL
