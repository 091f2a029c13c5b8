"""Run lengths of masks, against pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from weaksam.ops.rle import decode_rle, encode_rle, rle_area, rle_to_runs, runs_to_rle

MASKS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14))


def blobs(height: int, width: int, seed: int) -> np.ndarray:
    """A mask with long runs and short ones."""
    generator = np.random.default_rng(seed)
    mask = np.zeros((height, width), dtype=bool)
    for _ in range(6):
        top, left = generator.integers(0, height), generator.integers(0, width)
        mask[top : top + generator.integers(1, height), left : left + generator.integers(1, width)] ^= True
    return mask ^ (generator.random((height, width)) < 0.01)


@given(MASKS)
def test_run_lengths_are_those_of_pycocotools(mask):
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    assert encode_rle(mask) == theirs


@pytest.mark.parametrize("seed", range(5))
def test_long_runs_are_those_of_pycocotools(seed):
    mask = blobs(400 + seed, 300, seed)
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert encode_rle(mask) == rle["counts"]
    assert rle_area(rle["counts"]) == coco.area(rle)


@given(MASKS)
def test_run_lengths_round_trip(mask):
    rle = encode_rle(mask)
    np.testing.assert_array_equal(decode_rle(rle, *mask.shape), mask)
    assert rle_area(rle) == mask.sum()


@given(st.lists(st.integers(0, 2**30), min_size=1, max_size=12))
def test_runs_of_any_length_round_trip(runs):
    np.testing.assert_array_equal(rle_to_runs(runs_to_rle(np.array(runs))), runs)


def test_empty_images():
    assert encode_rle(np.zeros((0, 5), dtype=bool)) == b"0"
    assert decode_rle(b"0", 0, 5).shape == (0, 5)
    assert rle_area(b"") == 0


def test_run_lengths_that_do_not_fit_are_refused():
    rle = encode_rle(np.eye(4, dtype=bool))
    with pytest.raises(ValueError, match="rle covers 16 pixels, not height \\* width = 4 \\* 5"):
        decode_rle(rle, 4, 5)
    with pytest.raises(ValueError, match="ends inside a number"):
        rle_to_runs(b"P")
