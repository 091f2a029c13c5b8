"""AP of masks as VOC12's instance segmentation counts it: against a plain twin, and at its borders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from weaksam.ops.coco_metrics import coco_metrics, voc_mask_metrics
from weaksam.ops.rle import encode_rle

HW = (16, 20)
CLASSES = ["cat", "dog", "owl"]
LEFT, RIGHT = np.zeros(HW, bool), np.zeros(HW, bool)
LEFT[2:12, 1:9], RIGHT[4:14, 11:19] = True, True


def truth(masks: list[np.ndarray], classes: list[int], crowd: list[bool] | None = None, **columns: Any) -> dict:
    """A row of ground truth; its boxes play no part."""
    row = {"boxes": [[0, 0, 1, 1]] * len(masks), "classes": classes, "crowd": crowd or [False] * len(masks)}
    return row | {"difficult": [False] * len(masks), "masks": [encode_rle(mask) for mask in masks]} | columns


def found(masks: list[np.ndarray], classes: list[int], scores: list[float], status: str = "ok") -> dict:
    size = {"status": status, "height": HW[0], "width": HW[1]}
    row = {"boxes": [[0, 0, 1, 1]] * len(masks), "classes": classes, "scores": scores}
    return size | row | {"masks": [encode_rle(mask) for mask in masks]}


FAILED = {
    "status": "unreadable",
    "height": None,
    "width": None,
    "masks": None,
    "boxes": [],
    "classes": [],
    "scores": [],
}


def rectangles(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    masks = []
    for _ in range(count):
        (top, left), mask = rng.integers(0, 10, 2), np.zeros(HW, bool)
        mask[top : top + rng.integers(2, 9), left : left + rng.integers(2, 11)] = True
        masks.append(mask)
    return masks


def worse(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """A mask with some of its pixels wrong, and shifted."""
    return np.roll(mask ^ (rng.random(HW) < 0.05), int(rng.integers(-2, 3)), axis=int(rng.integers(2)))


def random_images(rng: np.random.Generator, count: int = 6) -> list[tuple[list, list, list, list, list, list]]:
    """Objects, their classes, which are crowds; detections, their classes and scores. No object is an owl."""
    images = []
    for _ in range(count):
        objects = rectangles(rng, rng.integers(0, 5))
        classes = rng.integers(0, 2, len(objects)).tolist()
        crowd = (rng.random(len(objects)) < 0.2).tolist()
        good = [i for i in range(len(objects)) for _ in range(rng.integers(0, 3))]
        masks = [worse(rng, objects[i]) for i in good] + rectangles(rng, rng.integers(0, 3))
        labels = [classes[i] for i in good] + rng.integers(0, 3, len(masks) - len(good)).tolist()
        scores = (rng.integers(1, 9, len(masks)) / 8).tolist()  # with ties
        images.append((objects, classes, crowd, masks, labels, scores))
    return images


def plain_ap(images: list[tuple], label: int, threshold: float) -> float | None:
    """COCO's AP of one class at one threshold, written out."""
    hits, scores, total = [], [], 0
    for objects, classes, crowd, masks, labels, points in images:
        here = [(objects[i], crowd[i]) for i in range(len(objects)) if classes[i] == label]
        total += sum(not is_crowd for _, is_crowd in here)
        best_first = sorted((i for i in range(len(masks)) if labels[i] == label), key=lambda i: -points[i])
        taken: set[int] = set()
        for i in best_first[:100]:
            match, best = None, threshold
            for number, (mask, is_crowd) in enumerate(here):
                iou = (mask & masks[i]).sum() / max((mask | masks[i]).sum(), 1)
                if not is_crowd and number not in taken and iou >= best:
                    match, best = number, iou
            in_crowd = any(c and (m & masks[i]).sum() / max(masks[i].sum(), 1) >= threshold for m, c in here)
            if match is None and in_crowd:
                continue
            taken |= {match} if match is not None else set()
            hits.append(match is not None)
            scores.append(points[i])
    if not total:
        return None
    ranked = [hits[i] for i in sorted(range(len(hits)), key=lambda i: -scores[i])]
    curve = [(sum(ranked[: k + 1]) / total, sum(ranked[: k + 1]) / (k + 1)) for k in range(len(ranked))]
    return float(np.mean([max((p for r, p in curve if r >= at), default=0.0) for at in np.linspace(0, 1, 101)]))


