"""Mask R-CNN against torchvision's own, RoI drop of its masks against brute force, and what it can learn."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torchvision.models.detection import FasterRCNN, maskrcnn_resnet50_fpn

from tests.models.detectors.test_faster_rcnn import CPU, SMALL, TinyPyramid, twin
from tests.models.pictures import assert_same, best_overlap, learn, masked_pictures, squares_and_discs, total
from weaksam.models.backbones.pyramids import ResNet50
from weaksam.models.detectors.base import Targets
from weaksam.models.detectors.faster_rcnn import roi_losses
from weaksam.models.detectors.mask_rcnn import MaskRcnn, MaskRcnnSize, mask_loss
from weaksam.models.detectors.rules import DetectionFilter
from weaksam.models.noise import make_generators
from weaksam.ops.roi_drop import RoiDropRules

SIZE = MaskRcnnSize(**asdict(SMALL), mask_dim=32, mask_layers=2)
NOTHING = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def tiny(size: MaskRcnnSize = SIZE, **changes: Any) -> MaskRcnn:
    torch.manual_seed(0)
    return MaskRcnn(TinyPyramid(), 2, size, **changes)


def masked_twin(ours: MaskRcnn) -> FasterRCNN:
    """The one of torchvision, sharing all weights."""
    theirs = twin(ours)
    for name in ("mask_roi_pool", "mask_head", "mask_predictor"):
        setattr(theirs.roi_heads, name, getattr(ours.roi_heads, name))
    return theirs


def test_a_checkpoint_has_the_keys_and_shapes_of_torchvisions_and_its_number_of_weights() -> None:
    net = MaskRcnn(ResNet50(), 90)
    ours = net.state_dict()
    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).state_dict()
    theirs = {key: value for key, value in theirs.items() if "num_batches" not in key}  # its BatchNorm is not frozen
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(44.4, abs=0.06)


def test_losses_equal_torchvisions() -> None:
    images, targets = masked_pictures(1, side=64)
    ours = tiny(box_loss="smooth_l1").train()
    theirs = masked_twin(ours).train()
    listed = [{"boxes": one.boxes, "labels": one.classes + 1, "masks": one.masks} for one in targets]
    ours._start_step(0, make_generators([1], CPU))
    wanted = theirs(list(ours.normaliser(images).pixels), listed)
    got = ours.losses(images, targets, 0, make_generators([1], CPU))
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert got[key].item() == pytest.approx(value.item(), rel=1e-4), key


def test_losses_of_a_batch_are_the_sum_of_its_images() -> None:
    images, targets = masked_pictures(2, side=64)
    size = MaskRcnnSize(**asdict(SIZE) | {"rpn_samples": 10**4, "roi_samples": 10**4})  # nothing is drawn
    net = tiny(size, drop=RoiDropRules("independent", cls_threshold=1.0, reg_threshold=10.0, start=0)).train()
    together = net.losses(images, targets, 0)
    apart = [net.losses([image], [target], 0) for image, target in zip(images, targets, strict=True)]
    for key, value in together.items():
        assert value.item() == pytest.approx(sum(one[key].item() for one in apart), rel=1e-4), key


def test_detections_equal_torchvisions() -> None:
    images, _ = squares_and_discs(2, side=64)
    ours = tiny().eval()
    for found, wanted in zip(
        ours.detect(images), masked_twin(ours).eval()(list(ours.normaliser(images).pixels)), strict=True
    ):
        assert len(found.boxes) == len(wanted["boxes"]) > 0
        assert torch.allclose(found.boxes, wanted["boxes"], atol=1e-3)
        assert torch.equal(found.classes + 1, wanted["labels"])
        assert torch.allclose(found.scores, wanted["scores"], atol=1e-5)
        assert found.masks is not None
        assert (found.masks != (wanted["masks"][:, 0] >= 0.5)).float().mean() < 1e-3
        assert found.masks.any()


def test_detections_are_best_first_with_masks_of_the_images_size() -> None:
    images = [torch.randint(0, 256, (3, *hw), dtype=torch.uint8) for hw in ((40, 56), (70, 33))]
    for image, found in zip(images, tiny().eval().detect(images), strict=True):
        assert len(found.boxes) > 0
        assert found.masks is not None
        assert found.masks.dtype == torch.bool
        assert found.masks.shape == (len(found.boxes), *image.shape[1:])
        assert (found.scores.diff() <= 0).all()
    for image, found in zip(images, tiny(detection_filter=DetectionFilter(1.0)).eval().detect(images), strict=True):
        assert found.masks is not None
        assert found.masks.shape == (0, *image.shape[1:])


@pytest.mark.parametrize("gate", ["off", "and", "independent", "cls", "reg"])
@pytest.mark.parametrize("step", [9, 10])
def test_a_mask_is_dropped_where_its_class_or_its_box_is_and_the_divisor_stays(gate: Any, step: int) -> None:
    torch.manual_seed(3)
    sizes, classes, cells = (7, 12, 1), 3, 4
    labels = [torch.randint(0, classes + 1, (size,)) for size in sizes[:2]] + [torch.tensor([0])]
    logits, deltas = 2 * torch.randn(20, classes + 1), torch.randn(20, 4 * (classes + 1))
    wanted_deltas = [torch.randn(size, 4) for size in sizes]
    rules = RoiDropRules(gate, cls_threshold=2.0, reg_threshold=4.0, start=10)
    by_roi = roi_losses(logits, deltas, labels, wanted_deltas, 0.0, rules, step)
    dropped = by_roi.drop_cls | by_roi.drop_reg

    is_object = torch.cat(labels) > 0
    masks = torch.randn(int(is_object.sum()), classes + 1, cells, cells)
    wanted = [torch.rand(int((one > 0).sum()), cells, cells) for one in labels]
    got = mask_loss(masks, wanted, [one[one > 0] for one in labels], dropped[is_object])

    told, num_dropped, row, place = 0.0, 0, 0, 0
    for one, boxes, targets in zip(labels, wanted_deltas, wanted, strict=True):
        inner = 0
        for label, box in zip(one.tolist(), boxes, strict=True):
            if label:
                cls = -logits[row].log_softmax(0)[label].item()
                reg = (deltas[row, 4 * label : 4 * label + 4] - box).abs().sum().item()
                bad = {"off": False, "cls": cls > 2, "reg": reg > 4}
                bad |= {"and": cls > 2 and reg > 4, "independent": cls > 2 or reg > 4}
                is_bad = bad[gate] and step >= 10
                p = masks[place, label].sigmoid()
                cross = -(targets[inner] * p.log() + (1 - targets[inner]) * (1 - p).log()).mean().item()
                told += 0 if is_bad else cross / len(targets)
                num_dropped, inner, place = num_dropped + is_bad, inner + 1, place + 1
            row += 1
    assert got.item() == pytest.approx(told, rel=1e-5)
    assert int(dropped.sum()) == num_dropped
    assert (num_dropped > 0) == (step >= 10 and gate != "off")


def test_regions_are_dropped_from_the_step_on_that_the_rules_name() -> None:
    images, targets = masked_pictures(2, side=64)
    net = tiny(drop=RoiDropRules("cls", cls_threshold=0.01, start=10)).train()
    counts = [net.losses(images, targets, step)["dropped_mask"].item() for step in (9, 10)]
    assert counts[0] == 0 < counts[1]


def test_drops_of_masks_are_told() -> None:
    images, targets = masked_pictures(1, side=64)
    net = tiny(drop=RoiDropRules("cls", cls_threshold=0.0, start=2)).train()
    losses = [net.losses(images, targets, step) for step in (1, 2)]
    assert losses[0]["loss_mask"] > 0
    assert losses[0]["dropped_mask"] == 0
    assert losses[1]["loss_mask"] == 0
    assert losses[1]["dropped_mask"] == losses[1]["dropped_cls"] > 0
    assert "dropped_mask" not in tiny().train().losses(images, targets, 0)


@pytest.mark.parametrize("empty", [[True, False], [True, True]])
def test_images_without_objects_are_background_and_every_weight_takes_part(empty: list[bool]) -> None:
    images, targets = masked_pictures(2, side=64)
    targets = [NOTHING if is_empty else one for one, is_empty in zip(targets, empty, strict=True)]
    net = tiny(drop=RoiDropRules("and", start=0)).train()
    losses = net.losses(images, targets, 0)
    total(losses).backward()
    assert all(math.isfinite(value.item()) for value in losses.values())
    assert (losses["loss_mask"] == 0) == all(empty)
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


def test_objects_must_have_masks() -> None:
    images, targets = squares_and_discs(1, side=64)
    with pytest.raises(ValueError, match="2 objects without masks: give `masks`"):
        tiny().train().losses(images, targets, 0)


def test_weights_go_there_and_back() -> None:
    net = tiny().eval()
    torch.manual_seed(9)
    other = MaskRcnn(TinyPyramid(), 2, SIZE).eval()
    other.load_state_dict(load(save(net.state_dict())))
    images, _ = squares_and_discs(1, side=64)
    assert_same(net.detect(images)[0], other.detect(images)[0])


@pytest.mark.slow
def test_learns_four_pictures_by_heart() -> None:
    images, targets = masked_pictures(4, side=64)
    net = tiny(MaskRcnnSize(**asdict(SIZE) | {"mask_dim": 16})).train()
    learn(net, images, targets, steps=80, lr=4e-3)
    for found, target in zip(net.detect(images), targets, strict=True):
        assert best_overlap(found, target) > 0.7
