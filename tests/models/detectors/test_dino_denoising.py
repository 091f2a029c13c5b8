"""DINO's noisy queries: their groups, and what sees them."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_convert

from tests.models.detectors.tiny_dino import CPU, NOTHING, ONE, SIZE, TWO, make_dino, make_image
from weaksam.models.detectors.base import Targets
from weaksam.models.detectors.dino_denoising import FILLER, Noised, noise_objects
from weaksam.models.detectors.normalized_boxes import to_relative
from weaksam.models.noise import make_generators


def make_noised(targets: list[Targets], size: int = 64, queries: int = 6) -> Noised:
    known = [to_relative(one, (size, size)) for one in targets]
    generators = make_generators(range(len(targets)), CPU)
    noised = noise_objects(known, generators, 3, queries=queries, label_noise=0.5, box_noise=1.0)
    assert noised is not None
    return noised


def test_noisy_queries_come_in_groups_of_near_and_far_copies() -> None:
    noised = make_noised([TWO, NOTHING, ONE], queries=300)
    assert noised.objects.shape == (3, 600)
    assert noised.num_groups.tolist() == [150, 1, 300]
    assert noised.objects[0, :8].tolist() == [0, 1, -1, -1, 0, 1, -1, -1]
    assert noised.groups[0, :8].tolist() == [0] * 4 + [1] * 4
    assert (noised.groups[1] == FILLER).all()
    assert (noised.objects[1] == -1).all()
    box = to_relative(ONE, (64, 64)).boxes[0]
    wanted = box_convert(box, "cxcywh", "xyxy")
    moved = box_convert(noised.references[2].sigmoid(), "cxcywh", "xyxy") - wanted
    shift = (moved / (box[2:].repeat(2) / 2)).abs()
    near = noised.objects[2] == 0
    assert shift[near].max() < 1
    assert shift[near].mean() == pytest.approx(0.5, abs=0.05)
    is_whole = noised.references[2].sigmoid()[:, 2] > 0.002  # sides that moved past each other leave next to nothing
    assert shift[~near & is_whole, 0].min() > 0.99
    redrawn = (noised.classes[2] != 1).float().mean()
    assert redrawn == pytest.approx(0.25 * 2 / 3, abs=0.05)


def test_more_objects_than_noisy_queries_make_one_group() -> None:
    many = Targets(ONE.boxes.repeat(9, 1), ONE.classes.repeat(9))
    noised = make_noised([many, NOTHING])
    assert noised.objects.shape == (2, 18)
    assert noised.num_groups.tolist() == [1, 1]
    generators = make_generators([0, 1], CPU)
    assert noise_objects([NOTHING, NOTHING], generators, 3, queries=6, label_noise=0.5, box_noise=1.0) is None


def test_a_noisy_query_is_seen_by_its_group_alone() -> None:
    net = make_dino()
    batch = net.normaliser([make_image(), make_image(seed=1)])
    noised, num = make_noised([TWO, ONE]), SIZE.queries
    plain, before = net(batch), net(batch, noised)
    references, classes = noised.references.clone(), noised.classes.clone()
    changed = noised.groups == 1
    references[changed] += 1.0
    classes[changed] = (classes[changed] + 1) % 3
    after = net(batch, noised._replace(references=references, classes=classes))
    for values, news, olds in zip(before.logits, after.logits, plain.logits, strict=True):
        torch.testing.assert_close(news[:, :num], values[:, :num], rtol=0, atol=1e-6)
        torch.testing.assert_close(olds, values[:, :num], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(news[:, num:][~changed], values[:, num:][~changed], rtol=0, atol=1e-6)
        assert (news[:, num:][changed] - values[:, num:][changed]).abs().amax(1).min() > 1e-3
    assert not noised.visible(num)[0, 0, :num, num:].any()
    assert noised.visible(num)[:, 0, :, :num].all()


def test_noisy_queries_see_the_others() -> None:
    net = make_dino()
    batch, noised = net.normaliser([make_image()]), make_noised([TWO])
    before = net(batch, noised).logits[-1][:, SIZE.queries :]
    with torch.no_grad():
        net.content.weight += torch.randn_like(net.content.weight)
    assert (net(batch, noised).logits[-1][:, SIZE.queries :] - before).abs().amax(2).min() > 1e-4
