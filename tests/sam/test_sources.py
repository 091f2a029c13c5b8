"""Proposals of several sources made one list."""

from __future__ import annotations

import numpy as np
import pytest
from segment_anything.modeling import Sam

from testing.calibrate import noise_image
from weaksam.sam.engine import EngineSettings, Proposals, SamEngine
from weaksam.sam.prompts import Prompts
from weaksam.sam.sources import PromptSet, join_sources, joint_points, point_prompts, propose_from_sources


def found(boxes: list[list[float]], ratings: list[float], source: int, masks: bool = False) -> Proposals:
    count = len(boxes)
    return Proposals(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        predicted_iou=np.array(ratings, np.float32),
        stability=np.linspace(0.5, 1, count, dtype=np.float32),
        source=np.full(count, source, np.uint8),
        masks=[f"{source}.{i}".encode() for i in range(count)] if masks else None,
    )


def test_nothing_found_anywhere_is_nothing() -> None:
    joined = join_sources([found([], [], 0), found([], [], 1)], duplicate_threshold=0.9)
    assert joined.boxes.shape == (0, 4)
    assert joined.masks is None


def test_an_earlier_source_wins_whatever_the_ratings_and_the_rest_is_by_rating() -> None:
    grid = found([[0, 0, 10, 10], [20, 20, 30, 30]], [0.5, 0.4], 0, masks=True)
    peaks = found([[0, 0, 10, 10], [50, 50, 60, 60]], [0.9, 0.8], 1, masks=True)
    joined = join_sources([grid, peaks], duplicate_threshold=0.9)
    assert joined.boxes.tolist() == [[50, 50, 60, 60], [0, 0, 10, 10], [20, 20, 30, 30]]
    assert joined.source.tolist() == [1, 0, 0]
    assert joined.predicted_iou.tolist() == pytest.approx([0.8, 0.5, 0.4])
    assert joined.masks == [b"1.1", b"0.0", b"0.1"]
    assert join_sources([grid, peaks], duplicate_threshold=None).source.tolist() == [1, 1, 0, 0]


def test_one_source_is_left_as_it_is_and_the_cap_keeps_the_best() -> None:
    near = found([[0, 0, 10, 10], [0, 0, 10, 10], [5, 5, 9, 9]], [0.9, 0.8, 0.7], 0)
    assert len(join_sources([near], duplicate_threshold=0.5).boxes) == 3
    assert join_sources([near], duplicate_threshold=0.5, max_proposals=2).predicted_iou.tolist() == pytest.approx(
        [0.9, 0.8]
    )


def test_points_of_a_class_are_joined_and_a_lone_one_is_not_repeated() -> None:
    points = np.array([[1, 1], [2, 2], [3, 3], [4, 4], [5, 5]], np.float32)
    joint = joint_points(points, np.array([4, 7, 4, -1, -1]))
    assert [one.tolist() for one in joint] == [[[1, 1], [3, 3]]]
    assert joint_points(points[:0], np.zeros(0, np.int32)) == []


def test_points_prompt_as_the_engine_does_and_the_image_is_encoded_once(tiny_sam: Sam) -> None:
    engine = SamEngine(tiny_sam, settings=EngineSettings(points_per_side=2))
    image = engine.encode(noise_image(90, 120))
    points, labels = np.array([[20.0, 30.0], [60.0, 70.0], [90.0, 10.0]]), np.array([0, 0, 1])

    def of_source(points: np.ndarray, labels: np.ndarray, source: int, *, return_masks: bool = False) -> Proposals:
        prompts = point_prompts(points, labels, joint=True, source=source)
        peaks = PromptSet(prompts, 0.0, 0.0, None, keep_masks=(1, 2))
        return propose_from_sources(engine, image, [peaks], duplicate_threshold=0.5, return_masks=return_masks)

    some = of_source(points, labels, 2)
    (wanted,) = engine.propose(
        [image],
        [Prompts(points=points, joint=[points[:2]], source=np.full(4, 2, np.uint8))],
        pred_iou_threshold=0.0,
        stability_threshold=0.0,
        nms_threshold=None,
        keep_masks=(1, 2),
    )
    np.testing.assert_array_equal(some.boxes, join_sources([wanted], duplicate_threshold=None).boxes)
    assert set(some.source.tolist()) == {2}
    assert 0 < len(some.boxes) <= 8
    none = of_source(points[:0], labels[:0], 1, return_masks=True)
    assert none.boxes.shape == (0, 4)
    assert none.masks == []
    assert engine.encoder_calls == 1


def test_sources_are_suppressed_alone_and_then_joined(tiny_sam: Sam) -> None:
    engine = SamEngine(tiny_sam, settings=EngineSettings(points_per_side=3))
    image = engine.encode(noise_image(90, 120))
    points = point_prompts(np.array([[20.0, 30.0], [90.0, 10.0]]), np.array([0, 1]), joint=False, source=3)
    sets = [PromptSet(None, 0.3, 0.2, 0.7), PromptSet(points, 0.0, 0.0, None, keep_masks=(0, 2))]
    alone = [
        *engine.propose([image], pred_iou_threshold=0.3, stability_threshold=0.2, nms_threshold=0.7, return_masks=True),
        *engine.propose(
            [image],
            [points],
            pred_iou_threshold=0.0,
            stability_threshold=0.0,
            nms_threshold=None,
            keep_masks=(0, 2),
            return_masks=True,
        ),
    ]
    assert all(len(proposals.boxes) for proposals in alone)
    for cap in (None, 3):
        wanted = join_sources(alone, duplicate_threshold=0.8, max_proposals=cap)
        joined = propose_from_sources(
            engine, image, sets, duplicate_threshold=0.8, max_proposals=cap, return_masks=True
        )
        for name in ("boxes", "predicted_iou", "stability", "source"):
            np.testing.assert_array_equal(getattr(joined, name), getattr(wanted, name))
        assert joined.masks == wanted.masks
