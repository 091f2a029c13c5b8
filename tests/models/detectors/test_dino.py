"""DINO: its geometry, its queries and who sees whom, its losses, and that it learns."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from tests.models.detectors.tiny_dino import (
    CPU,
    NOTHING,
    ONE,
    SIZE,
    TWO,
    TinyPyramid,
    check_learnt,
    draw_rectangles,
    make_dino,
    make_image,
)
from tests.models.pictures import learn, total
from weaksam.models.backbones.pyramids import ResNet50
from weaksam.models.detectors.base import Targets
from weaksam.models.detectors.dino import Dino
from weaksam.models.detectors.dino_layers import InsideNorm
from weaksam.models.detectors.normalized_boxes import inverse_sigmoid
from weaksam.models.noise import make_generators


def test_a_layer_learns_from_its_boxes_and_the_next_ones_alone() -> None:
    net = make_dino(dataclasses.replace(SIZE, decoder_layers=4))
    answers = net(net.normaliser([make_image()]))
    heads = [head.layers[-1].bias for head in net.decoder.box_heads]  # pyright: ignore
    for layer, boxes in enumerate(answers.boxes):
        grads = torch.autograd.grad(boxes.sum(), heads, retain_graph=True, allow_unused=True)
        reached = [k for k, grad in enumerate(grads) if grad is not None and grad.abs().sum() > 0]
        assert reached == [k for k in (layer - 1, layer) if k >= 0]
    chosen = torch.autograd.grad(answers.boxes[0].sum(), list(net.proposal_box.parameters()), allow_unused=True)
    assert all(grad is None for grad in chosen)


def test_the_encoders_heads_learn() -> None:
    net = make_dino()
    loss = net.losses([make_image()], [TWO], 0)["loss_encoder"]
    heads = [*net.proposal.parameters(), *net.proposal_class.parameters(), *net.proposal_box.parameters()]
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(loss, heads))


@pytest.mark.parametrize("targets", [[TWO, ONE], [NOTHING, ONE], [NOTHING, NOTHING]])
@pytest.mark.parametrize("num_denoising", [6, 0])
def test_every_weight_takes_part_in_every_step(targets: list[Targets], num_denoising: int) -> None:
    net = make_dino(dataclasses.replace(SIZE, num_denoising=num_denoising))
    losses = net.losses([make_image(), make_image(48, 80, seed=1)], targets, 0)
    assert set(losses) == {f"loss_{kind}" for kind in ("class", "box", "giou", "aux", "encoder", "denoising")}
    assert all(torch.isfinite(value) for value in losses.values())
    total(losses).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name


def test_losses_of_a_batch_are_the_sum_of_its_images() -> None:
    """With the noise on: each image has a generator of its own, so it is the same in a batch and apart.

    Sizes and numbers of objects differ, so padding and filler are there.
    """
    net = make_dino(boxes_per_image=2.5)
    images, targets = [make_image(), make_image(48, 100, seed=1), make_image(60, 50, seed=2)], [TWO, ONE, ONE]
    together = net.losses(images, targets, 0, make_generators(range(3), CPU))
    rows = zip(images, targets, make_generators(range(3), CPU), strict=True)
    apart = [net.losses([image], [target], 0, [generator]) for image, target, generator in rows]
    for name, value in together.items():
        torch.testing.assert_close(value, sum(one[name] for one in apart), rtol=1e-4, atol=1e-5)


def test_losses_are_divided_by_the_boxes_per_image() -> None:
    images, targets, net = [make_image()], [TWO], make_dino()
    torch.manual_seed(5)
    ones = net.losses(images, targets, 0)
    net.boxes_per_image = 4.0
    torch.manual_seed(5)
    for name, value in net.losses(images, targets, 0).items():
        torch.testing.assert_close(value * 4, ones[name])


def test_detections_do_not_depend_on_a_larger_image_beside() -> None:
    net = make_dino().eval()
    small = make_image(40, 56)
    (alone,), (beside, _) = net.detect([small]), net.detect([small, make_image(120, 90, seed=1)])
    torch.testing.assert_close(beside.boxes, alone.boxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(beside.scores, alone.scores, rtol=1e-4, atol=1e-6)
    assert torch.equal(beside.classes, alone.classes)


def test_detections_are_inside_the_image_and_best_first() -> None:
    net = make_dino().eval()
    images = [make_image(40, 56), make_image(70, 33, seed=1)]
    for image, found in zip(images, net.detect(images), strict=True):
        assert found.boxes.shape == (SIZE.detections, 4)
        assert found.boxes.dtype == torch.float32
        assert found.classes.dtype == torch.int64
        height, width = image.shape[1:]
        assert found.boxes.min() >= 0
        assert (found.boxes <= torch.tensor([width, height, width, height])).all()
        assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
        assert (found.scores.diff() <= 0).all()
        assert ((found.scores > 0) & (found.scores < 1)).all()
        assert 0 <= found.classes.min() <= found.classes.max() < 3


def test_an_image_may_have_fewer_cells_than_there_are_queries() -> None:
    net = make_dino(dataclasses.replace(SIZE, queries=100, detections=400)).eval()
    image = make_image(16, 12)
    (found,) = net.detect([image])
    assert len(found.boxes) == 300
    answers = net(net.normaliser([image]))
    assert (answers.chosen.logits == -30).all(2).sum() > 40
    total(net.losses([image], [Targets(torch.tensor([[2.0, 2, 9, 9]]), torch.tensor([1]))], 0)).backward()


@pytest.mark.parametrize(("maps", "levels"), [(1, 1), (1, 3), (2, 4), (3, 2), (3, 5)])
def test_any_pyramid_and_any_number_of_levels(maps: int, levels: int) -> None:
    torch.manual_seed(0)
    net = Dino(TinyPyramid(maps=maps), 3, dataclasses.replace(SIZE, levels=levels))
    images = [make_image(), make_image(72, 40, seed=1)]
    assert torch.isfinite(total(net.losses(images, [TWO, ONE], 0)))
    assert len(net.levels.strides) == levels
    assert len(net.eval().detect(images)) == 2


def test_it_runs_in_bfloat16() -> None:
    net = make_dino()
    with torch.autocast("cpu", torch.bfloat16):
        losses = net.losses([make_image()], [TWO], 0)
    assert all(value.dtype == torch.float32 for value in losses.values())
    total(losses).backward()
    assert torch.isfinite(total(losses))


def test_normalisation_leaves_padding_out() -> None:
    norm, x = InsideNorm(4, 8), torch.randn(2, 8, 6, 5) * 3 + 1
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    plain = nn.GroupNorm(4, 8)
    plain.load_state_dict(norm.state_dict())
    inside = torch.zeros(2, 6, 5, dtype=torch.bool)
    inside[0], inside[1, :4, :3] = True, True
    normed = norm(x, inside)
    torch.testing.assert_close(normed[0], plain(x[:1])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(normed[1, :, :4, :3], plain(x[1:, :, :4, :3])[0], rtol=1e-4, atol=1e-5)
    assert (normed[1, :, 4:] == 0).all()


def test_the_inverse_sigmoid_bounds_a_share_and_its_rest_each_on_its_own() -> None:
    shares = torch.tensor([-1.0, 0.0, 1e-4, 0.2, 0.5, 0.9999, 1.0, 2.0])
    for eps in (1e-3, 1e-5):
        inside = [min(max(one, 0.0), 1.0) for one in shares.double().tolist()]
        wanted = [math.log(max(one, eps) / max(1 - one, eps)) for one in inside]
        torch.testing.assert_close(inverse_sigmoid(shares, eps), torch.tensor(wanted), rtol=1e-4, atol=1e-5)
    assert inverse_sigmoid(torch.tensor(0.0)).item() == pytest.approx(math.log(1e-3))  # not log(1e-3 / 0.999)
    assert inverse_sigmoid(torch.tensor([1.0]).bfloat16()).dtype == torch.float32


def test_answers_and_references_are_moved_as_published() -> None:
    """An answer starts from its reference bounded by 1e-5, the next reference by 1e-3."""
    net = make_dino().eval()
    decoder = net.decoder
    for layer in decoder.layers:
        layer.forward = lambda queries, *_, **__: queries
    batch = net.normaliser([make_image()])
    cells = net.levels(net.pyramid(batch.pixels)[-net.num_maps :], batch)
    queries, start = torch.randn(1, 4, 32), torch.tensor([[[-9.0, 9.0, 0.5, -1.0]]]).expand(1, 4, 4)
    _, boxes = decoder(queries, start, torch.zeros(1, 1, 32), cells, None)
    normed, reference, before = decoder.norm(queries), start.sigmoid(), start.sigmoid()
    for move, found in zip(decoder.box_heads, boxes, strict=True):
        torch.testing.assert_close(found, (move(normed) + inverse_sigmoid(before, 1e-5)).sigmoid())
        before = reference = (move(queries) + inverse_sigmoid(reference, 1e-3)).sigmoid()


def test_detections_are_ordinary_tensors() -> None:
    (found,) = make_dino().eval().detect([make_image()])
    assert not any(part.is_inference() for part in found[:3])


def test_weights_go_there_and_back() -> None:
    net, torn = make_dino().eval(), Dino(TinyPyramid(), 3, SIZE).eval()
    torn.load_state_dict(net.state_dict())
    image = make_image()
    torch.testing.assert_close(torn.detect([image])[0], net.detect([image])[0])


def test_the_published_size_has_the_published_weights() -> None:
    net = Dino(ResNet50(), 80)
    assert net.levels.strides == [8, 16, 32, 64]
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert millions == pytest.approx(47.7, abs=0.3)  # arXiv 2203.03605, table 1: 47M
    assert len(list(net.backbone_parameters())) == len(list(net.pyramid.parameters()))
    assert net.proposal_class.bias.sigmoid().detach().tolist() == pytest.approx([0.01] * 80)


@pytest.mark.slow
def test_it_learns_a_few_images_by_heart() -> None:
    images, targets = draw_rectangles()
    torch.manual_seed(0)
    size = dataclasses.replace(SIZE, decoder_layers=2, levels=3, queries=16, num_denoising=4)
    net = Dino(TinyPyramid(), 3, size, boxes_per_image=2.5)
    learn(net, images, targets, steps=250, lr=4e-3)
    check_learnt(net, images, targets)