def as_pairs(images: list[tuple]) -> list[tuple[dict, dict]]:
    return [(truth(*image[:3]), found(*image[3:])) for image in images]


@pytest.mark.parametrize("seed", range(8))
def test_ap_of_masks_is_that_of_a_plain_twin(seed: int) -> None:
    images = random_images(np.random.default_rng(seed))
    figures, rows = voc_mask_metrics(as_pairs(images), CLASSES)
    assert [row["class"] for row in rows] == CLASSES
    for key, threshold in {"AP25": 0.25, "AP50": 0.5, "AP70": 0.7, "AP75": 0.75}.items():
        wanted = [plain_ap(images, label, threshold) for label in range(3)]
        assert [row[key] for row in rows] == pytest.approx(wanted)
        assert figures[key] == pytest.approx(np.mean([one for one in wanted if one is not None]))


def test_where_both_protocols_tell_a_figure_it_is_the_same() -> None:
    pairs = as_pairs(random_images(np.random.default_rng(99), count=12))
    ours, coco = voc_mask_metrics(pairs, CLASSES)[0], coco_metrics(pairs, CLASSES, kind="segm")[0]
    assert {key: ours[key] for key in ("AP50", "AP75")} == pytest.approx({key: coco[key] for key in ("AP50", "AP75")})
    assert 0 < ours["AP75"] < ours["AP70"] < ours["AP50"] < ours["AP25"] < 1


def test_a_class_that_was_not_detected_counts_and_one_without_objects_does_not() -> None:
    pairs = [
        (truth([LEFT, RIGHT], [0, 1]), found([LEFT, RIGHT], [0, 2], [0.9, 0.8])),
        (truth([], []), found([], [], [])),
    ]
    figures, rows = voc_mask_metrics(pairs, CLASSES)
    assert [row["AP50"] for row in rows] == [pytest.approx(1.0), 0.0, None]
    assert figures == pytest.approx(dict.fromkeys(("AP25", "AP50", "AP70", "AP75"), 0.5))


def test_what_is_found_in_an_image_without_objects_is_wrong() -> None:
    pairs = [(truth([], []), found([LEFT], [0], [0.9])), (truth([LEFT], [0]), found([LEFT], [0], [0.8]))]
    assert voc_mask_metrics(pairs, CLASSES)[0]["AP50"] == pytest.approx(0.5)


def test_objects_of_a_failed_image_were_not_found() -> None:
    figures, _ = voc_mask_metrics(
        [(truth([LEFT], [0]), found([LEFT], [0], [0.9])), (truth([RIGHT], [0]), FAILED)], CLASSES
    )
    assert figures["AP50"] == pytest.approx(51 / 101)  # recall 0.5: the recalls 0, 0.01 ... 0.5 are reached


def test_nothing_detected_is_zero_for_every_class_with_objects() -> None:
    figures, rows = voc_mask_metrics([(truth([LEFT], [1]), found([], [], [])), (truth([RIGHT], [1]), FAILED)], CLASSES)
    assert figures == dict.fromkeys(("AP25", "AP50", "AP70", "AP75"), 0.0)
    assert [row["AP50"] for row in rows] == [None, 0.0, None]


def test_without_any_object_there_is_no_figure() -> None:
    figures, rows = voc_mask_metrics([(truth([], []), found([LEFT], [0], [0.9]))], CLASSES)
    assert figures == {}
    assert [row["AP25"] for row in rows] == [None, None, None]


