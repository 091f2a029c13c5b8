"""RT-DETRv2: its form as a detector, what its losses are divided by, and that it learns."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from tests.models.detectors.tiny_dino import NOTHING, ONE, TWO, TinyPyramid, check_learnt, draw_rectangles, make_image
from tests.models.pictures import learn, total
from weaksam.models.backbones.pyramids import ResNet50
from weaksam.models.detectors.base import Targets
from weaksam.models.detectors.rt_detr_v2 import RtDetrV2, RtDetrV2Size

SIZE = RtDetrV2Size(image=64, dim=32, decoder_layers=2, queries=20, num_denoising=6, detections=30)
KINDS = ("class", "box", "giou", "aux", "encoder", "denoising")


def make_net(size: RtDetrV2Size = SIZE, **options) -> RtDetrV2:
    torch.manual_seed(0)
    return RtDetrV2(TinyPyramid(), 3, size, **options)


def losses_of(net: RtDetrV2, images: list[Tensor], targets: list[Targets]) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return net.losses(images, targets, 0)


@pytest.mark.parametrize("targets", [[TWO, ONE], [NOTHING, ONE], [NOTHING, NOTHING]])
@pytest.mark.parametrize("num_denoising", [6, 0])
def test_every_weight_takes_part_in_every_step(targets: list[Targets], num_denoising: int) -> None:
    net = make_net(dataclasses.replace(SIZE, num_denoising=num_denoising))
    losses = net.losses([make_image(), make_image(50, 80, seed=1)], targets, 0)
    assert set(losses) == {f"loss_{kind}" for kind in KINDS}
    total(losses).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
    assert (losses["loss_denoising"] > 0) == (num_denoising > 0 and targets[1] is ONE)


def test_losses_are_sums_divided_by_the_boxes_per_image() -> None:
    """With BatchNorms still and without noise a batch is the sum of its images."""
    images, targets = [make_image(), make_image(seed=1)], [TWO, ONE]
    net = make_net(dataclasses.replace(SIZE, num_denoising=0)).eval()
    together = losses_of(net, images, targets)
    apart = [losses_of(net, [image], [target]) for image, target in zip(images, targets, strict=True)]
    for name, value in together.items():
        torch.testing.assert_close(value, apart[0][name] + apart[1][name], rtol=1e-4, atol=1e-5)
    net.boxes_per_image = 4.0
    for name, value in losses_of(net, images, targets).items():
        torch.testing.assert_close(value * 4, together[name])


def test_noisy_queries_are_not_matched() -> None:
    """The last layer's loss and the others' are of ordinary queries: as many as without noise, and the same ones."""
    net = make_net()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.0
    with_noise = losses_of(net, [make_image()], [TWO])
    net.network.config.num_denoising = 0
    without = losses_of(net, [make_image()], [TWO])
    for kind in ("class", "box", "giou", "aux", "encoder"):
        torch.testing.assert_close(with_noise[f"loss_{kind}"], without[f"loss_{kind}"], rtol=1e-4, atol=1e-5)


def test_detections_are_inside_the_image_and_best_first() -> None:
    net = make_net().eval()
    images = [make_image(40, 56), make_image(70, 130, seed=1)]
    for image, found in zip(images, net.detect(images), strict=True):
        assert found.boxes.shape == (30, 4)
        assert found.boxes.dtype == found.scores.dtype == torch.float32
        height, width = image.shape[1:]
        assert found.boxes.min() >= 0
        assert (found.boxes <= torch.tensor([width, height, width, height])).all()
        assert (found.boxes[:, 2:] >= found.boxes[:, :2]).all()
        assert (found.scores.diff() <= 0).all()
        assert 0 <= found.classes.min() <= found.classes.max() < 3
    (alone,) = net.detect(images[:1])
    torch.testing.assert_close(alone.boxes, net.detect(images)[0].boxes, rtol=0, atol=1e-3)


def test_weights_start_where_a_signal_passes() -> None:
    net = make_net()
    gains = [layer.weight for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert gains
    assert all((gain == 1).all() for gain in gains)
    assert net.network.decoder.class_embed[0].bias.sigmoid().tolist() == pytest.approx([0.01] * 3)  # pyright: ignore
    assert net.network.decoder.bbox_embed[0] is not net.network.decoder.bbox_embed[1]  # pyright: ignore


@pytest.mark.parametrize("maps", [1, 2])
def test_a_pyramid_may_have_fewer_maps(maps: int) -> None:
    net = RtDetrV2(TinyPyramid(maps=maps), 3, SIZE)
    assert torch.isfinite(total(net.losses([make_image(), make_image(seed=1)], [TWO, ONE], 0)))


def test_weights_go_there_and_back() -> None:
    net, torn = make_net().eval(), RtDetrV2(TinyPyramid(), 3, SIZE).eval()
    torn.load_state_dict(net.state_dict())
    torch.testing.assert_close(torn.detect([make_image()])[0], net.detect([make_image()])[0])


def test_the_published_size_has_the_published_weights() -> None:
    net = RtDetrV2(ResNet50(), 80)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert millions == pytest.approx(42, abs=1.0)  # arXiv 2407.17140, table 2
    assert len(list(net.backbone_parameters())) == len(list(net.network.backbone.parameters()))


@pytest.mark.slow
def test_it_learns_a_few_images_by_heart() -> None:
    images, targets = draw_rectangles()
    net = make_net(boxes_per_image=2.5)
    learn(net, images, targets, steps=110, lr=4e-3)
    check_learnt(net, images, targets)
