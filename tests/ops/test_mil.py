"""Mining, assignment and losses against plain loops over their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from weaksam.ops.box_coding import decode_boxes, encode_boxes
from weaksam.ops.boxes import box_iou
from weaksam.ops.mil import (
    PseudoBoxes,
    Targets,
    assign,
    image_loss,
    mine_mist,
    mine_near_top,
    mine_top,
    refinement_loss,
    regression_loss,
    shared_regression_loss,
    wsddn_scores,
)

CASES = [(0, 3), (1, 2), (2, 3), (6, 2), (7, 1), (40, 3), (213, 4)]  # proposals, classes present
CLASSES = 6


def make_boxes(num: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    corners = torch.rand(num, 2, generator=random) * 80
    return torch.cat([corners, corners + 4 + torch.rand(num, 2, generator=random) * 60], 1)


def make_case(num: int, present: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores with many ties, and classes present."""
    random = torch.Generator().manual_seed(seed + 1)
    scores = (torch.rand(num, CLASSES, generator=random) * 20).round() / 20
    return make_boxes(num, seed), scores, torch.randperm(CLASSES, generator=random)[:present].sort().values


def iou_by_hand(a: list[float], b: list[float], *, plus: int = 1) -> float:
    """Published: inclusive corners; widths of right - left + 1, or without the 1."""
    a, b = ([*box[:2], box[2] - 1, box[3] - 1] for box in (a, b))
    left, top, right, bottom = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    shared = max(right - left + plus, 0) * max(bottom - top + plus, 0)
    first, second = ((box[2] - box[0] + plus) * (box[3] - box[1] + plus) for box in (a, b))
    return shared / (first + second - shared)


def as_set(pseudo: PseudoBoxes) -> list[tuple[int, int, float]]:
    found = zip(pseudo.rois.tolist(), pseudo.classes.tolist(), pseudo.scores.tolist(), strict=True)
    return [(roi, label, round(score, 6)) for roi, label, score in found]


