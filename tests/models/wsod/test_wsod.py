"""The weakly supervised detector: backbones, dropblock, heads, losses and the training task."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import nn
from torchvision.ops import clip_boxes_to_image

from tests.models.wsod.nets import BOXES, make_image, make_net, make_noise
from weaksam.models.backbones.crop_net import CropNet
from weaksam.models.noise import dropout
from weaksam.models.wsod.dropblock import ConcreteDropBlock
from weaksam.models.wsod.network import METHODS, WsodNet, forward_losses, wsod_losses
from weaksam.ops import mil
from weaksam.ops.box_coding import decode_boxes
from weaksam.ops.boxes import box_iou


def test_noise_of_a_sample_does_not_depend_on_its_neighbours() -> None:
    alone = make_noise([7], [3]).uniform(2)
    among = make_noise([5, 7, 9], [2, 3, 1]).uniform(2)
    torch.testing.assert_close(among[2:5], alone)
    x = torch.ones(4000, 10)
    dropped = dropout(x, make_noise([1], [4000]))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert dropout(x, None) is x


def test_dropblock_drops_blocks_and_learns_to_raise_the_loss() -> None:
    torch.manual_seed(0)
    block = ConcreteDropBlock(4)
    pooled = torch.rand(60, 4, 7, 7, requires_grad=True)
    noise = functools.partial(make_noise, [1, 2], [40, 20])
    keep = block.draw(pooled.detach(), noise())
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert 0.02 < 1 - keep.mean().item() < 0.3
    for one in keep[:, 0][keep[:, 0].amin((1, 2)) == 0]:  # every hole holds a whole block, or one cut by the border
        holes = 1 - one
        eroded = -torch.nn.functional.max_pool2d(-torch.nn.functional.pad(holes, (1, 1, 1, 1), value=1)[None], 3, 1)
        opened = torch.nn.functional.max_pool2d(eroded, 3, 1, padding=1)[0]
        torch.testing.assert_close(opened, holes)
    dropped = block(pooled, noise(), learns=True)
    first = dropped[:40]
    assert first[first > 0].numel() / first.numel() == pytest.approx(keep[:40].mean().item(), abs=1e-6)
    dropped.sum().backward()
    reversed_grad = block.shortcut.weight.grad.clone()
    block.zero_grad()
    scaled = torch.cat([one * one.numel() / one.sum() for one in block.draw(pooled.detach(), noise()).split([40, 20])])
    (pooled.detach() * scaled).sum().backward()
    torch.testing.assert_close(reversed_grad, -block.shortcut.weight.grad)
    block.zero_grad()
    block(pooled, noise(), learns=False).sum().backward()
    assert block.shortcut.weight.grad is None


@pytest.mark.parametrize("second_pass", [False, True])
def test_the_detector_lowers_what_the_dropblock_raises(second_pass: bool) -> None:
    net = make_net(dropblock=True)
    noise = make_noise([3], [5])
    losses, adverse = forward_losses(net, [make_image()], [BOXES], [torch.tensor([1])], noise, second_pass=second_pass)
    total = torch.stack(list(losses[0].values())).sum() + adverse - adverse.detach()
    total.backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    assert net.dropblock.shortcut.weight.grad.abs().sum() > 0
    if second_pass:  # the detector's gradient is the first pass's alone
        learnt = {name: p for name, p in net.named_parameters() if p.requires_grad and not name.startswith("dropblock")}
        others = [p.grad.clone() for p in learnt.values()]
        net.zero_grad()
        noise = make_noise([3], [5])
        (found,) = net.heads(net.pool([make_image()], [BOXES]), [5], noise)
        torch.stack(list(wsod_losses(found, BOXES, torch.tensor([1]), net.rules).values())).sum().backward()
        torch.testing.assert_close(others, [p.grad for p in learnt.values()])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("present", [[], [1], [0, 1, 2]])
@pytest.mark.parametrize("num", [1, 3, 5])
def test_losses_are_finite_whatever_the_image_holds(method: str, present: list[int], num: int) -> None:
    net = make_net(method)
    classes = torch.tensor(present, dtype=torch.int64)
    losses, _ = forward_losses(net, [make_image()], [BOXES[:num]], [classes], make_noise([0], [num]))
    total = torch.stack(list(losses[0].values())).sum()
    total.backward()
    assert total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


def test_mining_and_loss_of_oicr_are_those_of_its_published_code() -> None:
    """Overlaps without "+1" for mining and assignment, and a millionth more in the loss of every head."""
    net = make_net("oicr")
    (found,) = net.heads(net.pool([make_image()], [BOXES]), [5])
    present, ends = torch.tensor([0, 2]), BOXES - torch.tensor([0.0, 0, 1, 1])
    source, total = mil.wsddn_scores(found.cls, found.det), 0.0
    for logits in found.refine:
        targets = mil.assign(box_iou(ends, ends), mil.mine_near_top(BOXES, source, present))
        p = logits.softmax(1)[torch.arange(5), targets.labels]
        total += (-(p + 1e-6).log() * targets.weights).mean().item()
        source = logits.softmax(1)[:, 1:]
    losses = wsod_losses(found, BOXES, present, net.rules)
    assert losses["refine_loss"].item() == pytest.approx(total, rel=1e-5)
    assert set(losses) == {"image_loss", "refine_loss"}


def test_one_box_layer_for_all_classes_learns_from_the_last_pseudo_boxes() -> None:
    torch.manual_seed(0)
    rules = dataclasses.replace(METHODS["oicr"], shared_boxes=True)
    net = WsodNet(CropNet(dim=16), 3, rules)
    nn.init.normal_(net.bbox_pred.weight, std=0.5)
    found = net.heads(net.pool([make_image(), make_image(1)], [BOXES, BOXES[:2]]), [5, 2])
    assert [one.shared.shape for one in found] == [(5, 4), (2, 4)]
    losses = wsod_losses(found[0], BOXES, torch.tensor([1]), rules)
    ends = BOXES - torch.tensor([0.0, 0, 1, 1])
    targets = mil.assign(
        box_iou(ends, ends), mil.mine_near_top(BOXES, found[0].refine[1].softmax(1)[:, 1:], torch.tensor([1]))
    )
    torch.testing.assert_close(losses["box_loss"], 30 * mil.shared_regression_loss(found[0].shared, BOXES, targets))
    losses["box_loss"].backward()
    assert net.bbox_pred.weight.grad.abs().sum() > 0
    scores, moved = net.eval().detect(make_image(), BOXES)
    assert scores.shape == (5, 3)
    assert torch.equal(moved[:, 0], moved[:, 2])
    with torch.no_grad():
        (again,) = net.heads(net.pool([make_image()], [BOXES]), [5])
    wanted = clip_boxes_to_image(decode_boxes(again.shared, BOXES), (48, 64))
    torch.testing.assert_close(moved[:, 1], wanted)
    assert not torch.allclose(wanted, BOXES)


def test_a_prior_of_the_proposals_shifts_the_detection_stream_alone() -> None:
    net = make_net()
    (found,) = net.heads(net.pool([make_image()], [BOXES]), [5])
    prior = torch.tensor([0.0, -50, -50, -50, -50])
    losses = wsod_losses(found, BOXES, torch.tensor([1]), net.rules, prior)
    alone = mil.image_loss(found.cls[:1].softmax(1), torch.tensor([1]), background=True)
    torch.testing.assert_close(losses["image_loss"], alone)
    same = wsod_losses(found, BOXES, torch.tensor([1]), net.rules, torch.full((5,), -3.0))
    torch.testing.assert_close(same, wsod_losses(found, BOXES, torch.tensor([1]), net.rules))


def test_detections_are_the_mean_of_the_heads() -> None:
    net = make_net().eval()
    scores, boxes = net.detect(make_image(), BOXES)
    x = net.roi_net.neck(net.roi_net.pool(make_image(), BOXES))
    wanted = sum(getattr(net, f"ref{k}")(x).softmax(1) for k in (1, 2, 3))[:, 1:] / 3
    torch.testing.assert_close(scores, wanted)
    assert boxes.shape == (5, 3, 4)
    assert boxes.min() >= 0
    assert (boxes <= torch.tensor([64.0, 48, 64, 48])).all()
    _, still = make_net("oicr").detect(make_image(), BOXES)
    torch.testing.assert_close(still[:, 0], BOXES)