def test_difficult_objects_count_like_any_other() -> None:
    figures, _ = voc_mask_metrics([(truth([LEFT], [0], difficult=[True]), found([LEFT], [0], [0.9]))], CLASSES)
    assert figures["AP75"] == pytest.approx(1.0)
    figures, _ = voc_mask_metrics([(truth([LEFT, RIGHT], [0, 0], difficult=[True, False]), FAILED)], CLASSES)
    assert figures["AP75"] == 0.0


def test_a_crowd_counts_neither_way() -> None:
    crowded = truth([LEFT, RIGHT], [0, 0], crowd=[True, False])
    figures, _ = voc_mask_metrics([(crowded, found([LEFT, LEFT, RIGHT], [0, 0, 0], [0.9, 0.8, 0.7]))], CLASSES)
    assert figures["AP50"] == pytest.approx(1.0)


@pytest.mark.parametrize(("before", "ap"), [(99, 1 / 100), (100, 0.0)])
def test_the_best_100_of_a_class_count(before: int, ap: float) -> None:
    masks = [*[RIGHT] * before, LEFT]
    scores = np.linspace(1, 0.1, len(masks)).tolist()
    figures, _ = voc_mask_metrics([(truth([LEFT], [0]), found(masks, [0] * len(masks), scores))], CLASSES)
    assert figures["AP50"] == pytest.approx(ap)


def test_a_second_detection_of_an_object_may_take_another() -> None:
    wide = LEFT | RIGHT
    wide[5:10] = True
    # In VOC's AP of boxes it may not: there only the object it overlaps best is looked at.
    pairs = [(truth([LEFT, wide], [0, 0]), found([LEFT, LEFT], [0, 0], [0.9, 0.8]))]
    rows = voc_mask_metrics(pairs, CLASSES)[1]
    assert 0.25 < LEFT.sum() / wide.sum() < 0.5
    assert (rows[0]["AP25"], rows[0]["AP50"]) == (pytest.approx(1.0), pytest.approx(51 / 101))


def test_plain_boxes_have_a_row_a_class_and_no_number_where_there_is_no_object() -> None:
    """Rows of nothing but boxes, classes and scores; the box is small, there is no dog and no owl."""
    box = [[2.0, 2.0, 12.0, 12.0]]
    there = {"boxes": box, "classes": [0]}
    for boxes, ap in ((box, 1.0), ([], 0.0)):
        pairs = [(there, {"boxes": boxes, "classes": [0] * len(boxes), "scores": [0.9] * len(boxes)})]
        figures, rows = coco_metrics(pairs, CLASSES)
        assert figures == pytest.approx(
            dict.fromkeys(("AP", "AP50", "AP75", "AP_small", "AR@1", "AR@10", "AR@100", "AR_small"), ap)
        )
        assert [row["class"] for row in rows] == CLASSES
        assert [row["AP50"] for row in rows] == [pytest.approx(ap), None, None]
        assert [row["curve"] is None for row in rows] == [False, True, True]
    nothing = {"boxes": [], "classes": []}
    figures, rows = coco_metrics([(nothing, {"boxes": box, "classes": [0], "scores": [0.9]})], CLASSES)
    assert (figures, [row["AP"] for row in rows]) == ({}, [None] * 3)


@pytest.mark.parametrize("of_object", [True, False])
def test_masks_of_another_size_are_an_error_and_no_endless_loop(of_object: bool) -> None:
    wide = np.zeros((16, 21), bool)
    pair = (truth([wide if of_object else LEFT], [0]), found([LEFT if of_object else wide], [0], [0.9]))
    for metrics in (voc_mask_metrics, lambda pairs, names: coco_metrics(pairs, names, kind="segm")):
        with pytest.raises(ValueError, match=r"of image 1 must have masks of 16 x 20 .*, mask 0 covers 336"):
            metrics([pair], CLASSES)
        with pytest.raises(ValueError, match="objects of image 1 must have a mask each, got 0 of 1"):
            metrics([(pair[0] | {"masks": None}, pair[1])], CLASSES)
