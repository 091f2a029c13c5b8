"""Pseudo masks against objects: a plain twin, cases by hand, and rows that lack masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from weaksam.ops.detection_metrics import HIT, IGNORED, MISS, DetectionRules, match_image
from weaksam.ops.mask_metrics import (
    concat_records,
    cover,
    is_unsegmented,
    mask_metrics,
    mask_table,
    match_masks,
    objects_with_masks,
    pairwise_mask_iou,
)
from weaksam.ops.pgt_metrics import pgt_metrics
from weaksam.ops.rle import encode_rle

HW = (16, 20)
RULES = DetectionRules()
NAMES = ["cat", "dog", "owl"]
FAILED = {"status": "crash", "height": None, "width": None, "boxes": [], "classes": [], "scores": [], "masks": None}


def pixels(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros(HW, bool)
    mask[top:bottom, left:right] = True
    return mask


A, TOP_OF_A, B, FAR = pixels(0, 0, 8, 8), pixels(0, 0, 8, 6), pixels(10, 4, 18, 14), pixels(18, 14, 20, 16)


def truth(*objects: tuple[np.ndarray | None, int, str], boxes: list | None = None) -> dict[str, Any]:
    """Objects are (mask, class, flag), flag being `difficult`, `crowd` or empty."""
    return {
        "boxes": boxes or [[0, 0, 1, 1]] * len(objects),
        "classes": [label for _, label, _ in objects],
        "difficult": [flag == "difficult" for _, _, flag in objects],
        "crowd": [flag == "crowd" for _, _, flag in objects],
        "masks": [None if mask is None else encode_rle(mask) for mask, _, _ in objects],
    }


def found(*masks: tuple[np.ndarray, int, float], boxes: list | None = None) -> dict[str, Any]:
    classes, scores = [one[1] for one in masks], [one[2] for one in masks]
    row = {"status": "ok", "height": HW[0], "width": HW[1], "boxes": boxes or [[0, 0, 1, 1]] * len(masks)}
    return row | {"classes": classes, "scores": scores, "masks": [encode_rle(one[0]) for one in masks]}


def iou_of(mask: np.ndarray, other: np.ndarray) -> float:
    union = (mask | other).sum()
    return float((mask & other).sum() / union) if union else 0.0


def blobs(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Rectangles with some pixels wrong; the odd one is empty."""
    sides = [(*rng.integers(0, 8, 2), *rng.integers(9, 16, 2)) for _ in range(count)]
    masks = [pixels(*map(int, side)) ^ (rng.random(HW) < 0.05) for side in sides]
    return [mask & (rng.random() > 0.05) for mask in masks]


def test_iou_of_masks_is_that_of_their_pixels() -> None:
    rng = np.random.default_rng(0)
    masks, others = blobs(rng, 30), blobs(rng, 20)
    masks[0] = others[0] = np.zeros(HW, bool)
    iou = pairwise_mask_iou([encode_rle(m) for m in masks], [encode_rle(m) for m in others], HW)
    np.testing.assert_allclose(iou, [[iou_of(mask, other) for other in others] for mask in masks])


def test_masks_of_another_size_are_an_error_and_no_endless_loop() -> None:
    wide = encode_rle(np.zeros((16, 21), bool))
    with pytest.raises(ValueError, match=r"others must have masks of 16 x 20 .* = 320 pixels, mask 1 covers 336"):
        pairwise_mask_iou([encode_rle(A)], [encode_rle(B), wide], HW)
    with pytest.raises(ValueError, match=r"masks must have masks of 16 x 20 .*, mask 0 covers 0"):
        pairwise_mask_iou([b""], [encode_rle(B)], HW)
    with pytest.raises(ValueError, match="masks must have a mask each, got 0 of 1"):
        pairwise_mask_iou([None], [encode_rle(B)], HW)  # type: ignore[list-item]


def test_iou_of_no_masks_has_a_shape() -> None:
    assert pairwise_mask_iou([], [encode_rle(A)], HW).shape == (0, 1)
    assert pairwise_mask_iou([encode_rle(A)], [], HW).shape == (1, 0)


