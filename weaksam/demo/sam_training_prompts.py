"""Prompts and targets for training SAM on label maps: numpy in, numpy out, one picture at a time.

A point inside an object is ambiguous, so it has two targets, the object and the part below it. A box or several points
have one target. A point on the background has none.

Axis legend: P prompts, T prompt tokens (3), G targets (2), S side of the token grid, K cells, 16 pixels of a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weaksam.demo.sam_training_forward import (
    CELL_PIXELS,
    PROMPT_ABSENT,
    PROMPT_BOTTOM_RIGHT,
    PROMPT_PAD,
    PROMPT_POSITIVE,
    PROMPT_TOP_LEFT,
)

Rng = np.random.Generator
MIN_TARGET = 24  # pixels; minimum size of an object or part
_ROWS, _COLUMNS = (np.array(axis) for axis in zip(*CELL_PIXELS, strict=True))


@dataclass(frozen=True)
class PromptMix:
    """Number of prompts of each sort per picture."""

    points: int = 7  # one point inside an object
    background: int = 2  # one point on the background
    boxes: int = 2
    pairs: int = 1  # two points inside one object

    @property
    def total(self) -> int:
        """Number of prompts per picture."""
        return self.points + self.background + self.boxes + self.pairs


@dataclass(frozen=True)
class _Prompt:
    coords: Sequence[tuple[float, float]]  # pixels, x then y
    labels: list[int]
    targets: list[np.ndarray]  # (H, W) bool, at most G
    is_ambiguous: bool


def draw_prompts(rng: Rng, objects: np.ndarray, parts: np.ndarray, mix: PromptMix) -> list[_Prompt]:
    """Draws `mix.total` prompts for a picture. Without objects, or without background, the other sort is drawn.

    Args:
        objects, parts: (H, W) uint8 label maps, 0 = background; parts are numbered through the picture.
    """
    counts = np.bincount(objects.ravel(), minlength=2)
    ids = np.flatnonzero(counts[1:] >= MIN_TARGET) + 1
    masks = {int(k): objects == k for k in ids}
    empty = np.flatnonzero(objects.ravel() == 0)
    sorts = ["point"] * mix.points + ["background"] * mix.background + ["box"] * mix.boxes + ["pair"] * mix.pairs
    prompts = []
    for sort in sorts:
        if not masks or (sort == "background" and len(empty)):
            prompts.append(_background_prompt(rng, empty, objects.shape[1]) if len(empty) else _empty_prompt())
            continue
        mask = masks[int(ids[rng.integers(len(ids))])]
        prompts.append(_object_prompt(rng, mask, parts, "point" if sort == "background" else sort))
    return prompts


def _empty_prompt() -> _Prompt:
    return _Prompt([], [], [], True)


def _background_prompt(rng: Rng, empty: np.ndarray, width: int) -> _Prompt:
    y, x = divmod(int(empty[rng.integers(len(empty))]), width)
    return _Prompt([(x, y)], [PROMPT_POSITIVE, PROMPT_PAD], [], True)


def _object_prompt(rng: Rng, mask: np.ndarray, parts: np.ndarray, sort: str) -> _Prompt:
    inside = np.flatnonzero(mask)
    picks = [divmod(int(inside[i]), mask.shape[1]) for i in rng.integers(len(inside), size=2)]
    part = mask & (parts == parts[picks[0]])
    has_part = MIN_TARGET <= part.sum() < 0.9 * len(inside)
    if sort == "point":
        coords = [(x, y) for y, x in picks[:1]]
        return _Prompt(coords, [PROMPT_POSITIVE, PROMPT_PAD], [mask, part] if has_part else [mask], True)
    target = part if has_part and rng.random() < 0.25 else mask
    if sort == "pair":
        second = np.flatnonzero(target)
        picks[1] = divmod(int(second[rng.integers(len(second))]), mask.shape[1])
        return _Prompt([(x, y) for y, x in picks], [PROMPT_POSITIVE, PROMPT_POSITIVE, PROMPT_PAD], [target], False)
    ys, xs = np.flatnonzero(target.any(1)), np.flatnonzero(target.any(0))
    low, high = np.array([xs[0], ys[0]]), np.array([xs[-1] + 1, ys[-1] + 1])
    slack = np.minimum(0.08 * (high - low), 10)
    low, high = low + rng.normal(0, 1, 2) * slack, high + rng.normal(0, 1, 2) * slack
    size = np.array(mask.shape[::-1])
    coords = [tuple(np.clip(low, 0, size)), tuple(np.clip(high, 0, size))]
    return _Prompt(coords, [PROMPT_TOP_LEFT, PROMPT_BOTTOM_RIGHT], [target], False)


def shrink(mask: np.ndarray, factor: int) -> np.ndarray:
    """Shrinks a bool mask by `factor`; a pixel is set if at least half of its pixels are."""
    height, width = mask.shape[0] // factor, mask.shape[1] // factor
    return 2 * mask.reshape(height, factor, width, factor).sum((1, 3), dtype=np.uint8) >= factor * factor


def choose_cells(rng: Rng, coverage: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Chooses cells for the loss, and the number of cells each represents: everywhere, but densely near targets.

    Args:
        coverage: (S, S) bool, cells that touch a target.
        count: K, at most S * S.

    Returns:
        cells: (K,) int64, row-major.
        weights: (K,) float32; they sum to S * S, so weighted sums estimate sums over the whole picture.
    """
    near = coverage.copy()
    near[1:] |= coverage[:-1]
    near[:-1] |= coverage[1:]
    near[:, 1:] |= near[:, :-1].copy()
    near[:, :-1] |= near[:, 1:].copy()
    inner, outer = rng.permutation(np.flatnonzero(near)), rng.permutation(np.flatnonzero(~near))
    num_inner = min(len(inner), max(count * 3 // 4, count - len(outer)))
    num_outer = count - num_inner
    weights = np.empty(count, np.float32)
    weights[:num_inner] = len(inner) / max(num_inner, 1)
    weights[num_inner:] = len(outer) / max(num_outer, 1)
    return np.concatenate([inner[:num_inner], outer[:num_outer]]), weights


def pack(rng: Rng, prompts: list[_Prompt], *, side: int, patch: int, count: int) -> dict[str, np.ndarray]:
    """Packs the prompts of one picture into arrays with the keys of the loss; `side` is S, `count` is K.

    Returns:
        coords (P, T, 2) float32, labels (P, T), cells (P, K), cell_weights (P, K),
        targets (P, G, K, 16) bool, has_target (P, G) bool, is_ambiguous (P,) bool.
    """
    total = len(prompts)
    coords, labels = np.zeros((total, 3, 2), np.float32), np.full((total, 3), PROMPT_ABSENT, np.int64)
    cells, weights = np.zeros((total, count), np.int64), np.zeros((total, count), np.float32)
    targets, has_target = np.zeros((total, 2, count, 16), bool), np.zeros((total, 2), bool)
    for p, prompt in enumerate(prompts):
        labels[p, : len(prompt.labels)] = prompt.labels
        for t, (x, y) in enumerate(prompt.coords):
            coords[p, t] = x, y
        tiles = [shrink(mask, patch // 4).reshape(side, 4, side, 4) for mask in prompt.targets]
        coverage = np.asarray(tiles[0].any((1, 3))) if tiles else np.zeros((side, side), bool)
        cells[p], weights[p] = choose_cells(rng, coverage, count)
        for g, tile in enumerate(tiles):
            targets[p, g] = tile.transpose(0, 2, 1, 3).reshape(-1, 4, 4)[cells[p]][:, _ROWS, _COLUMNS]
            has_target[p, g] = True
    return {
        "coords": coords,
        "labels": labels,
        "cells": cells,
        "cell_weights": weights,
        "targets": targets,
        "has_target": has_target,
        "is_ambiguous": np.array([q.is_ambiguous for q in prompts]),
    }
