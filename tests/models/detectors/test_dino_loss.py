"""DINO's losses and its matching, against plain formulas."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.models.detectors.tiny_dino import ONE, SIZE, TWO, make_dino, make_image
from weaksam.models.detectors.dino_loss import box_losses, focal_losses, match, matched_losses
from weaksam.models.detectors.normalized_boxes import to_relative
from weaksam.ops.roi_drop import RoiDropRules


def test_focal_loss_is_the_plain_formula() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, -1, 2, -1, 1])
    losses = focal_losses(logits, labels)
    for row, label, loss in zip(logits, labels, losses, strict=True):
        expected = 0.0
        for c, p in enumerate(row.sigmoid().tolist()):
            p_right, alpha = (p, 0.25) if c == label else (1 - p, 0.75)
            expected -= alpha * (1 - p_right) ** 2 * torch.tensor(p_right).log().item()
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_box_losses_are_the_plain_formulas() -> None:
    boxes, wanted = torch.tensor([[0.5, 0.5, 0.4, 0.2]]), torch.tensor([[0.6, 0.6, 0.2, 0.4]])
    l1, giou = box_losses(boxes, wanted)
    assert l1.item() == pytest.approx(0.6)
    shared, union, around = 0.2 * 0.2, 0.08 + 0.08 - 0.04, 0.4 * 0.4  # x 0.3..0.7, y 0.4..0.8
    assert giou.item() == pytest.approx(1 - (shared / union - (around - union) / around), rel=1e-4)


def test_matching_is_the_cheapest_of_all() -> None:
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 5, 3), torch.rand(2, 5, 4) * 0.4 + 0.2
    targets = [to_relative(TWO, (64, 64)), to_relative(ONE, (64, 64))]
    pairs = match(logits, boxes, targets)
    assert pairs.image.tolist() == [0, 0, 1]
    for i, one in enumerate(targets):
        costs = {}
        for queries in itertools.permutations(range(5), len(one.classes)):
            cost = 0.0
            for query, label, box in zip(queries, one.classes.tolist(), one.boxes, strict=True):
                p = logits[i, query, label].sigmoid().item()
                l1, giou = box_losses(boxes[i, query][None], box[None])
                focal = -0.25 * (1 - p) ** 2 * torch.tensor(p).log() + 0.75 * p**2 * torch.tensor(1 - p).log()
                cost += 2 * focal.item() + 5 * l1.item() + 2 * giou.item()
            costs[queries] = cost
        mine = pairs.image == i
        best = dict(zip(pairs.query[mine].tolist(), pairs.boxes[mine].tolist(), strict=True))
        for query, box in zip(min(costs, key=costs.__getitem__), one.boxes, strict=True):
            assert best[query] == pytest.approx(box.tolist())


def test_a_dropped_query_counts_nothing_and_what_is_left_weighs_as_before() -> None:
    torch.manual_seed(0)
    logits, boxes, known = torch.randn(1, 6, 3), torch.rand(1, 6, 4) * 0.4 + 0.2, [to_relative(TWO, (64, 64))]
    plain = matched_losses(logits, boxes, known, RoiDropRules(), 0)
    pairs = match(logits, boxes, known)
    labels = torch.full((1, 6), -1)
    labels[0, pairs.query] = pairs.classes
    focal, (l1, giou) = focal_losses(logits, labels), box_losses(boxes[0, pairs.query], pairs.boxes)
    matched = focal[0, pairs.query]
    assert plain.classes.item() == pytest.approx(focal.sum().item())
    worst = float(matched.max())
    rules = RoiDropRules("cls", cls_threshold=float(matched.mean()), start=3)
    early, late = (matched_losses(logits, boxes, known, rules, step) for step in (2, 3))
    assert early == plain
    assert late.classes.item() == pytest.approx(focal.sum().item() - worst, rel=1e-4)
    assert (late.boxes, late.giou) == (plain.boxes, plain.giou)
    assert (int(late.dropped_classes), int(late.dropped_boxes)) == (1, 0)
    late = matched_losses(logits, boxes, known, RoiDropRules("reg", reg_threshold=float(l1.mean()), start=0), 0)
    kept = int(l1.argmin())
    assert late.classes == plain.classes
    assert late.boxes.item() == pytest.approx(5 * l1[kept].item(), rel=1e-4)
    assert late.giou.item() == pytest.approx(2 * giou[kept].item(), rel=1e-4)
    assert int(late.dropped_boxes) == 1


def test_drops_are_told_and_touch_matched_queries_of_the_decoder_alone() -> None:
    net = make_dino(drop=RoiDropRules("independent", cls_threshold=0.0, reg_threshold=0.0, start=0))
    images = [make_image()]
    torch.manual_seed(5)
    losses = net.losses(images, [TWO], 0)
    assert int(losses["dropped_class"]) == int(losses["dropped_box"]) == 2 * SIZE.decoder_layers
    assert losses["loss_box"] == losses["loss_giou"] == 0
    net.drop = RoiDropRules()
    torch.manual_seed(5)
    plain = net.losses(images, [TWO], 0)
    assert "dropped_class" not in plain
    assert (plain["loss_encoder"], plain["loss_denoising"]) == (losses["loss_encoder"], losses["loss_denoising"])
    assert plain["loss_class"] > losses["loss_class"] > 0