def plain_figures(images: list[tuple[list, list]], label: int | None) -> dict[str, float | None]:
    """Every figure written out; an image is its objects (mask, class, flag) and what was found (mask, class, score)."""
    best_detections, best_objects, hits, misses, total = [], [], {0.5: 0, 0.75: 0}, {0.5: 0, 0.75: 0}, 0
    for objects, masks in images:
        for mask, kind, flag in objects:
            if not flag and label in (kind, None):
                total += 1
                best_objects.append(max((iou_of(mask, m) for m, k, _ in masks if k == kind), default=0.0))
        taken: dict[float, set[int]] = {0.5: set(), 0.75: set()}
        for mask, kind, _ in sorted(masks, key=lambda one: -one[2]):
            if label not in (kind, None):
                continue
            overlaps = [iou_of(mask, m) if k == kind else -1.0 for m, k, _ in objects]
            best = int(np.argmax(overlaps)) if overlaps else -1
            for t in (0.5, 0.75):
                if best < 0 or overlaps[best] < t or (not objects[best][2] and best in taken[t]):
                    misses[t] += 1
                elif not objects[best][2]:
                    hits[t] += 1
                    taken[t].add(best)
            if best < 0 or not (objects[best][2] and overlaps[best] >= 0.5):
                counting = [iou for iou, (_, _, flag) in zip(overlaps, objects, strict=True) if not flag]
                best_detections.append(max([0.0, *counting]))
    figures: dict[str, float | None] = {"mask_iou": float(np.mean(best_detections)) if best_detections else None}
    figures["mask_iou_of_objects"] = float(np.mean(best_objects)) if best_objects else None
    for t in (0.5, 0.75):
        figures[f"precision@{t:g}"] = hits[t] / (hits[t] + misses[t]) if hits[t] + misses[t] else None
        figures[f"recall@{t:g}"] = hits[t] / total if total else None
    return figures


@pytest.mark.parametrize("seed", range(10))
def test_figures_are_those_of_a_plain_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(8):
        flags = rng.choice(["", "", "", "difficult", "crowd"], 3)
        objects = [(mask, int(rng.integers(2)), str(flag)) for mask, flag in zip(blobs(rng, 3), flags, strict=True)]
        objects = objects[: rng.integers(0, 4)]
        masks = [(mask ^ (rng.random(HW) < rng.choice([0.02, 0.2])), label) for mask, label, _ in objects]
        masks += [(mask, int(rng.integers(3))) for mask in blobs(rng, rng.integers(0, 3))]
        images.append((objects, [(*one, float(rng.integers(1, 5)) / 4) for one in masks]))
    records = concat_records(match_masks(truth(*o), found(*m), 3, RULES) for o, m in images)
    figures = mask_metrics(records, RULES)
    assert figures.pop("boxes_per_image") == np.mean([len(masks) for _, masks in images])
    assert figures == pytest.approx({k: v for k, v in plain_figures(images, None).items() if v is not None})
    for label, row in enumerate(mask_table(records, NAMES, RULES)):
        assert row["num_boxes"] == sum(kind == label for _, masks in images for _, kind, _ in masks)
        wanted = plain_figures(images, label)
        assert {key: row[key] for key in wanted} == pytest.approx(wanted)


def test_means_are_of_masks_and_of_objects() -> None:
    one = match_masks(
        truth((A, 0, ""), (B, 0, ""), (B, 1, "")), found((TOP_OF_A, 0, 0.5), (A, 0, 0.9), (FAR, 0, 0.7)), 3, RULES
    )
    assert one.best_of_masks.tolist() == [1.0, 0.0, 0.75]  # best score first
    assert one.best_of_objects.tolist() == [1.0, 0.0, 0.0]  # nothing was found of class 1
    figures = mask_metrics(one, RULES)
    assert (figures["mask_iou"], figures["mask_iou_of_objects"]) == pytest.approx((1.75 / 3, 1 / 3))
    assert (figures["precision@0.5"], figures["recall@0.5"]) == pytest.approx((1 / 3, 1 / 3))
    assert [row["mask_iou"] for row in mask_table(one, NAMES, RULES)] == [pytest.approx(1.75 / 3), None, None]


@pytest.mark.parametrize("flag", ["difficult", "crowd"])
def test_masks_of_objects_that_do_not_count_are_left_out(flag: str) -> None:
    one = match_masks(truth((A, 0, flag), (B, 0, "")), found((A, 0, 0.9), (A, 0, 0.8), (B, 0, 0.7)), 1, RULES)
    assert one.matches.outcomes[:, 0].tolist() == [IGNORED, IGNORED, HIT]
    assert mask_metrics(one, RULES) == {
        "mask_iou": 1.0,
        "mask_iou_of_objects": 1.0,
        "precision@0.5": 1.0,
        "recall@0.5": 1.0,
        "precision@0.75": 1.0,
        "recall@0.75": 1.0,
        "boxes_per_image": 3.0,
    }
    # one that hardly touches such an object is not excused by it
    one = match_masks(truth((A, 0, flag)), found((pixels(6, 6, 12, 12), 0, 0.9)), 1, RULES)
    assert mask_metrics(one, RULES)["mask_iou"] == 0.0