@pytest.mark.parametrize(("num", "present"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_mist_mines_what_the_loop_mines(num: int, present: int, seed: int) -> None:
    boxes, scores, classes = make_case(num, present, seed)
    wanted = []
    for label in classes.tolist():
        column = scores[:, label].tolist()
        ranked = sorted(range(num), key=lambda i: -column[i])[: max(1, int(0.15 * num)) if num else 0]
        for rank, roi in enumerate(ranked):
            better = ranked[:rank]
            if all(iou_by_hand(boxes[roi].tolist(), boxes[other].tolist()) < 0.2 for other in better):
                wanted.append((roi, label, round(column[roi], 6)))
    assert as_set(mine_mist(box_iou(boxes, boxes), scores, classes)) == wanted


@pytest.mark.parametrize(("num", "present"), CASES)
def test_top_mining_gives_a_proposal_to_one_class_only(num: int, present: int) -> None:
    _, scores, classes = make_case(num, present)
    taken, wanted = set(), []
    for label in classes.tolist():
        left = [i for i in range(num) if i not in taken]
        if left:
            best = max(left, key=lambda i: (scores[i, label].item(), -i))
            taken.add(best)
            wanted.append((best, label, round(scores[best, label].item(), 6)))
    assert as_set(mine_top(scores, classes)) == wanted


@pytest.mark.parametrize(("num", "present"), CASES)
def test_near_top_mining_pools_classes_before_it_suppresses(num: int, present: int) -> None:
    boxes, _, classes = make_case(num, present)
    scores = torch.rand(num, CLASSES, generator=torch.Generator().manual_seed(5))
    found = [
        (scores[i, label].item(), i, label)
        for label in classes.tolist()
        for i in range(num)
        if scores[i, label] >= 0.9 * scores[:, label].max()
    ]
    wanted: list[tuple[int, int, float]] = []
    for score, roi, label in sorted(found, reverse=True):
        if all(iou_by_hand(boxes[roi].tolist(), boxes[kept].tolist(), plus=0) <= 0.5 for kept, _, _ in wanted):
            wanted.append((roi, label, round(score, 6)))
    assert as_set(mine_near_top(boxes, scores, classes)) == wanted


def test_no_class_and_no_proposal_mine_nothing() -> None:
    boxes, scores, _ = make_case(5, 2)
    none = torch.zeros(0, dtype=torch.int64)
    iou = box_iou(boxes, boxes)
    for pseudo in (mine_top(scores, none), mine_near_top(boxes, scores, none), mine_mist(iou, scores, none)):
        assert as_set(pseudo) == []
        targets = assign(iou, pseudo)
        assert targets.weights.tolist() == [0.0] * 5
        assert targets.labels.tolist() == [0] * 5
        assert regression_loss(torch.randn(5, 7, 4), boxes, targets) == 0
    empty = assign(torch.zeros(0, 0), mine_top(torch.zeros(0, CLASSES), torch.tensor([1])))
    assert refinement_loss(torch.zeros(0, 7), empty) == 0
    assert image_loss(torch.zeros(0, 7), torch.tensor([1]), background=True) == 0


@pytest.mark.parametrize(("num", "present"), [case for case in CASES if case[0]])
def test_each_proposal_takes_after_the_pseudo_box_it_overlaps_most(num: int, present: int) -> None:
    boxes, scores, classes = make_case(num, present)
    iou = box_iou(boxes, boxes)
    pseudo = mine_mist(iou, scores, classes)
    targets = assign(iou, pseudo)
    for i in range(num):
        overlaps = [iou_by_hand(boxes[i].tolist(), boxes[roi].tolist()) for roi in pseudo.rois.tolist()]
        best = max(range(len(overlaps)), key=lambda j: (overlaps[j], -j))
        assert targets.labels[i] == (pseudo.classes[best] + 1 if overlaps[best] >= 0.5 else 0)
        weight = pseudo.scores[best] if overlaps[best] > 0 else max(pseudo.scores)
        assert targets.weights[i] == weight


def test_a_proposal_that_overlaps_nothing_weighs_as_much_as_the_best_pseudo_box() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    pseudo = PseudoBoxes(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([0.25, 0.75]))
    targets = assign(box_iou(boxes, boxes), pseudo)
    assert targets.weights.tolist() == [0.25, 0.75, 0.75]
    assert targets.labels.tolist() == [1, 2, 0]


@pytest.mark.parametrize("background", [False, True])
def test_image_loss_is_the_cross_entropy_of_summed_scores(background: bool) -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, CLASSES + background, generator=random)
    scores = wsddn_scores(logits[0], logits[1])
    present = torch.tensor([1, 4])
    total = 0.0
    for column in range(scores.shape[1]):
        cls = [math.exp(logits[0, r, column]) / sum(math.exp(v) for v in logits[0, r]) for r in range(9)]
        det = [math.exp(logits[1, r, column]) / sum(math.exp(v) for v in logits[1, :, column]) for r in range(9)]
        found = sum(a * b for a, b in zip(cls, det, strict=True))
        is_there = column - background in present.tolist()
        total -= math.log(found if is_there else 1 - found)
    assert image_loss(scores, present, background=background).item() == pytest.approx(total / scores.shape[1], rel=1e-5)
    summed = image_loss(scores, present, background=background, reduction="sum")
    assert summed.item() == pytest.approx(total, rel=1e-5)


def test_losses_equal_sums_by_hand() -> None:
    random = torch.Generator().manual_seed(2)
    boxes = make_boxes(8)
    logits, offsets = torch.randn(8, 4, generator=random), torch.randn(8, 4, 4, generator=random)
    labels = torch.tensor([0, 1, 3, 0, 2, 1, 0, 3])
    targets = Targets(labels, torch.rand(8, generator=random), torch.tensor([0, 2, 2, 3, 4, 1, 0, 7]))
    classes = boxes_loss = 0.0
    for i in range(8):
        weight, row = targets.weights[i].item(), logits[i].tolist()
        classes += weight * (math.log(sum(map(math.exp, row))) - row[labels[i]])
        if labels[i] > 0:
            (left, top, right, bottom), (x1, y1, x2, y2) = boxes[targets.rois[i]].tolist(), boxes[i].tolist()
            wanted = [
                10 * ((left + right) / 2 - (x1 + x2) / 2) / (x2 - x1),
                10 * ((top + bottom) / 2 - (y1 + y2) / 2) / (y2 - y1),
                5 * math.log((right - left) / (x2 - x1)),
                5 * math.log((bottom - top) / (y2 - y1)),
            ]
            for found, value in zip(offsets[i, labels[i]].tolist(), wanted, strict=True):
                gap = abs(found - value)
                boxes_loss += weight * (gap * gap / 2 if gap < 1 else gap - 0.5)
    assert refinement_loss(logits, targets).item() == pytest.approx(classes / 8, rel=1e-5)
    assert regression_loss(offsets, boxes, targets).item() == pytest.approx(boxes_loss / 8, rel=1e-5)


def test_the_box_loss_that_classes_share_is_a_mean_over_objects() -> None:
    boxes, offsets = make_boxes(5), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    targets = Targets(torch.tensor([0, 2, 1, 0, 1]), torch.rand(5), torch.tensor([0, 3, 2, 3, 0]))
    total = 0.0
    for i in (1, 2, 4):
        wanted = encode_boxes(boxes[targets.rois[i]], boxes[i]).tolist()
        gaps = [abs(a - b) for a, b in zip(offsets[i].tolist(), wanted, strict=True)]
        total += targets.weights[i].item() * sum(gap * gap / 2 if gap < 1 else gap - 0.5 for gap in gaps)
    assert shared_regression_loss(offsets, boxes, targets).item() == pytest.approx(total / 12, rel=1e-5)
    none = Targets(torch.zeros(5, dtype=torch.int64), torch.ones(5), torch.arange(5))
    assert shared_regression_loss(offsets, boxes, none) == 0


def test_near_top_mining_suppresses_by_overlaps_without_plus_one() -> None:
    """45 of 90 from the first to the last pixel, 60 of 110 with the last."""
    boxes = torch.tensor([[0.0, 0, 11, 10], [0, 0, 6, 10]])
    scores = torch.tensor([[0.9], [0.85]])
    assert iou_by_hand(*boxes.tolist()) > 0.5 >= iou_by_hand(*boxes.tolist(), plus=0)
    assert as_set(mine_near_top(boxes, scores, torch.tensor([0]))) == [(0, 0, 0.9), (1, 0, 0.85)]


def test_an_overlap_of_a_half_is_an_object_but_for_classic_oicr() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 6]])
    pseudo = PseudoBoxes(torch.tensor([0]), torch.tensor([2]), torch.tensor([0.5]))
    iou = box_iou(boxes, boxes)
    assert assign(iou, pseudo).labels.tolist() == [3, 3, 3]
    assert assign(iou, pseudo, above=True).labels.tolist() == [3, 0, 3]


def test_the_published_oicr_adds_a_millionth_to_each_probability() -> None:
    logits = torch.tensor([[20.0, 0.0], [2.0, 1.0], [0.0, 40.0]], requires_grad=True)
    targets = Targets(torch.tensor([1, 0, 0]), torch.tensor([0.5, 1.0, 0.25]), torch.arange(3))
    p = [1 / (1 + math.exp(20)), 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(40))]
    by_hand = sum(-w * math.log(one + 1e-6) for w, one in zip([0.5, 1.0, 0.25], p, strict=True)) / 3
    loss = refinement_loss(logits, targets, eps=1e-6)
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert refinement_loss(logits, targets).item() > 1.5 * by_hand
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_decoding_undoes_encoding() -> None:
    boxes, anchors = make_boxes(20), make_boxes(20, seed=3)
    torch.testing.assert_close(decode_boxes(encode_boxes(boxes, anchors), anchors), boxes)
    grown = decode_boxes(torch.tensor([[0.0, 0, 1e4, 0]]), torch.tensor([[0.0, 0, 2, 2]]))
    assert (grown[0, 2] - grown[0, 0]).item() == pytest.approx(2 * 1000 / 16)
