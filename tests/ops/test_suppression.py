"""Greedy suppression, by score and in order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weaksam.ops import suppression
from weaksam.ops.boxes import box_iou
from weaksam.ops.suppression import nms, nms_of_mask_boxes, suppress_in_order

NONE = torch.zeros(0, 4)
# No ratio of small integers: at exact equality single and double precision disagree.
THRESHOLDS = st.sampled_from([0.101, 0.303, 0.503, 0.701, 0.899])


@st.composite
def scored_boxes(draw):
    """Up to 12 boxes with scores that all differ."""
    side = st.integers(1, 12)
    boxes = draw(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), side, side), max_size=12))
    scores = draw(st.permutations(range(len(boxes))))
    xyxy = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes], dtype=torch.float32).reshape(-1, 4)
    return xyxy, torch.tensor(scores, dtype=torch.float32) / 100


def slow_suppression(boxes: torch.Tensor, order: list[int], threshold: float) -> list[int]:
    """The slow twin: one pair at a time."""
    kept: list[int] = []
    for index in order:
        if all(box_iou(boxes[index, None], boxes[other, None]).item() <= threshold for other in kept):
            kept.append(index)
    return kept


def test_no_boxes():
    assert nms(NONE, torch.zeros(0), threshold=0.5).tolist() == []
    assert nms_of_mask_boxes(NONE, torch.zeros(0), threshold=0.5).tolist() == []
    assert suppress_in_order(NONE, threshold=0.5).tolist() == []


@given(scored_boxes(), THRESHOLDS)
def test_nms_is_the_slow_one(given_boxes, threshold):
    boxes, scores = given_boxes
    order = scores.argsort(descending=True).tolist()
    assert nms(boxes, scores, threshold=threshold).tolist() == slow_suppression(boxes, order, threshold)


@given(scored_boxes(), THRESHOLDS)
def test_nms_is_idempotent(given_boxes, threshold):
    boxes, scores = given_boxes
    kept = nms(boxes, scores, threshold=threshold)
    assert nms(boxes[kept], scores[kept], threshold=threshold).tolist() == list(range(len(kept)))


@given(scored_boxes(), THRESHOLDS)
def test_suppression_in_order_is_the_slow_one(given_boxes, threshold):
    boxes, _ = given_boxes
    expected = slow_suppression(boxes, list(range(len(boxes))), threshold)
    assert suppress_in_order(boxes, threshold=threshold).tolist() == expected


def test_suppression_in_order_does_not_depend_on_blocks(monkeypatch):
    corners = torch.randint(0, 30, (60, 2), generator=torch.Generator().manual_seed(0)).float()
    boxes = torch.cat([corners, corners + 20], dim=1)
    expected = suppress_in_order(boxes, threshold=0.5).tolist()
    monkeypatch.setattr(suppression, "_BLOCK", 7)
    assert suppress_in_order(boxes, threshold=0.5).tolist() == expected


@pytest.mark.parametrize(("size", "kept"), [(2, 2), (30, 1)])
def test_mask_boxes_are_compared_from_first_to_last_pixel(size, kept):
    # Side by side by one pixel: of 2 x 2 boxes (1 x 1 from first to last pixel) nothing is shared.
    boxes = torch.tensor([[0.0, 0, size, size], [1, 0, size + 1, size]])
    assert len(nms_of_mask_boxes(boxes, torch.tensor([0.9, 0.8]), threshold=0.3)) == kept
    assert len(nms(boxes, torch.tensor([0.9, 0.8]), threshold=0.3)) == 1


def test_boxes_one_pixel_wide_survive_each_other():
    boxes = torch.tensor([[4.0, 4, 5, 9], [4, 4, 5, 9]])
    assert nms_of_mask_boxes(boxes, torch.tensor([0.2, 0.7]), threshold=0.5).tolist() == [1, 0]