def test_the_box_stands_in_for_a_mask_that_is_not_there() -> None:
    """VOC paints difficult objects void: what was found there is neither right nor wrong."""
    boxes = [[0, 0, 8, 8], [10, 4, 18, 14]]
    row = truth((None, 0, "difficult"), (B, 0, ""), boxes=boxes)
    one = match_masks(row, found((A, 0, 0.9), (B, 0, 0.8), boxes=boxes), 1, RULES)
    assert one.matches.outcomes.tolist() == [[IGNORED] * 2, [HIT] * 2]
    assert one.matches.num_objects.tolist() == [1]
    row = truth((None, 0, ""), (B, 0, ""), boxes=boxes)
    assert match_masks(row, found((A, 0, 0.9), boxes=boxes[:1]), 1, RULES).matches.outcomes.tolist() == [[IGNORED] * 2]


def test_failed_images_and_images_without_objects() -> None:
    records = concat_records(
        [
            match_masks(truth((A, 0, "")), FAILED, 3, RULES),
            match_masks(truth(), found((A, 1, 0.5)), 3, RULES),
            match_masks(truth(), found(), 3, RULES),
        ]
    )
    figures = mask_metrics(records, RULES)
    assert (figures["mask_iou"], figures["mask_iou_of_objects"], figures["precision@0.5"]) == (0.0, 0.0, 0.0)
    assert [row["mask_iou_of_objects"] for row in mask_table(records, NAMES, RULES)] == [0.0, None, None]
    nothing = match_masks(truth(), found(), 3, RULES)
    assert mask_metrics(nothing, RULES) == {"boxes_per_image": 0.0}


def test_masks_like_boxes_count_like_boxes() -> None:
    rng = np.random.default_rng(1)
    sides = [[*map(int, rng.integers(0, 8, 2)), *map(int, rng.integers(9, 16, 2))] for _ in range(12)]
    objects = [(pixels(*side), int(rng.integers(2)), str(rng.choice(["", "difficult"]))) for side in sides[:6]]
    masks = [(pixels(*side), int(rng.integers(2)), float(rng.random())) for side in sides[6:]]
    rows = truth(*objects, boxes=sides[:6]), found(*masks, boxes=sides[6:])
    by_boxes = match_image(*rows, 2, RULES)
    np.testing.assert_array_equal(match_masks(*rows, 2, RULES).matches.outcomes, by_boxes.outcomes)
    figures = mask_metrics(match_masks(*rows, 2, RULES), RULES)
    assert pgt_metrics(by_boxes, RULES).items() <= figures.items()
    assert {HIT, MISS, IGNORED} >= set(by_boxes.outcomes.ravel().tolist())


def test_an_image_is_unsegmented_when_nothing_that_should_have_a_mask_has_one() -> None:
    assert is_unsegmented(truth((None, 0, "")))
    assert is_unsegmented(truth((None, 0, "")) | {"masks": None})
    assert not is_unsegmented(truth((None, 0, ""), (A, 0, "")))
    assert not is_unsegmented(truth((None, 0, "difficult")))
    assert not is_unsegmented(truth())


def test_objects_without_masks_leave_with_all_that_describes_them() -> None:
    row = truth((None, 0, "difficult"), (B, 1, ""), boxes=[[0, 0, 8, 8], [10, 4, 18, 14]])
    kept = objects_with_masks({**row, "image_id": "a"})
    assert (kept["image_id"], kept["masks"]) == ("a", [encode_rle(B)])
    assert [kept[key].tolist() for key in ("boxes", "classes", "difficult", "areas")] == [
        [[10, 4, 18, 14]],
        [1],
        [False],
        [80.0],
    ]
    stated = objects_with_masks({**row, "areas": np.array([1.0, 2.0])})
    assert stated["areas"].tolist() == [2.0]


def test_masks_of_another_size_are_noticed() -> None:
    assert cover([encode_rle(A), None], HW)
    assert not cover([encode_rle(A), encode_rle(A[:-1])], HW)
