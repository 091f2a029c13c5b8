"""Losses of every model under autocast to bf16, which processors and GPUs with bf16 train in by default."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.models.detectors import tiny_dino
from tests.models.detectors.test_targets import DETECTORS, one
from tests.models.pictures import total
from tests.models.wsod.nets import BOXES, make_image, make_noise
from weaksam.models.backbones.crop_net import CropNet
from weaksam.models.classifiers.build import build_classifier
from weaksam.models.wsod.network import METHODS, WsodNet, forward_losses

PICTURES = [tiny_dino.make_image(), tiny_dino.make_image(seed=1)]


def check_loss(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Twice: the second time, what is frozen is remembered."""
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
        assert value.isfinite()
        model.zero_grad()
        value.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is None or p.grad.isfinite().all() for p in trained)
    assert any(p.grad is not None and p.grad.any() for p in trained)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector(name: str) -> None:
    net = DETECTORS[name][0]().train()
    check_loss(net, lambda: total(net.losses(PICTURES, [one(), one()], 0)))


@pytest.mark.parametrize("name", ["small_rcnn", "small_mask_rcnn"])
def test_the_second_stage_of_a_small_detector(name: str) -> None:
    net = DETECTORS[name][0]().train()
    step = net.early_parameters()[1]
    check_loss(net, lambda: total(net.losses(PICTURES, [one(), one()], step)))


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn", "small_rcnn", "small_mask_rcnn"])
def test_boxes_are_float32(name: str) -> None:
    net = DETECTORS[name][0]().train()
    net.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        batch, maps = net._backbone_maps(PICTURES)  # pyright: ignore[reportAttributeAccessIssue]
        proposals, _ = net.rpn(batch, maps)  # pyright: ignore[reportCallIssue]
        found = net.detect(PICTURES)
    net.train()
    assert {p.dtype for p in proposals} == {one.boxes.dtype for one in found} == {torch.float32}
    # values of bf16 have 8 significant bits
    assert not all(torch.equal(p, p.bfloat16().float()) for p in proposals)


@pytest.mark.parametrize("backbone", ["frozen_sam", "efficientnet_lite0"])
def test_a_classifier(backbone: str) -> None:
    torch.manual_seed(0)
    model = build_classifier(backbone, 3).train()
    images = torch.randn(2, 3, 64, 64)
    check_loss(model, lambda: model(images).cls.sum() + model(images).patch.sum())


@pytest.mark.parametrize("backbone", [["frozen_sam"], ["efficientnet_lite0"], ["efficientnet_lite0", "frozen_sam"]])
def test_a_weakly_supervised_detector(backbone: list[str]) -> None:
    torch.manual_seed(0)
    net = WsodNet(CropNet(backbone, dim=64), 3, METHODS["mist"]).train()
    present = [torch.tensor([0, 2])]

    def loss() -> Tensor:
        (losses,), _ = forward_losses(net, [make_image()], [BOXES], present, make_noise([0], [len(BOXES)]))
        return torch.stack(list(losses.values())).sum()

    check_loss(net, loss)
