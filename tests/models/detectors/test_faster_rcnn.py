"""Faster R-CNN against torchvision's own, RoI drop inside it against brute force, and what it can learn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from tests.models.pictures import best_box_overlap, squares_and_discs
from weaksam.models.backbones.pyramids import Pyramid, ResNet50
from weaksam.models.detectors.base import Targets
from weaksam.models.detectors.faster_rcnn import FasterRcnn, FasterRcnnSize, roi_losses
from weaksam.models.detectors.rcnn_parts import ImageSampler
from weaksam.models.noise import make_generators
from weaksam.ops.roi_drop import RoiDropRules

CPU = torch.device("cpu")
SMALL = FasterRcnnSize(dim=32, hidden=64, anchors=(16, 32, 64), roi_samples=64, proposals=100, pre_nms=(200, 200))


class TinyPyramid(Pyramid):
    channels, strides = (16, 32), (4, 8)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU())

    def forward(self, pixels: Tensor) -> list[Tensor]:
        fine = self.first(pixels)
        return [fine, self.second(fine)]


def tiny(**changes: Any) -> FasterRcnn:
    torch.manual_seed(0)
    return FasterRcnn(TinyPyramid(), 2, SMALL, **changes)


def twin(ours: FasterRcnn) -> FasterRCNN:
    """The one of torchvision, sharing all weights and the samplers, which draw for it what they draw for ours."""
    backbone: Any = ours.backbone
    backbone.out_channels = SMALL.dim
    theirs = FasterRCNN(
        backbone,
        min_size=64,
        max_size=64,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=AnchorGenerator(tuple((a,) for a in SMALL.anchors), ((0.5, 1.0, 2.0),) * 3),
        rpn_pre_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=100,
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], output_size=7, sampling_ratio=2),
        box_head=ours.roi_heads.box_head,
        box_predictor=ours.roi_heads.box_predictor,
        box_batch_size_per_image=64,
        box_score_thresh=0.05,
    )
    theirs.rpn.load_state_dict(ours.rpn.state_dict())
    theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler = ours.samplers
    theirs.transform.torch_choice = lambda sizes: sizes[0]  # it would draw a random number, which ours does not
    return theirs


def test_a_checkpoint_has_the_keys_and_shapes_of_torchvisions() -> None:
    ours = FasterRcnn(ResNet50(), 20).state_dict()
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=21).state_dict()
    theirs = {key: value for key, value in theirs.items() if "num_batches" not in key}  # its BatchNorm is not frozen
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("count", [1, 2])
def test_losses_equal_torchvisions(count: int) -> None:
    images, targets = squares_and_discs(count, side=64)
    ours = tiny(box_loss="smooth_l1").train()
    theirs = twin(ours).train()
    listed = [{"boxes": one.boxes, "labels": one.classes + 1} for one in targets]
    ours._start_step(0, make_generators(range(count), CPU))
    wanted = theirs(list(ours.normaliser(images).pixels), listed)
    got = ours.losses(images, targets, 0, make_generators(range(count), CPU))
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert got[key].item() == pytest.approx(count * value.item(), rel=1e-4), key  # theirs is a mean over images


def test_detections_equal_torchvisions() -> None:
    images, _ = squares_and_discs(2, side=64)
    ours = tiny().eval()
    for found, wanted in zip(ours.detect(images), twin(ours).eval()(list(ours.normaliser(images).pixels)), strict=True):
        assert len(found.boxes) == len(wanted["boxes"]) > 0
        assert torch.allclose(found.boxes, wanted["boxes"], atol=1e-3)
        assert torch.equal(found.classes + 1, wanted["labels"])
        assert torch.allclose(found.scores, wanted["scores"], atol=1e-5)


def test_an_image_is_sampled_as_torchvision_samples_it_alone() -> None:
    torch.manual_seed(0)
    labels = [torch.randint(-1, 3, (size,)) for size in (200, 300)]
    sampler = ImageSampler(32, 0.25)
    sampler.generators = make_generators([3, 4], CPU)
    chosen = sampler(labels)
    for i, seed in enumerate((3, 4)):
        torch.manual_seed(seed)
        alone = BalancedPositiveNegativeSampler(32, 0.25)(labels[i : i + 1])
        assert all(torch.equal(own[i], one) for own, (one,) in zip(chosen, alone, strict=True))


def test_a_low_image_does_not_decide_where_the_next_is_pooled() -> None:
    """Of 40 rows and 24 of padding torchvision infers that strides are half as long as they are."""
    low, (image,) = torch.full((3, 40, 64), 90, dtype=torch.uint8), squares_and_discs(1, side=64)[0]
    net = tiny().eval()
    net.detect([low])
    (after,), (alone,) = net.detect([image]), tiny().eval().detect([image])
    assert len(alone.boxes) > 0
    assert torch.equal(after.scores, alone.scores)


@pytest.mark.parametrize("gate", ["off", "and", "independent", "independent_all", "cls", "reg"])
@pytest.mark.parametrize("step", [9, 10])
def test_roi_drop_zeroes_single_regions_and_keeps_the_divisor(gate: Any, step: int) -> None:
    torch.manual_seed(3)
    sizes, classes = (7, 12), 3
    labels = [torch.randint(0, classes + 1, (size,)) for size in sizes]
    logits, deltas = 2 * torch.randn(19, classes + 1), torch.randn(19, 4 * (classes + 1))
    wanted_deltas = [torch.randn(size, 4) for size in sizes]
    rules = RoiDropRules(gate, cls_threshold=2.0, reg_threshold=4.0, start=10)
    got = roi_losses(logits, deltas, labels, wanted_deltas, 0.0, rules, step).sums(rules)

    cls_sum = reg_sum = dropped_cls = dropped_reg = 0.0
    row = 0
    for size, one, boxes in zip(sizes, labels, wanted_deltas, strict=True):
        for label, box in zip(one.tolist(), boxes, strict=True):
            cls = -F.log_softmax(logits[row], 0)[label].item()
            reg = (deltas[row, 4 * label : 4 * label + 4] - box).abs().sum().item() if label else 0.0
            active = gate != "off" and step >= 10
            bad_cls, bad_reg = active and cls > 2 and (label > 0 or gate == "independent_all"), active and reg > 4
            if gate == "and":
                bad_cls = bad_reg = bad_cls and bad_reg
            bad_cls, bad_reg = bad_cls and gate != "reg", bad_reg and gate != "cls"
            cls_sum += 0 if bad_cls else cls / size
            reg_sum += 0 if bad_reg else reg / size
            dropped_cls, dropped_reg = dropped_cls + bad_cls, dropped_reg + bad_reg
            row += 1
    assert got["loss_classifier"].item() == pytest.approx(cls_sum, rel=1e-5)
    assert got["loss_box_reg"].item() == pytest.approx(reg_sum, rel=1e-5)
    if gate == "off":
        assert "dropped_cls" not in got
    else:
        assert (got["dropped_cls"].item(), got["dropped_reg"].item()) == (dropped_cls, dropped_reg)
        assert (dropped_cls + dropped_reg > 0) == (step >= 10)


@pytest.mark.parametrize("empty", [[True, False], [True, True]])
def test_images_without_objects_are_background_and_every_weight_takes_part(empty: list[bool]) -> None:
    images, targets = squares_and_discs(2, side=64)
    nothing = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    targets = [nothing if is_empty else one for one, is_empty in zip(targets, empty, strict=True)]
    net = tiny(drop=RoiDropRules("and", start=0)).train()
    losses = net.losses(images, targets, 0)
    sum(value for key, value in losses.items() if key.startswith("loss")).backward()  # type: ignore[union-attr]
    assert all(math.isfinite(value.item()) for value in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.slow
def test_learns_four_pictures_by_heart() -> None:
    images, targets = squares_and_discs(4, side=64)
    net = tiny().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for step in range(150):
        losses = net.losses(images, targets, step)
        (sum(losses.values()) / 4).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    for found, target in zip(net.eval().detect(images), targets, strict=True):
        assert best_box_overlap(found, target) > 0.7
