"""Overlaps of boxes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from weaksam.ops.boxes import box_iou, to_inclusive

SIDES = st.integers(0, 20)
BOXES = st.lists(st.tuples(SIDES, SIDES, SIDES, SIDES), max_size=6).map(
    lambda boxes: torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes], dtype=torch.float32).reshape(-1, 4)
)
NONE = torch.zeros(0, 4)


def pixels(box: torch.Tensor) -> set[tuple[int, int]]:
    """The slow twin: the pixels of a box."""
    left, top, right, bottom = (int(value) for value in box)
    return {(x, y) for x in range(left, right) for y in range(top, bottom)}


def test_no_boxes():
    some = torch.tensor([[0.0, 0, 1, 1]])
    assert box_iou(NONE, some).shape == (0, 1)
    assert box_iou(some, NONE).shape == (1, 0)
    assert to_inclusive(NONE).shape == (0, 4)


@given(BOXES, BOXES)
def test_overlaps_are_those_of_the_pixels(boxes, others):
    iou = box_iou(boxes, others)
    for i, box in enumerate(boxes):
        for j, other in enumerate(others):
            both, either = pixels(box) & pixels(other), pixels(box) | pixels(other)
            torch.testing.assert_close(iou[i, j], torch.tensor(len(both) / len(either) if either else 0.0))


@given(BOXES, BOXES)
def test_iou_is_symmetric(boxes, others):
    assert torch.equal(box_iou(boxes, others), box_iou(others, boxes).T)


def test_a_box_overlaps_itself_fully():
    assert box_iou(torch.tensor([[1.0, 2, 4, 9]]), torch.tensor([[1.0, 2, 4, 9]])).item() == 1.0


def test_a_box_inside_out_has_no_area():
    boxes = torch.tensor([[5.0, 0, 1, 3], [5.0, 3, 1, 0], [0, 0, 4, 4]])
    assert box_iou(boxes, boxes).tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_inclusive_boxes_end_one_pixel_earlier_and_empty_ones_stay():
    assert to_inclusive(torch.tensor([[2.0, 3, 5, 4], [0, 0, 0, 0]])).tolist() == [[2, 3, 4, 3], [0, 0, 0, 0]]
