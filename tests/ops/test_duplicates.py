"""Groups of duplicates: exactness against all pairs, what counts as near, sizes that occur."""

from __future__ import annotations

import numpy as np
import pytest

from weaksam.ops.duplicates import DuplicateRules, group_duplicates, join_close_hashes

RULES = DuplicateRules(max_bits=8, max_difference=0.35)


def flip(value: int, bits: list[int]) -> np.uint64:
    for bit in bits:
        value ^= 1 << bit
    return np.uint64(value)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 256), dtype=np.uint8)


def group(contents: str, hashes: list[int], thumbnails: np.ndarray, rules: DuplicateRules = RULES) -> list[list]:
    """Members of each group and whether it is exact."""
    found = group_duplicates(list(contents), np.array(hashes, np.uint64), thumbnails, rules)
    return [[np.flatnonzero(found.group == i).tolist(), bool(exact)] for i, exact in enumerate(found.exact)]


def test_no_images_have_no_groups() -> None:
    assert group("", [], pictures(0)) == []


def test_arguments_must_agree() -> None:
    with pytest.raises(ValueError, match="got 2, 1 and 2"):
        group("ab", [0], pictures(2))


def test_same_bytes_are_exact_whatever_they_show() -> None:
    blank = np.full((1, 256), 200, np.uint8)
    thumbnails = np.concatenate([pictures(2), blank, pictures(1), blank, pictures(3)[2:]])
    hashes = [0, 2**40 - 1, 1, 0, 1, 2**63 + 7]
    assert group("abcacd", hashes, thumbnails) == [[[0, 3], True], [[2, 4], True]]


def test_near_needs_a_close_hash_and_a_close_thumbnail() -> None:
    base, far = pictures(1)[0].astype(float), int("5" * 16, 16)
    brighter = np.clip(base * 0.5 + 100, 0, 255).astype(np.uint8)
    cases = {
        "near": (flip(far, [0, 17, 33, 34, 35, 36, 50, 63]), brighter),  # 8 bits
        "bits": (flip(far, [0, 1, 17, 33, 34, 35, 36, 50, 63]), brighter),  # 9
        "look": (np.uint64(far), pictures(1, seed=1)[0]),
    }
    for name, (code, look) in cases.items():
        found = group("ab", [far, int(code)], np.stack([base.astype(np.uint8), look]))
        assert found == ([[[0, 1], False]] if name == "near" else []), name


def test_the_limit_of_the_difference_is_of_the_standardised_thumbnails() -> None:
    a, b = np.zeros(256), np.zeros(256)
    a[::2], b[::2] = 100, 100
    b[:8] = 100 - b[:8]  # 4 of 128 bright ones are dark, 4 dark ones bright: correlation 1 - 16 / 256
    thumbnails, difference = np.stack([a, b]).astype(np.uint8), np.sqrt(2 * 16 / 256)
    assert group("ab", [0, 0], thumbnails, DuplicateRules(0, difference - 0.01)) == []
    assert group("ab", [0, 0], thumbnails, DuplicateRules(0, difference + 0.01)) == [[[0, 1], False]]
    assert group("ab", [0, 0], thumbnails[[0, 0]], DuplicateRules(0, 0.0)) == [[[0, 1], False]]


def test_chains_and_copies_of_a_near_duplicate_are_one_group() -> None:
    look = np.repeat(pictures(1), 5, axis=0)
    first, second, third = 0, flip(0, list(range(8))), flip(0, list(range(16)))
    assert group("abbcd", [first, second, second, third, 2**64 - 1], look) == [[[0, 1, 2, 3], False]]


def test_flat_pictures_are_nobodys_near_duplicates() -> None:
    noise = np.random.default_rng(0).integers(127, 130, (50, 256), dtype=np.uint8)
    same_noise = np.repeat(noise[:1], 2, axis=0)
    looks = np.concatenate([noise, same_noise, pictures(1)])
    assert group("".join(map(chr, range(100, 153))), [0] * 53, looks) == []


@pytest.mark.parametrize("max_bits", [0, 1, 2, 3, 4, 5, 7, 8, 11])
def test_close_hashes_are_those_of_all_pairs(max_bits: int) -> None:
    from scipy.sparse.csgraph import connected_components

    rng = np.random.default_rng(max_bits)
    hashes = rng.integers(0, 2**64, 60, dtype=np.uint64)
    for _ in range(3):  # neighbours of 1 to 12 bits, anywhere and all in one quarter
        for width in (64, 16):
            copies = rng.choice(hashes, 60)
            for i in range(60):
                bits = rng.choice(width, rng.integers(1, 13), replace=False)
                copies[i] = flip(int(copies[i]), bits.tolist())
            hashes = np.concatenate([hashes, copies])
    unique = np.unique(hashes)
    wanted = connected_components(np.bitwise_count(unique[:, None] ^ unique[None]) <= max_bits)[1]
    found = join_close_hashes(unique, max_bits)
    assert np.array_equal(found[:, None] == found[None], wanted[:, None] == wanted[None])


@pytest.mark.timeout(600)
def test_a_dataset_of_120_000_images_is_grouped_exactly() -> None:
    """Hidden among random images: a near and an exact copy of each of 500, and 10,000 of one that differ in a bit."""
    rng = np.random.default_rng(0)
    count, copied, many = 109_000, 500, 10_000
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    looks = pictures(count)
    near = hashes[:copied].copy()
    for i in range(copied):
        near[i] = flip(int(near[i]), rng.choice(64, 7, replace=False).tolist())
    alike = np.full(many, hashes[copied])
    alike ^= np.uint64(1) << rng.integers(0, 64, many).astype(np.uint64)
    similar = np.clip(looks[copied].astype(int) + rng.integers(-9, 10, (many, 256)), 0, 255).astype(np.uint8)
    contents = [str(i) for i in [*range(count), *range(count, count + copied), *range(copied), *range(-many, 0)]]
    found = group_duplicates(
        contents,
        np.concatenate([hashes, near, hashes[:copied], alike]),
        np.concatenate([looks, looks[:copied], looks[:copied], similar]),
        DuplicateRules(max_bits=7, max_difference=0.35),
    )
    assert len(contents) == 120_000
    wanted = np.full(120_000, -1)
    wanted[: copied + 1] = np.arange(copied + 1)
    wanted[count : count + copied] = wanted[count + copied : count + 2 * copied] = np.arange(copied)
    wanted[-many:] = copied
    assert np.array_equal(found.group, wanted)
    assert not found.exact.any()
